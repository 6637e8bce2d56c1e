"""Redis that lost all or its last second: nothing is given twice; and port, MAC and IP taken together."""

from __future__ import annotations

import ipaddress
import time
from dataclasses import replace

import pytest

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import Invalid, NoCapacity, RebuildPending, Unreachable
from hdcs_tasks.reservations import (
    Addresses,
    Claim,
    ClaimAnswer,
    Fence,
    MixEntry,
    PlaceRequest,
    PoolNode,
    PoolSnapshot,
    Reservations,
    Snapshot,
)
from tests.contract.test_reservations import request
from tests.services import RedisServer, free_port

pytestmark = pytest.mark.contract


# ---- loss


def fill(reservations: Reservations) -> None:
    reservations.ports.set_range("east", 20000, 20099)
    reservations.subnets.take("n1", "10.128.0.0/12", 22)
    reservations.pool.put_node("east", PoolNode("n1", 64, 65536, "10.128.0.0/22"))
    reservations.pool.put_node("east", PoolNode("n2", 64, 65536, "10.128.4.0/22", tags=("gpu",)))
    for i in range(20):
        reservations.pool.place(request(f"vm{i}", console_port=True, ip=True, mac=True))
        reservations.disks.claim("east", f"vm{i}", 1 << 30, 1 << 40)
    reservations.pool.place(request("vm3", "s2", exclude=("n1",), ip=True, console_port=True))


def test_after_a_restart_allocation_waits_for_the_rebuild(own_redis: RedisServer) -> None:
    reservations = Reservations.from_settings(Settings(redis_url=own_redis.url))
    with pytest.raises(RebuildPending):
        reservations.macs.take("a")  # never opened
    reservations.epoch.open()
    fill(reservations)
    before = reservations.dump()
    own_redis.restart()
    assert not reservations.epoch.is_open()
    for allocate in (
        lambda: reservations.macs.take("x"),
        lambda: reservations.subnets.take("x", "10.128.0.0/12", 22),
        lambda: reservations.ports.take("east", "x"),
        lambda: reservations.ports.set_range("west", 30000, 30100),
        lambda: reservations.disks.claim("east", "x", 1, 1 << 40),
        lambda: reservations.pool.place(request("x")),
    ):
        with pytest.raises(RebuildPending):
            allocate()
    assert reservations.leases.grant("node", "n1", "a", 30)  # leases and steps go on
    reservations.rebuild(before)
    assert reservations.epoch.is_open()
    assert reservations.dump() == before
    assert reservations.pool.place(request("x", console_port=True, ip=True)).port == 20020


def test_rebuild_after_everything_was_lost(own_redis: RedisServer) -> None:
    reservations = Reservations.from_settings(Settings(redis_url=own_redis.url))
    reservations.epoch.open()
    fill(reservations)
    before, views = reservations.dump(), reservations.pool.nodes("east")
    own_redis.wipe()
    own_redis.start()
    with pytest.raises(RebuildPending):
        reservations.pool.place(request("x"))
    reservations.pool.put_node("east", PoolNode("n9", 1, 1, "10.128.8.0/22"))  # joined before the rebuild: stays
    reservations.rebuild(before)
    after = reservations.pool.nodes("east")
    assert [n for n in after if n.name != "n9"] == views
    assert [n.name for n in after] == ["n1", "n2", "n9"]
    ips = {c.ip for c in reservations.pool.claims("east")}
    assert reservations.pool.place(request("x", ip=True)).ip not in ips
    reservations.pool.release("east", "vm5", "n1", 0)
    reservations.pool.release("east", "vm3", "n1", 0)


def test_rebuild_lets_ports_of_stopped_vms_cool(reservations: Reservations) -> None:
    fill(reservations)
    reservations.pool.release("east", "vm5", "n1", 0, port_cooling_s=60)
    before = reservations.dump()
    reservations.rebuild(before, port_cooling_s=0)
    assert reservations.ports.usage("east") == (19, 1, 80)
    time.sleep(0.01)
    assert reservations.ports.reclaim("east") == 1


def test_rebuild_over_a_restart_stays_closed(own_redis: RedisServer) -> None:
    reservations = Reservations.from_settings(Settings(redis_url=own_redis.url))
    old = reservations.epoch.run_id()
    own_redis.restart()
    reservations.epoch.open(old)
    assert not reservations.epoch.is_open()
    with pytest.raises(RebuildPending):
        reservations.macs.take("a")


