"""Which live migrations even the load of a pool: pure, and fast for a thousand server nodes.

The score is the one Ganeti's hbal goes by, without disks: the standard deviation of the free share of memory and of
vCPUs over the server nodes, and the share of them whose largest guest would find no room if they were lost (N+1). Lower
is better. Each round takes the move (or, where none helps, the exchange of two guests) that lowers it most, looking at
the fullest and the emptiest server nodes only; guests of one size on one server node are one candidate.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hdcs_tasks.pool.rules import Need, NodeRoom, Terms

LOOKED_AT = 5
"""How many of the fullest and of the emptiest server nodes a round looks at, by memory and by vCPUs."""
MIN_GAIN = 1e-3
"""A move that lowers the score by less is not worth a migration (the share of one guest of average size in a pool of a
thousand server nodes: ``gain_of``)."""
N_PLUS_ONE_WEIGHT = 1.0


@dataclass(frozen=True, slots=True)
class Resident:
    """A guest at rest on its server node. ``need``: its claim; ``movable`` False: it stays (pinned, not running, busy);
    ``max_vcpus``: vCPUs of the guest itself, which a server node's hypervisor must bear."""

    vm: str
    node: str
    need: Need
    terms: Terms = field(default_factory=Terms)
    movable: bool = True
    vcpus: int = 1


class Move(NamedTuple):
    """One live migration; ``score``: the pool's after it. An exchange is two moves."""

    vm: str
    source: str
    target: str
    score: float


class Balance(NamedTuple):
    """How even a pool is: the score, its parts, and how many server nodes have a guest that fits nowhere else."""

    score: float
    memory: float
    vcpus: float
    n_plus_one: int


class Rebalance(NamedTuple):
    before: Balance
    after: Balance
    moves: tuple[Move, ...]


@dataclass(slots=True)
class _Node:
    """A server node while the plan is made; amounts are what is free."""

    name: str
    vcpus: int
    memory: int
    total_vcpus: int
    total_memory: int
    ips: int
    max_vcpus: int
    tags: frozenset[str]
    marks: Counter[str]
    guests: dict[tuple[Need, Terms, int], list[str]] = field(default_factory=dict)
    largest: list[int] = field(default_factory=list)

    @property
    def shares(self) -> tuple[float, float]:
        return self.memory / self.total_memory, self.vcpus / self.total_vcpus

    def takes(self, need: Need, terms: Terms, vcpus: int) -> bool:
        if self.memory < need.memory_mib or self.vcpus < need.vcpus or self.ips < 1:
            return False
        if self.max_vcpus and vcpus > self.max_vcpus:
            return False
        return all(tag in self.tags for tag in terms.node_tags) and not any(self.marks[mark] for mark in terms.shuns)


