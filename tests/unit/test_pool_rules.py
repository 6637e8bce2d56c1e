"""Capacity formula and layer one: hand-computed values and properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.pool.rules import (
    Candidate,
    Capacity,
    Free,
    HomeRequest,
    NodeFacts,
    NodeRoom,
    Shape,
    Terms,
    capacity,
    choose_domain_node,
    memory_need_mib,
    n_plus_one,
    need_of,
    schedulable_memory_mib,
    schedulable_vcpus,
    split_over_pools,
)
from hdcs_tasks.pool.words import explain, wanted_words

SETTINGS = CapacitySettings.model_validate({})
FACTS = NodeFacts(cpu_mhz=2400, sockets=2, cores_per_socket=16, threads_per_core=2, max_vcpus=255, memory_mib=262144)


def test_formula_by_hand() -> None:
    assert schedulable_memory_mib(FACTS, SETTINGS) == 262144 - 2048
    # 32 cores, 1.25 with hyper-threads, 8 each: 320; clock: 2400 * 32 * 0.8 / 250 = 245
    assert schedulable_vcpus(FACTS, SETTINGS) == 245
    assert memory_need_mib(4096, 2, 1, SETTINGS) == 4096 + math.ceil(8.192 + 218 + 16 + 16)
    assert capacity(FACTS, Shape(2, 4096), SETTINGS) == Capacity(260096 // 4355, "memory")


@pytest.mark.parametrize(
    ("shape", "facts", "free", "expected"),
    [
        (Shape(4, 512), FACTS, None, Capacity(61, "ghz")),
        (Shape(4, 512), NodeFacts(0, 2, 16, 2, 0, 262144), None, Capacity(80, "vcpus")),
        (Shape(256, 512), FACTS, None, Capacity(0, "max vcpus")),
        (Shape(1, 128), FACTS, Free(100, 100000, ips=3, ports=9), Capacity(3, "ips")),
        (Shape(1, 128), FACTS, Free(100, 100000, ips=9, ports=2), Capacity(2, "ports")),
        (Shape(1, 128, disk_bytes=10), FACTS, Free(100, 100000, disk_bytes=49), Capacity(4, "disk")),
        (Shape(1, 128), FACTS, Free(-3, 100), Capacity(0, "ghz")),
    ],
)
def test_the_least_limit_counts_and_is_named(
    shape: Shape, facts: NodeFacts, free: Free | None, expected: Capacity
) -> None:
    assert capacity(facts, shape, SETTINGS, free) == expected


@given(memory=st.integers(0, 10**6), vcpus=st.integers(0, 1000), need=st.integers(64, 65536), each=st.integers(1, 64))
def test_capacity_fits_and_one_more_does_not(memory: int, vcpus: int, need: int, each: int) -> None:
    shape = Shape(each, need)
    vms = capacity(FACTS, shape, SETTINGS, Free(vcpus, memory)).vms
    one = memory_need_mib(need, each, 1, SETTINGS)
    assert vms * one <= memory
    assert vms * each <= vcpus
    assert (vms + 1) * one > memory or (vms + 1) * each > vcpus


def room(name: str, memory: int, vcpus: int = 64, **more: bool) -> NodeRoom:
    return NodeRoom(name, Free(vcpus, memory, ips=100), 64, 16384, **more)


def test_a_pool_that_really_fits_beats_the_most_free_memory_in_sum() -> None:
    scattered = Candidate("east", tuple(room(f"e{i}", 3000) for i in range(10)))
    fitting = Candidate("west", (room("w1", 5000),))
    choice = choose_domain_node([scattered, fitting], HomeRequest(Shape(2, 4096)), SETTINGS)
    assert choice.domain_node == "west"
    assert choice.verdicts[1].why.startswith("e0 3000 MiB free, e1 3000 MiB free")


def test_image_then_balance() -> None:
    full = Candidate("a", (room("a1", 6000),), has_image=True)
    empty = Candidate("b", (room("b1", 16000),))
    half = Candidate("c", (room("c1", 9000),), has_image=True)
    request = HomeRequest(Shape(2, 1024))
    ranked = choose_domain_node([full, empty, half], request, SETTINGS).verdicts
    assert [v.domain_node for v in ranked] == ["c", "a", "b"]
    packed = HomeRequest(Shape(2, 1024), order="pack")
    assert choose_domain_node([full, empty, half], packed, SETTINGS).domain_node == "a"
    many = HomeRequest(Shape(2, 1024), count=10)
    assert choose_domain_node([full, empty, half], many, SETTINGS).domain_node == "b"


def test_refusal_says_why_for_every_pool_and_node() -> None:
    pools = [
        Candidate("a", (room("a1", 64), room("a2", 16000, schedulable=False), room("a3", 16000, vcpus=1))),
        Candidate("b", (room("b1", 16000),), free_ports=0),
        Candidate("c", (room("c1", 16000),), free_disk_bytes=5),
        Candidate("d", (room("d1", 16000),)),
        Candidate("e", ()),
    ]
    shape = Shape(2, 128, disk_bytes=10)
    choice = choose_domain_node(pools, HomeRequest(shape, exclude=("d",)), SETTINGS)
    assert choice.domain_node is None
    assert explain(choice, shape, SETTINGS, "small") == (
        "no domain node fits profile small (2 vCPU, 379 MiB: 128 guest + 251 overhead): b: no console port is free; "
        "c: storage can promise 5 more bytes; d: excluded; "
        "a: a1 64 MiB free, a2 draining, a3 1 vCPU free; e: it has no server node"
    )
    pinned = choose_domain_node(pools, HomeRequest(shape, pin="d"), SETTINGS)
    assert pinned.domain_node == "d"
    assert explain(pinned, shape, SETTINGS).startswith(
        "d takes (2 vCPU, 379 MiB: 128 guest + 251 overhead): 32 fit, needs the image brought, load "
    )
    assert choose_domain_node([], HomeRequest(shape), SETTINGS).domain_node is None
    thin = Shape(4, 2048, vcpu_overcommit=2.0, memory_overcommit=2.0)
    words, need = wanted_words(thin, SETTINGS), need_of(thin, SETTINGS)
    assert words == "2 of 4 vCPU, 1295 MiB: 1024 of 2048 guest + 271 overhead"
    assert need == (2, 1024 + 271), "what it says is what is claimed"


def test_bulk_is_split_when_no_pool_takes_all() -> None:
    pools = [Candidate("a", (room("a1", 3000),)), Candidate("b", (room("b1", 9000),), has_image=True)]
    plan, left = split_over_pools(pools, HomeRequest(Shape(1, 1024), count=12), SETTINGS)
    assert (plan, left) == ({"b": 7, "a": 2}, 3)


def test_tags_must_all_be_there() -> None:
    tagged = NodeRoom("n", Free(8, 8192), 8, 8192, tags=("gpu",))
    request = HomeRequest(Shape(1, 128), terms=Terms(node_tags=("gpu",)))
    assert choose_domain_node([Candidate("a", (tagged,))], request, SETTINGS).domain_node == "a"
    assert choose_domain_node([Candidate("a", (room("m", 9000),))], request, SETTINGS).domain_node is None


def test_one_node_kept_free() -> None:
    assert n_plus_one({"a": 3, "b": 5, "c": 4}) == 7
    assert n_plus_one({}) == 0
