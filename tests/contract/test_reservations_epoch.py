"""What the epoch guard leans on: no script survives its Redis process, and each is loaded with its run_id."""

from __future__ import annotations

import time

import pytest
import redis

from hdcs_tasks.errors import RebuildPending
from hdcs_tasks.reservations import PlaceRequest, PoolNode, Reservations
from hdcs_tasks.reservations.link import connect
from hdcs_tasks.reservations.scripts import script_sha, script_text
from tests.services import RedisServer

pytestmark = pytest.mark.contract

GUARDED = "disk_claim"


def use(reservations: Reservations) -> None:
    """A guarded script, run."""
    reservations.disks.claim("east", "vm", 1, 10)


def test_no_script_survives_a_restart(own_redis: RedisServer) -> None:
    """AOF must not bring it back: that is why Redis before 7 is refused."""
    client = connect(own_redis.url)
    reservations = Reservations(client)
    reservations.epoch.open()
    use(reservations)
    old = script_sha(GUARDED, reservations.epoch.run_id())
    assert client.script_exists(old) == [True]
    own_redis.restart()
    assert client.get("hdcs:epoch:run_id") is not None, "the epoch is back from the AOF"
    assert client.script_exists(old) == [False]
    with pytest.raises(RebuildPending):
        use(reservations)
    assert client.script_exists(old) == [False], "nobody loads a text with another process's run_id"
    assert client.script_exists(script_sha(GUARDED, reservations.epoch.run_id())) == [True]


def test_a_client_from_before_the_restart_goes_on_after_the_rebuild(own_redis: RedisServer) -> None:
    reservations, other = (Reservations(connect(own_redis.url)) for _ in range(2))
    reservations.epoch.open()
    use(reservations)
    own_redis.restart()
    other.epoch.open()  # stands for the rebuild
    use(other)
    use(reservations)


def test_a_flushed_script_cache_heals(reservations: Reservations, redis_service: RedisServer) -> None:
    use(reservations)
    connect(redis_service.url).script_flush()
    use(reservations)


def test_an_emptied_redis_is_closed_though_it_knows_the_script(own_redis: RedisServer) -> None:
    client = connect(own_redis.url)
    reservations = Reservations(client)
    reservations.epoch.open()
    use(reservations)
    client.flushall()
    assert client.script_exists(script_sha(GUARDED, reservations.epoch.run_id())) == [True]
    with pytest.raises(RebuildPending):
        use(reservations)


def test_a_promoted_replica_is_closed(own_redis: RedisServer, redis_service: RedisServer) -> None:
    """Its data holds the epoch of the old primary; its process is another."""
    reservations = Reservations(connect(own_redis.url))
    reservations.epoch.open()
    use(reservations)
    replica = redis.Redis.from_url(redis_service.url, decode_responses=True)
    replica.replicaof("127.0.0.1", str(own_redis.port))
    try:
        deadline = time.monotonic() + 30
        while replica.get("hdcs:epoch:run_id") != reservations.epoch.run_id():
            assert time.monotonic() < deadline, "the replica never got the epoch"
            time.sleep(0.05)
    finally:
        replica.replicaof("NO", "ONE")
    with pytest.raises(RebuildPending):
        use(Reservations(connect(redis_service.url)))


def test_one_refusal_in_a_batch_does_not_hide_the_others(reservations: Reservations) -> None:
    reservations.ports.set_range("east", 20000, 20002)
    reservations.pool.put_node("east", PoolNode("n1", 200, 20000, "10.128.0.0/22"))
    asked = [PlaceRequest("east", f"vm{n}", "s", 1, 1) for n in range(100)]
    found = reservations.pool.place_many(asked)
    assert [type(f).__name__ for f in found] == ["Placed"] * 3 + ["NoCapacity"] * 97


def test_the_text_holds_the_run_id() -> None:
    assert script_text(GUARDED, "abc") != script_text(GUARDED, "abd")
    assert "@RUN_ID@" not in script_text(GUARDED, "abc")
    assert script_text("lease_grant", "abc") == script_text("lease_grant", "abd"), "unguarded: one text for ever"