class _Pool:
    """The pool while the plan is made: sums for the score in constant time, server nodes ranked by what is free."""

    def __init__(self, rooms: Sequence[NodeRoom], residents: Sequence[Resident]) -> None:
        self.nodes = {
            room.name: _Node(
                room.name, room.free.vcpus, room.free.memory_mib, room.total_vcpus, room.total_memory_mib,
                1 << 30 if room.free.ips is None else room.free.ips, room.max_vcpus, frozenset(room.tags),
                Counter({mark: len(vms) for mark, vms in room.members.items()}),
            )
            for room in rooms if room.schedulable and room.total_vcpus and room.total_memory_mib
        }  # fmt: skip
        sought = {tag for guest in residents for tag in guest.terms.together}
        for guest in residents:
            node = self.nodes.get(guest.node)
            if node is None:
                continue
            insort(node.largest, guest.need.memory_mib)
            stays = guest.terms.pin or guest.terms.together or sought.intersection(guest.terms.tags)
            if guest.movable and not stays:
                node.guests.setdefault(_kind(guest), []).append(guest.vm)
        shares = [node.shares for node in self.nodes.values()]
        self.sums = [sum(s[i] for s in shares) for i in (0, 1)]
        self.squares = [sum(s[i] ** 2 for s in shares) for i in (0, 1)]
        self.ranked = [sorted((node.shares[i], name) for name, node in self.nodes.items()) for i in (0, 1)]
        self.roomiest = sorted((node.memory, name) for name, node in self.nodes.items())
        self.alone = self._count_alone()

    def _count_alone(self) -> int:
        """How many server nodes have a guest that would find no room elsewhere."""
        (second, _), (first, roomiest) = ([(0, "")] * 2 + self.roomiest)[-2:]
        return sum(
            bool(node.largest) and node.largest[-1] > (second if node.name == roomiest else first)
            for node in self.nodes.values()
        )

    def balance(self) -> Balance:
        memory, vcpus = (self._deviation(self.sums[i], self.squares[i]) for i in (0, 1))
        return Balance(self._score(memory, vcpus), memory, vcpus, self.alone)

    def _deviation(self, total: float, squares: float) -> float:
        count = len(self.nodes)
        return math.sqrt(max(0.0, squares / count - (total / count) ** 2)) if count else 0.0

    def _score(self, memory: float, vcpus: float) -> float:
        return memory + vcpus + N_PLUS_ONE_WEIGHT * self.alone / max(1, len(self.nodes))

    def score_with(self, changes: Sequence[tuple[_Node, int, int]]) -> float:
        """The score if these server nodes had so many MiB and vCPUs more free (N+1 as it stands)."""
        sums, squares = list(self.sums), list(self.squares)
        for node, memory, vcpus in changes:
            for i, (was, now) in enumerate(zip(
                node.shares,
                ((node.memory + memory) / node.total_memory, (node.vcpus + vcpus) / node.total_vcpus), strict=True,
            )):  # fmt: skip
                sums[i] += now - was
                squares[i] += now * now - was * was
        return self.score_of(sums[0], squares[0], sums[1], squares[1])

    def score_of(self, sum_m: float, square_m: float, sum_c: float, square_c: float) -> float:
        """The score with these sums and sums of squares of the free shares (N+1 as it stands)."""
        return self._score(self._deviation(sum_m, square_m), self._deviation(sum_c, square_c))

    def ends(self) -> tuple[list[_Node], list[_Node]]:
        """The fullest and the emptiest server nodes, by memory and by vCPUs."""
        full = dict.fromkeys(name for ranked in self.ranked for _, name in ranked[:LOOKED_AT])
        empty = dict.fromkeys(name for ranked in self.ranked for _, name in ranked[-LOOKED_AT:][::-1])
        return [self.nodes[name] for name in full], [self.nodes[name] for name in empty]

    def put(self, node: _Node, memory: int, vcpus: int) -> None:
        """So much more is free there."""
        for i in (0, 1):
            ranked = self.ranked[i]
            del ranked[bisect_left(ranked, (node.shares[i], node.name))]
            self.sums[i] -= node.shares[i]
            self.squares[i] -= node.shares[i] ** 2
        del self.roomiest[bisect_left(self.roomiest, (node.memory, node.name))]
        node.memory += memory
        node.vcpus += vcpus
        insort(self.roomiest, (node.memory, node.name))
        for i in (0, 1):
            insort(self.ranked[i], (node.shares[i], node.name))
            self.sums[i] += node.shares[i]
            self.squares[i] += node.shares[i] ** 2

    def move(self, source: _Node, target: _Node, kind: tuple[Need, Terms, int]) -> str:
        """Carry a guest of this kind over; which it was. It is not offered again: no guest moves twice."""
        waiting = source.guests[kind]
        vm = waiting.pop()
        if not waiting:
            del source.guests[kind]
        self._carry(source, target, kind)
        return vm

    def undo(self, source: _Node, target: _Node, kind: tuple[Need, Terms, int], vm: str) -> None:
        source.guests.setdefault(kind, []).append(vm)
        self._carry(target, source, kind)

    def _carry(self, source: _Node, target: _Node, kind: tuple[Need, Terms, int]) -> None:
        need, terms, _ = kind
        for mark in terms.marks:
            source.marks[mark] -= 1
            target.marks[mark] += 1
        del source.largest[bisect_left(source.largest, need.memory_mib)]
        insort(target.largest, need.memory_mib)
        self.put(source, need.memory_mib, need.vcpus)
        self.put(target, -need.memory_mib, -need.vcpus)
        source.ips += 1
        target.ips -= 1
        self.alone = self._count_alone()


def _kind(guest: Resident) -> tuple[Need, Terms, int]:
    """Guests of one kind are the same to the plan: their size, and what they are to others."""
    terms = Terms(node_tags=guest.terms.node_tags, apart=guest.terms.apart, tags=guest.terms.tags)
    return guest.need, terms, guest.vcpus


