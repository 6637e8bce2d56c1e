"""Plans and capacity against brute force: what is counted is what one-by-one placement finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.errors import Invalid
from hdcs_tasks.pool import capacity_rules, policy
from hdcs_tasks.pool.planning import Waiter, decision, next_in_line, plan, refusal_words
from hdcs_tasks.pool.rules import Candidate, Free, NodeRoom, Shape, Terms, judge_nodes, put_on
from hdcs_tasks.pool.weighing import in_order

BARE = CapacitySettings.model_validate({
    "overhead_mib": 0, "overhead_per_vcpu_mib": 0, "overhead_graphics_mib": 0, "overhead_ratio": 0,
})  # fmt: skip


def room(name: str, memory: int, vcpus: int = 64, **more: object) -> NodeRoom:
    return NodeRoom(name, Free(vcpus, memory), 64, 16384, **more)  # type: ignore[arg-type]


ROOMS = st.builds(
    NodeRoom, st.just(""), st.builds(Free, st.integers(-2, 12), st.integers(-64, 2000), st.none() | st.integers(0, 9)),
    st.just(16), st.just(2048), schedulable=st.booleans(), max_vcpus=st.sampled_from([0, 2]),
    tags=st.sampled_from([(), ("gpu",)]),
)  # fmt: skip
POOLS = st.lists(ROOMS, max_size=6).map(
    lambda rooms: tuple(replace(r, name=f"n{i}") for i, r in enumerate(rooms))
)  # fmt: skip
SHAPES = st.builds(Shape, st.integers(1, 4), st.integers(64, 512), disk_bytes=st.sampled_from([0, 10]))
TERMS = st.builds(
    Terms, node_tags=st.sampled_from([(), ("gpu",)]), apart=st.sampled_from([(), ("t",)]),
    tags=st.sampled_from([(), ("t",)]), pin=st.sampled_from([None, "n0"]),
)  # fmt: skip


def one_by_one(candidate: Candidate, shape: Shape, terms: Terms) -> int:
    """How many are placed before the first refusal, trying every server node each time."""
    placed = 0
    while True:
        if candidate.free_ports is not None and candidate.free_ports < 1:
            return placed
        if shape.disk_bytes and candidate.free_disk_bytes is not None and candidate.free_disk_bytes < shape.disk_bytes:
            return placed
        fitting = [v for v in judge_nodes(candidate.nodes, shape, terms, BARE) if not v.why]
        if not fitting:
            return placed
        candidate = put_on(candidate, fitting[placed % len(fitting)].node, shape, BARE, terms)
        placed += 1


@given(nodes=POOLS, shape=SHAPES, terms=TERMS, ports=st.none() | st.integers(0, 9), disk=st.none() | st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_capacity_is_what_placing_one_by_one_finds(
    nodes: tuple[NodeRoom, ...], shape: Shape, terms: Terms, ports: int | None, disk: int | None
) -> None:
    pool = Candidate("east", nodes, free_ports=ports, free_disk_bytes=disk)
    found = capacity_rules.count(pool, shape, terms, BARE)
    assert found.vms == one_by_one(pool, shape, terms)
    # N+1: the fewest that fit over the choice of which server node is kept free.
    spared = [
        one_by_one(replace(pool, nodes=tuple(n for n in nodes if n.name != kept.name)), shape, terms) for kept in nodes
    ]
    assert found.n_plus_one == min(spared, default=0)


def test_what_if_and_mix() -> None:
    pool = Candidate("east", (room("n1", 1024), room("n2", 512)))
    shape = Shape(1, 256)
    assert capacity_rules.count(pool, shape, Terms(), BARE).vms == 6
    without = capacity_rules.what_if(pool, ["n1"], [capacity_rules.new_node(1, 2, 4096)])
    counted = capacity_rules.count(without, shape, Terms(), BARE)
    assert (counted.vms, counted.n_plus_one) == (4, 2)
    assert counted.nodes["new-node-1"] == (2, "vcpus")
    mix = [("small", Shape(1, 128), Terms(), 2), ("large", Shape(1, 512), Terms(), 1)]
    # Either way the room a second large one needs is kept, for layer two is aware of the mix.
    spread = capacity_rules.count_mix([pool], mix, BARE)
    pack = capacity_rules.count_mix([replace(pool, order="pack")], mix, BARE)
    assert (spread.rounds, spread.vms, spread.stopped_by) == (2, 6, "large")
    assert (pack.rounds, pack.vms, pack.stopped_by) == (2, 6, "large")
    # Terms count: a profile that asks for a tag no server node has fits nowhere.
    tagged = [("tagged", Shape(1, 128), Terms(node_tags=("gpu",)), 1)]
    assert capacity_rules.count_mix([pool], tagged, BARE).vms == 0


def test_the_line_takes_the_oldest_that_fit() -> None:
    pool = Candidate("east", (room("n1", 512),))
    waiters = [Waiter(key, Shape(1, mib), Terms(start=True)) for key, mib in (("big", 1024), ("a", 256), ("b", 384),
                                                                             ("c", 256), ("d", 64))]  # fmt: skip
    assert next_in_line(pool, waiters, BARE) == ["a", "c"]
    assert next_in_line(replace(pool, free_starts=1), waiters, BARE) == ["a"]
    assert next_in_line(replace(pool, free_ports=0), waiters, BARE) == []


def test_a_plan_counts_those_before_it_and_keeps_rules() -> None:
    pool = Candidate("east", (room("n1", 4096), room("n2", 4096)))
    waiters = [Waiter(f"w{i}", Shape(1, 64), Terms(apart=("t",), tags=("t",), vm=f"w{i}")) for i in range(3)]
    planned, _ = plan(pool, waiters, BARE)
    assert [p.node for p in planned] == ["n2", "n1", None]
    assert refusal_words("it", "east", planned[2].verdicts) == (
        "no server node of east fits it: n1 runs a VM tagged t, to be kept apart, "
        "n2 runs a VM tagged t, to be kept apart"
    )


def test_order_and_decision() -> None:
    nodes = (room("n1", 300), room("n2", 900), room("n3", 100), room("n4", 900, 8), room("n5", 500, schedulable=False))
    verdicts = judge_nodes(nodes, Shape(1, 256), Terms(), BARE)
    pool = Candidate("east", nodes)
    assert [v.node for v in in_order(pool, verdicts, Shape(1, 256), BARE)] == ["n2", "n4", "n1"]
    packed = replace(pool, order="pack")
    assert [v.node for v in in_order(packed, verdicts, Shape(1, 256), BARE)] == ["n1", "n4", "n2"]
    kept = decision(pool, verdicts, Shape(1, 256), BARE, full=False)
    assert kept["node"] == "n2" and kept["counts"] == {"fits": 3, "memory": 1, "draining": 1}
    assert "nodes" not in kept and [n["node"] for n in kept["best"]] == ["n2", "n4", "n1"]
    assert {n["score"] for n in kept["best"]} == {None}


def test_to_spread_keeps_the_last_places_of_the_largest() -> None:
    """Evenly while most server nodes take the largest of the mix; from then on where the fewest of them are lost."""
    mix = ((1, 256, 0.5), (1, 4096, 0.5))
    shape = Shape(1, 256)
    pool = Candidate("east", (room("n1", 9000), room("n2", 5000)), mix=mix)
    first = decision(pool, judge_nodes(pool.nodes, shape, Terms(), BARE), shape, BARE)
    assert (first["node"], first["best"][0]["score"]) == ("n1", None)
    scarce = Candidate("east", (room("n1", 4200), room("n2", 900), room("n3", 1000)), mix=mix)
    later = decision(scarce, judge_nodes(scarce.nodes, shape, Terms(), BARE), shape, BARE)
    assert [node["node"] for node in later["best"]][2] == "n1"  # the emptiest comes last
    scores = [node["score"] for node in later["best"]]
    assert scores == sorted(scores) and scores[2] > 8 * scores[0]


def test_policies_are_checked_and_fall_back() -> None:
    kept = policy.changed(policy.PoolPolicy, {}, {"memory_overcommit": 1.5, "placement": "pack"})
    assert kept == {"memory_overcommit": 1.5, "placement": "pack"}
    assert policy.changed(policy.PoolPolicy, kept, {"memory_overcommit": None}) == {"placement": "pack"}
    host = policy.capacity_settings(
        BARE, policy.read(policy.PoolPolicy, kept), policy.NodePolicy(memory_overcommit=2.0, host_reserve_mib=7)
    )
    assert (host.memory_overcommit, host.host_reserve_mib) == (2.0, 7)
    for wrong in ({"max_starts": -1}, {"placement": "best"}, {"nothing": 1}):
        with pytest.raises(Invalid):
            policy.changed(policy.PoolPolicy, {}, wrong)
    for tag in ("a b", "!a", "a,b", ""):
        with pytest.raises(Invalid):
            policy.check_tags([tag])