def test_rebuild_refuses_a_thing_with_two_owners(reservations: Reservations) -> None:
    fill(reservations)
    before = reservations.dump()
    with pytest.raises(Invalid, match="MAC"):
        reservations.rebuild(Snapshot({"a": "52:54:00:00:00:01", "b": "52:54:00:00:00:01"}))
    with pytest.raises(Invalid, match="port"):
        reservations.rebuild(Snapshot(pools={"east": PoolSnapshot(1, 9, ports={"a": 5, "b": 5})}))
    assert reservations.dump() == before
    assert reservations.epoch.is_open()


def test_rebuild_fills_the_gaps(reservations: Reservations) -> None:
    node = PoolNode("n1", 64, 65536, "10.128.0.0/29")
    claims = (Claim("east", "a", "n1", 1, 1, 20002, "10.128.0.4", "s"),)
    reservations.rebuild(Snapshot(pools={"east": PoolSnapshot(20000, 20003, (node,), claims, {"a": 20002})}))
    placed = [reservations.pool.place(request(f"v{i}", ip=True, console_port=True)) for i in range(3)]
    assert sorted(p.port for p in placed) == [20000, 20001, 20003]
    placed.append(reservations.pool.place(request("v3", ip=True)))
    assert sorted(p.ip for p in placed) == [f"10.128.0.{i}" for i in (2, 3, 5, 6)]


def test_orphans_are_found(reservations: Reservations) -> None:
    fill(reservations)
    found = reservations.orphans({f"vm{i}" for i in range(19)})
    assert (found.macs, found.ports, found.disks) == (("vm19",), (("east", "vm19"),), (("east", "vm19"),))
    assert [c.vm for c in found.claims] == ["vm19"]
    assert reservations.orphans({f"vm{i}" for i in range(20)}) == ((), (), (), ())


