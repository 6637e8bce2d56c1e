"""The model of Redis that the simulation runs on answers as Redis does: the same calls, the same answers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.reservations import Claim, PlaceRequest, PoolNode, PoolSnapshot, Reservations, Snapshot
from hdcs_tasks.reservations.link import connect
from tests.chaos.sim.redis_model import ModelClient, RedisModel
from tests.services import RedisServer

pytestmark = pytest.mark.contract

CALLS = 400
VMS = [f"vm{n}" for n in range(6)]
STEPS = [f"step{n}" for n in range(4)]
NODES = ["node1", "node2", "node3"]


def calls(rng: random.Random) -> list[Callable[[Reservations], Any]]:
    """The same random calls for whoever asks; MACs are proposed by the caller's own chance, so none are asked for."""
    vm, step, node = rng.choice(VMS), rng.choice(STEPS), rng.choice(NODES)
    pool, attempt, holder = rng.choice(["east", "west"]), rng.randint(1, 3), rng.choice(["a", "b"])
    pin = rng.choice([None, node])
    exclude = (rng.choice(NODES),) if rng.random() < 0.3 else ()
    vcpus, memory, schedulable = rng.choice([1, 2, 8]), rng.choice([200, 2300, 9000]), rng.random() < 0.8
    order = rng.choice(["pack", "spread"])
    cool_s, number = rng.choice([0, 1000]), rng.choice([0, 20001, 20007])
    address = f"10.128.{NODES.index(node) * 4}.3"
    home = "west" if node == "node3" else "east"
    return [
        lambda r: r.pool.put_node(home, PoolNode(node, 8, 16000, f"10.128.{NODES.index(node) * 4}.0/29",
                                                 max_starts=rng_starts, schedulable=schedulable)),
        lambda r: r.pool.remove_node(home, node, force=True),
        lambda r: r.pool.place(PlaceRequest(pool, vm, step, vcpus, memory, pin=pin, exclude=exclude, order=order)),
        lambda r: r.pool.release(pool, vm, node, cool_s, cool_s),
        lambda r: r.pool.started(pool, node, vm),
        lambda r: r.pool.restore(Claim(pool, vm, node, vcpus, memory, number, address, "")),
        lambda r: r.ports.take(pool, vm),
        lambda r: r.ports.cool(pool, vm, cool_s),
        lambda r: r.ports.reclaim(pool),
        lambda r: r.ports.usage(pool),
        lambda r: r.ports.allot_range(pool, 20000, 20019, 5),
        lambda r: r.disks.claim(pool, vm, memory, 20000),
        lambda r: r.disks.release(pool, vm),
        lambda r: r.subnets.take(node, "10.128.0.0/20", 22),
        lambda r: r.steps.issue(step, attempt, node),
        lambda r: r.steps.claim(step, attempt, holder, node, 1000),
        lambda r: r.steps.renew(step, attempt, holder, 1000),
        lambda r: r.steps.check(step, attempt, holder),
        lambda r: r.steps.finish(step, attempt, holder),
        lambda r: r.steps.hand_over(step, attempt, holder),
        lambda r: r.steps.request_cancel(step, attempt),
        lambda r: r.steps.progress(step, attempt, holder, 12.5, "copying", 3.0),
        lambda r: r.steps.statuses(STEPS),
        lambda r: r.steps.ack(step, attempt),
        lambda r: r.steps.acked([(s, 1) for s in STEPS]),
        lambda r: r.steps.close(step, attempt),
        lambda r: r.leases.grant("node", node, holder, 1000),
        lambda r: r.leases.renew("node", node, holder, 1000),
        lambda r: r.leases.drop("node", node, holder),
        lambda r: r.leases.holders("node", NODES),
        lambda r: r.notes.write("note", holder, node, 1000),
        lambda r: r.notes.read("note"),
        lambda r: r.pool.nodes(pool),
        lambda r: r.pool.claims(pool),
        lambda r: r.epoch.close() and None if cool_s else r.epoch.open(),
        lambda r: r.epoch.open(),
        lambda r: r.epoch.is_open(),
        lambda r: r.rebuild(SNAPSHOT),
        lambda r: r.orphans(VMS[:3]),
    ]  # fmt: skip


rng_starts = 2
SNAPSHOT = Snapshot(
    macs={"vm1": "52:54:00:00:00:01"}, subnets={"node1": "10.128.0.0/22"},
    pools={"east": PoolSnapshot(
        20000, 20004, (PoolNode("node1", 8, 16000, "10.128.0.0/29"),),
        (Claim("east", "vm1", "node1", 2, 2300, 20002, "10.128.0.4", "step1"),), {"vm1": 20002, "vm2": 20000},
        {"vm1": 2300},
    )},
)  # fmt: skip


def answer_of(call: Callable[[Reservations], Any], to: Reservations) -> Any:
    try:
        return call(to)
    except HdcsError as error:
        return error.to_dict()


@pytest.mark.parametrize("seed", range(20))
def test_same_calls_same_answers(redis_service: RedisServer, seed: int) -> None:
    client = connect(redis_service.url)
    client.flushall()
    real = Reservations(client)
    server = RedisModel(lambda: int(time.time() * 1000))
    model = Reservations(ModelClient(server))  # type: ignore[arg-type]
    for each in (real, model):
        each.epoch.open()
        each.ports.allot_range("east", 20000, 20019, 5)
        for node in NODES[:2]:
            each.pool.put_node("east", PoolNode(node, 8, 16000, f"10.128.{NODES.index(node) * 4}.0/29"))
    rng = random.Random(seed)
    for number in range(CALLS):
        options = calls(rng)
        chosen = rng.randrange(len(options))
        if chosen == len(options) - 5 and rng.random() < 0.8:
            continue  # a closed epoch answers everything alike: seldom
        seen = [answer_of(options[chosen], each) for each in (real, model)]
        assert seen[0] == seen[1], f"call {number}, option {chosen}"
        assert real.dump() == model.dump(), f"after call {number}, option {chosen}"


def test_a_restart_loses_the_last_second_and_changes_the_epoch() -> None:
    now = [10_000]
    server = RedisModel(lambda: now[0])
    model = Reservations(ModelClient(server))  # type: ignore[arg-type]
    model.epoch.open()
    model.ports.allot_range("east", 20000, 20019, 5)
    first = model.ports.take("east", "vm1")
    now[0] += 1500
    model.ports.take("east", "vm2")
    now[0] += 300
    assert server.restart("second", lost_ms=700) > 0
    assert model.ports.all("east") == {"vm1": first}
    assert not model.epoch.is_open()
    with pytest.raises(HdcsError, match="closed"):
        model.ports.take("east", "vm3")
