"""Rebalancing: every plan is one that layer two could follow, move by move, and small ones are as good as can be."""

from __future__ import annotations

import itertools
import random
from statistics import pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcs_tasks.pool.balance_rules import Resident, rebalance
from hdcs_tasks.pool.rules import Free, Need, NodeRoom, Terms


def pool(
    sizes: list[tuple[int, int]], guests: list[tuple[int, int, int]], terms: dict[int, Terms] | None = None
) -> tuple[list[NodeRoom], list[Resident]]:
    """Server nodes of (vCPUs, MiB), and guests of (server node, vCPUs, MiB)."""
    residents = [
        Resident(f"v{i}", f"n{n}", Need(v, m), (terms or {}).get(i, Terms(vm=f"v{i}")), vcpus=v)
        for i, (n, v, m) in enumerate(guests)
    ]  # fmt: skip
    return rooms_of(sizes, residents), residents


def rooms_of(sizes: list[tuple[int, int]], residents: list[Resident]) -> list[NodeRoom]:
    rooms = []
    for n, (vcpus, memory) in enumerate(sizes):
        here = [r for r in residents if r.node == f"n{n}"]
        free = Free(vcpus - sum(r.need.vcpus for r in here), memory - sum(r.need.memory_mib for r in here))
        marks = {mark for r in here for mark in r.terms.marks}
        members = {mark: frozenset(r.vm for r in here if mark in r.terms.marks) for mark in marks}
        rooms.append(NodeRoom(f"n{n}", free, vcpus, memory, members=members))
    return rooms


def score(rooms: list[NodeRoom]) -> float:
    """As the module says it, counted anew from the rooms (without N+1)."""
    rooms = [r for r in rooms if r.schedulable]
    return pstdev(r.free.memory_mib / r.total_memory_mib for r in rooms) + pstdev(
        r.free.vcpus / r.total_vcpus for r in rooms
    )


def test_an_even_pool_stays_as_it_is() -> None:
    found = rebalance(*pool([(16, 1024)] * 3, [(0, 1, 128), (1, 1, 128), (2, 1, 128)]))
    assert found.moves == () and found.before.score == 0


def test_the_full_one_gives_to_the_empty_one() -> None:
    found = rebalance(*pool([(16, 1024)] * 2, [(0, 1, 128)] * 6))
    assert len(found.moves) == 3
    assert {(m.source, m.target) for m in found.moves} == {("n0", "n1")}
    assert found.after.score == pytest.approx(0, abs=1e-9)


def test_where_no_move_helps_an_exchange_does() -> None:
    # One full of memory, the other of vCPUs: any single move makes one of the two worse.
    found = rebalance(*pool([(8, 800)] * 2, [(0, 1, 300), (0, 1, 300), (1, 3, 100), (1, 3, 100)]), min_gain=1e-6)
    assert len(found.moves) == 2
    assert found.after.score == pytest.approx(0, abs=1e-9)


def test_who_must_stay_stays() -> None:
    tied = {0: Terms(pin="n0"), 1: Terms(together=("db",)), 2: Terms(tags=("db",)), 3: Terms(apart=("noisy",))}
    rooms, guests = pool([(16, 1024)] * 2, [(0, 1, 200)] * 4 + [(1, 1, 10)], tied | {4: Terms(tags=("noisy",))})
    assert rebalance(rooms, guests).moves == ()


def test_draining_nodes_neither_give_nor_take() -> None:
    rooms, guests = pool([(16, 1024)] * 3, [(0, 1, 128)] * 4 + [(2, 1, 128)] * 4)
    rooms[2] = NodeRoom("n2", rooms[2].free, 16, 1024, schedulable=False)
    found = rebalance(rooms, guests)
    assert {(m.source, m.target) for m in found.moves} == {("n0", "n1")}


def test_no_more_moves_than_asked_for() -> None:
    assert len(rebalance(*pool([(16, 1024)] * 2, [(0, 1, 64)] * 10), max_moves=2).moves) == 2


clusters = st.tuples(
    st.lists(st.tuples(st.integers(4, 32), st.integers(512, 4096)), min_size=2, max_size=6), st.integers(0, 10**6)
)


@settings(max_examples=60, deadline=None)
@given(clusters)
def test_every_move_finds_room_and_the_score_falls(cluster: tuple[list[tuple[int, int]], int]) -> None:
    sizes, seed = cluster
    residents = drawn(sizes, random.Random(seed))
    rooms = rooms_of(sizes, residents)
    found = rebalance(rooms, residents)
    at = {r.vm: r for r in residents}
    for move in found.moves:
        guest = at[move.vm]
        assert guest.node == move.source
        target = next(r for r in rooms_of(sizes, list(at.values())) if r.name == move.target)
        assert target.free.memory_mib >= guest.need.memory_mib and target.free.vcpus >= guest.need.vcpus
        assert not any(target.members.get(mark) for mark in guest.terms.shuns)
        at[move.vm] = Resident(guest.vm, move.target, guest.need, guest.terms, vcpus=guest.vcpus)
    after = rooms_of(sizes, list(at.values()))
    assert found.after.memory + found.after.vcpus == pytest.approx(score(after), abs=1e-6)
    assert found.after.score <= found.before.score + 1e-9
    assert len({move.vm for move in found.moves}) == len(found.moves)


def drawn(sizes: list[tuple[int, int]], rng: random.Random) -> list[Resident]:
    """Guests at random, each where it fits, some with tags and some that shun them."""
    residents: list[Resident] = []
    for i in range(rng.randint(0, 25)):
        need = Need(rng.choice([1, 1, 2, 4]), rng.choice([64, 128, 256, 512]))
        tags, apart = rng.choice([((), ()), ((), ()), (("red",), ()), ((), ("red",))])
        terms = Terms(vm=f"v{i}", tags=tags, apart=apart)
        rooms = rooms_of(sizes, residents)
        fitting = [
            r.name for r in rooms
            if r.free.memory_mib >= need.memory_mib and r.free.vcpus >= need.vcpus
            and not any(r.members.get(mark) for mark in terms.shuns)
        ]  # fmt: skip
        if fitting:
            residents.append(Resident(f"v{i}", rng.choice(fitting[:2]), need, terms, vcpus=need.vcpus))
    return residents


@pytest.mark.parametrize("seed", range(12))
def test_small_pools_come_close_to_the_best_there_is(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [(16, 1024)] * 3
    guests = [(rng.choice([0, 0, 1]), rng.choice([1, 2, 3]), rng.choice([64, 128, 192])) for _ in range(6)]
    rooms, residents = pool(sizes, guests)
    best = min(
        score(rooms_of(sizes, [Resident(r.vm, f"n{n}", r.need) for r, n in zip(residents, places, strict=True)]))
        for places in itertools.product(range(3), repeat=6)
    )
    found = rebalance(rooms, residents, min_gain=1e-6)
    assert found.after.memory + found.after.vcpus <= best + 0.05
