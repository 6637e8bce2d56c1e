"""The rules in Python and the script in Redis say the same of the same pool: where a VM goes, and where it may not."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.errors import NoCapacity
from hdcs_tasks.pool.policy import Order
from hdcs_tasks.pool.rules import Candidate, Free, NodeRoom, Shape, Terms, judge_nodes
from hdcs_tasks.pool.weighing import in_order
from hdcs_tasks.reservations import MixEntry, Placed, PlaceRequest, PoolNode, Reservations

pytestmark = pytest.mark.contract

BARE = CapacitySettings.model_validate({
    "overhead_mib": 0, "overhead_per_vcpu_mib": 0, "overhead_graphics_mib": 0, "overhead_ratio": 0,
})  # fmt: skip
TAGS = st.lists(st.sampled_from(["red", "blue"]), max_size=2, unique=True).map(tuple)
NODES = st.lists(
    st.tuples(st.integers(1, 6), st.integers(64, 700), st.booleans(), st.sampled_from([(), ("gpu",)]),
              st.integers(0, 2)), min_size=1, max_size=4,
)  # fmt: skip
VMS = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([64, 128, 256]), TAGS, TAGS, TAGS, st.sampled_from([(), ("gpu",)]),
              st.sampled_from([None, None, "n0"])), min_size=1, max_size=10,
)  # fmt: skip

MIXES = st.sampled_from([(), (), (MixEntry(1, 64, 0.5), MixEntry(3, 256, 0.5))])


def rooms(reservations: Reservations) -> list[NodeRoom]:
    members = reservations.marks.members("east")
    return [
        NodeRoom(
            v.name, Free(v.free_vcpus, v.free_memory_mib, ips=v.free_ips), v.vcpus, v.memory_mib,
            schedulable=v.schedulable, tags=v.tags, members=members.get(v.name, {}),
            free_starts=v.max_starts - v.starts if v.max_starts else None,
        )
        for v in reservations.pool.nodes("east")
    ]  # fmt: skip


@given(nodes=NODES, vms=VMS, order=st.sampled_from(["spread", "pack"]), mix=MIXES)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_python_and_redis_agree(
    reservations: Reservations,
    nodes: list[tuple[int, int, bool, tuple[str, ...], int]],
    vms: list[tuple[int, int, tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...], str | None]],
    order: Order,
    mix: tuple[MixEntry, ...],
) -> None:
    reservations._link.do("FLUSHALL")
    reservations.epoch.open()
    for i, (vcpus, memory, schedulable, tags, starts) in enumerate(nodes):
        reservations.pool.put_node(
            "east", PoolNode(f"n{i}", vcpus, memory, f"10.1.{i}.0/28", starts, schedulable, tags)
        )
    for i, (vcpus, memory, own, apart, together, node_tags, pin) in enumerate(vms):
        terms = Terms(pin=pin, node_tags=node_tags, together=together, apart=apart, tags=own, vm=f"v{i}", start=True)
        pool = Candidate("east", tuple(rooms(reservations)), order=order, mix=tuple((*entry,) for entry in mix))
        verdicts = judge_nodes(pool.nodes, Shape(vcpus, memory), terms, BARE)
        best = in_order(pool, verdicts, Shape(vcpus, memory), BARE)
        request = PlaceRequest(
            "east", f"v{i}", f"s{i}", vcpus, memory, pin=pin, order=order, tags=node_tags, console_port=False,
            marks=terms.marks, shuns=terms.shuns, seeks=together, mix=mix, told=5,
        )  # fmt: skip
        [placed] = reservations.pool.place_many([request])
        if isinstance(placed, NoCapacity):
            assert not best, f"refused though {best[0].node} fits: {placed}"
            assert {row["node"] for row in placed.details["nodes"]} == {v.node for v in verdicts}
        else:
            assert isinstance(placed, Placed)
            assert placed.node == best[0].node
            # What it tells is what it went by: the same order and, to the last bit, the same scores.
            told = [(w.node, w.score) for w in placed.weighed if not w.why]
            ranked = [(v.node, v.score) for v in best]
            assert told == (ranked[: len(told)] if pin is None else [(placed.node, None)])