def test_redis_away_is_unreachable() -> None:
    reservations = Reservations.from_settings(Settings(redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    with pytest.raises(Unreachable, match="Redis does not answer"):
        reservations.macs.take("a")
    with pytest.raises(Unreachable):
        reservations.steps.statuses(["a"])


def test_scripts_are_loaded_again_when_redis_forgot_them(reservations: Reservations) -> None:
    reservations.macs.take("a")
    reservations._link.do("SCRIPT", "FLUSH")
    reservations.macs.take("b")
    reservations._link.do("SCRIPT", "FLUSH")
    assert reservations.steps.issue_many([("s", 1, ""), ("t", 1, "")]) == [True, True]
    with pytest.raises(Invalid):
        reservations.steps.issue("a b", 1)


# ---- port, MAC and IP together


def test_addresses_of_many_are_all_three_or_none_and_the_same_when_asked_again(reservations: Reservations) -> None:
    take_many = reservations.addresses.take_many
    reservations.ports.set_range("east", 20000, 20199)
    reservations.pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/25"))  # 125 addresses for guests
    vms = [f"vm{i}" for i in range(150)]
    found = take_many("east", "n1", vms)
    got = [one for one in found if isinstance(one, Addresses)]
    assert len(got) == 125
    for part in ("port", "mac", "ip"):
        assert len({getattr(one, part) for one in got}) == 125
    refused = found[125:]
    assert all(isinstance(one, NoCapacity) and "n1 has no IP" in one.message for one in refused)
    assert reservations.ports.usage("east") == (125, 0, 75)  # the ports of the refused went back
    assert take_many("east", "n1", vms[:125][::-1]) == got[::-1]
    assert reservations.addresses.take("east", "n1", "vm7") == got[7]
    assert reservations.macs.all() == {vm: one.mac for vm, one in zip(vms, got, strict=False)}
    assert all(reservations.macs.owner(one.mac) == vm for vm, one in zip(vms, got, strict=False))


def test_addresses_that_cool_go_back_to_their_vm_only(reservations: Reservations) -> None:
    reservations.ports.set_range("east", 20000, 20001)
    reservations.pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/29"))
    take_many = reservations.addresses.take_many
    a, b = take_many("east", "n1", ["a", "b"])
    for vm in ("a", "b"):
        assert not reservations.pool.release("east", vm, "n1", 0, port_cooling_s=0)  # no claim, but port and IP cool
    time.sleep(0.01)
    # c is first, and both ports are ripe: a's own is not given away in the very call in which a asks for it back.
    c, again = take_many("east", "n1", ["c", "a"])
    assert isinstance(c, Addresses) and isinstance(b, Addresses)
    assert again == a and c.port == b.port
    with pytest.raises(NoCapacity, match="no console port for VM b"):
        reservations.addresses.take("east", "n1", "b")
    assert reservations.pool.nodes("east")[0].free_ips == 3  # a and c hold one each


def test_addresses_draw_a_mac_again_that_is_taken_or_drawn_twice(
    reservations: Reservations, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservations.ports.set_range("east", 20000, 20009)
    reservations.pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/24"))
    draws = iter(["aabbcc" * 3, "aabbcc010101", "020202", "020202", "030303"])
    monkeypatch.setattr("hdcs_tasks.reservations.addresses.random_hex", lambda _size: next(draws))
    found = reservations.addresses.take_many("east", "n1", ["a", "b", "c"])
    one = reservations.addresses.take("east", "n1", "d")
    macs = [got.mac[9:] for got in [*found, one] if isinstance(got, Addresses)]
    assert macs == ["aa:bb:cc", "02:02:02", "01:01:01", "03:03:03"]
    assert reservations.ports.usage("east") == (4, 0, 6)


def test_addresses_where_one_part_is_missing_take_nothing(reservations: Reservations) -> None:
    reservations.ports.set_range("east", 20000, 20009)
    reservations.pool.put_node("east", PoolNode("dry", 8, 8192))
    for _ in range(2):
        with pytest.raises(NoCapacity, match="dry has no IP"):
            reservations.addresses.take("east", "dry", "a")
        with pytest.raises(NoCapacity, match="no console port"):
            reservations.addresses.take("west", "dry", "a")
    assert (reservations.ports.usage("east"), reservations.macs.all()) == ((0, 0, 10), {})


def test_a_subnet_that_changes_gives_only_its_own_addresses(reservations: Reservations) -> None:
    pool = reservations.pool
    reservations.ports.set_range("east", 20000, 20009)
    pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/29"))
    first = pool.place(PlaceRequest("east", "a", "s", 1, 1))
    pool.remove_node("east", "n1", force=True)
    pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/28"))  # wider; a's claim is still there
    assert pool.nodes("east")[0].free_ips == 12
    ips = {pool.place(PlaceRequest("east", f"b{i}", "s", 1, 1)).ip for i in range(6)}
    assert len(ips) == 6 and first.ip not in ips


def test_packing_keeps_the_last_places_of_the_largest(reservations: Reservations) -> None:
    """Both nodes take the small VM; on the tighter one it would cost a large one its last place but one."""
    mix = (MixEntry(1, 1000, 0.9), MixEntry(2, 4000, 0.1))
    reservations.pool.put_node("east", PoolNode("tight", 8, 4100))
    reservations.pool.put_node("east", PoolNode("odd", 8, 7900))  # one large and 3,900 that no large one can use
    asked = PlaceRequest("east", "a", "s", 1, 1000, console_port=False, ip=False)
    assert reservations.pool.place(asked).node == "tight"
    reservations.pool.release("east", "a", "tight", 0)
    assert reservations.pool.place(replace(asked, mix=mix)).node == "odd"


def test_a_server_node_gives_more_than_a_thousand_addresses(reservations: Reservations) -> None:
    """The default subnet is a /22: all but network, gateway and broadcast."""
    subnet = reservations.subnets.take("n1", Settings().supernet, Settings().subnet_prefix)
    reservations.ports.set_range("east", 20000, 23999)
    reservations.pool.put_node("east", PoolNode("n1", 8, 8192, subnet))
    found = reservations.addresses.take_many("east", "n1", [f"vm{i}" for i in range(1100)])
    ips = {one.ip for one in found if isinstance(one, Addresses)}
    assert len(ips) == 1021
    assert all(ipaddress.IPv4Address(ip) in ipaddress.IPv4Network(subnet) for ip in ips)


def test_a_cancel_meant_for_an_older_attempt_is_not_the_newer_ones(reservations: Reservations) -> None:
    steps = reservations.steps
    steps.issue("s", 1)
    steps.issue("s", 2, node="n1")
    assert not steps.request_cancel("s", 1)
    assert steps.claim("s", 2, "a", "n1", 30) is ClaimAnswer.CLAIMED


def test_a_fenced_release_is_only_the_holders(reservations: Reservations) -> None:
    """An executor that was away for long must not give back what a newer attempt has started on."""
    steps, pool = reservations.steps, reservations.pool
    pool.put_node("east", PoolNode("n1", 8, 8192))
    pool.place(request("a", "s"))
    steps.issue("s", 2)
    steps.claim("s", 2, "new", "n1", 30)
    for old in (Fence("s", 1, "new"), Fence("s", 2, "old"), Fence("t", 2, "new")):
        assert not pool.release("east", "a", "n1", 0, step="s", fence=old)
    assert pool.release("east", "a", "n1", 0, step="s", fence=Fence("s", 2, "new"))