def gain_of(nodes: int) -> float:
    """The least a move must lower the score by in a pool of this size: one guest moves it less, the more there are."""
    return MIN_GAIN / max(1.0, nodes / 10)


def rebalance(
    rooms: Sequence[NodeRoom], residents: Sequence[Resident], *, max_moves: int = 1000, min_gain: float | None = None
) -> Rebalance:
    """The moves, in an order in which each finds room, that even the load of one pool; at most ``max_moves``.

    Server nodes that drain are neither source nor target. A guest that is pinned, has company to stay with, or is
    company to another, stays.
    """
    pool = _Pool(rooms, residents)
    before = pool.balance()
    gain = gain_of(len(pool.nodes)) if min_gain is None else min_gain
    moves: list[Move] = []
    barred: set[_Tried] = set()
    while len(moves) < max_moves and len(pool.nodes) > 1:
        found = _best_move(pool, gain, barred)
        if found is None and max_moves - len(moves) > 1:
            found = _best_exchange(pool, gain, barred)
        if found is None:
            break
        score = pool.balance().score
        done = [(pool.move(*step), step) for step in found]
        if pool.balance().score > score - gain:
            # Evener, but a large guest would have nowhere to go any more.
            for vm, step in reversed(done):
                pool.undo(*step, vm)
            barred.add(_tried(found))
            continue
        barred.clear()
        moves += [
            Move(vm, source.name, target.name, round(pool.balance().score, 6)) for vm, (source, target, _) in done
        ]
    return Rebalance(before, pool.balance(), tuple(moves))


_Step = tuple[_Node, _Node, tuple[Need, Terms, int]]
_Tried = tuple[tuple[str, str, tuple[Need, Terms, int]], ...]


def _tried(steps: Sequence[_Step]) -> _Tried:
    return tuple((source.name, target.name, kind) for source, target, kind in steps)


def _best_move(pool: _Pool, gain: float, barred: set[_Tried]) -> list[_Step] | None:
    full, empty = pool.ends()
    targets = [(node, *node.shares) for node in empty]
    best, found = pool.balance().score - gain, None
    for source in full:
        was = source.shares
        for kind in source.guests:
            need, terms, vcpus = kind
            memory, cpu = was[0] + need.memory_mib / source.total_memory, was[1] + need.vcpus / source.total_vcpus
            # The sums as they are without this guest on its source; each target adds its part.
            sum_m, sum_c = pool.sums[0] + memory - was[0], pool.sums[1] + cpu - was[1]
            square_m = pool.squares[0] + memory * memory - was[0] ** 2
            square_c = pool.squares[1] + cpu * cpu - was[1] ** 2
            for target, free_m, free_c in targets:
                new_m = free_m - need.memory_mib / target.total_memory
                new_c = free_c - need.vcpus / target.total_vcpus
                score = pool.score_of(
                    sum_m + new_m - free_m, square_m + new_m * new_m - free_m * free_m,
                    sum_c + new_c - free_c, square_c + new_c * new_c - free_c * free_c,
                )  # fmt: skip
                if score >= best or target is source or not target.takes(need, terms, vcpus):
                    continue
                if not barred or _tried([(source, target, kind)]) not in barred:
                    best, found = score, [(source, target, kind)]
    return found


def _best_exchange(pool: _Pool, gain: float, barred: set[_Tried]) -> list[_Step] | None:
    """Two guests for each other, where no single move helps; twice the migrations, so twice the gain."""
    full, empty = pool.ends()
    best, found = pool.balance().score - 2 * gain, None
    for source in full:
        for target in empty:
            if target is source:
                continue
            for ours in source.guests:
                if not target.takes(*ours):
                    continue
                for theirs in target.guests:
                    memory, vcpus = ours[0].memory_mib - theirs[0].memory_mib, ours[0].vcpus - theirs[0].vcpus
                    if not (memory or vcpus) or theirs[1].shuns or not source.takes(*theirs):
                        continue
                    score = pool.score_with([(source, memory, vcpus), (target, -memory, -vcpus)])
                    steps = [(source, target, ours), (target, source, theirs)]
                    if score < best and (not barred or _tried(steps) not in barred):
                        best, found = score, steps
    return found
