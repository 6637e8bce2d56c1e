"""Which of the server nodes that fit is taken: the order layer two tries them in, and the scores it goes by. Pure.

The same as reservations/pool_place.lua, of a snapshot: for dry runs, capacity and plans. A property test holds the two
together, score by score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.pool.rules import (
    Candidate,
    Need,
    NodeRoom,
    NodeVerdict,
    Shape,
    Terms,
    judge_nodes,
    need_of,
    put_on,
)

CAREFUL = 20
"""While no more server nodes than this take the largest of the mix, every one is looked at."""
_VCPUS_MAX = 65535

Row = tuple[int, NodeRoom]


def tried(candidate: Candidate, verdicts: Sequence[NodeVerdict], need: Need) -> Iterator[NodeVerdict]:
    """The server nodes that take the VM, best first, each with its ``score``: the future VMs of the mix that are lost
    by taking it, weighted (the least wins); None where the order alone decides.

    By the order alone (free memory, vCPUs, name; ``spread`` from the emptiest, ``pack`` from the fullest): without a
    mix, and to spread while more than three quarters of the server nodes still take the largest of the mix.
    """
    fitting = {v.node: v for v in verdicts if not v.why}
    rows = [(_rank(n), n) for n in candidate.nodes if n.schedulable and n.free.vcpus > 0 and n.free.memory_mib > 0]
    size, weights = _look_at(candidate, rows)
    least = need.memory_mib * 65536 + need.vcpus
    rows = sorted((row for row in rows if row[0] >= least), key=lambda row: (row[0], row[1].name),
                  reverse=candidate.order == "spread")  # fmt: skip
    offset = 0
    while page := rows[offset : offset + size]:
        losses = [(_lost(room, need, weights) if weights else None, room.name) for _, room in page]
        if weights:
            losses.sort(key=lambda pair: pair[0] or 0.0)
        yield from (fitting[name]._replace(score=loss) for loss, name in losses if name in fitting)
        offset, size = offset + size, max(size, 8)


def _rank(room: NodeRoom) -> int:
    return room.free.memory_mib * 65536 + min(room.free.vcpus, _VCPUS_MAX)


def _look_at(candidate: Candidate, rows: Sequence[Row]) -> tuple[int, list[tuple[int, int, float, float]]]:
    """How many to weigh at once, and the mix with what a whole VM less of each weighs; no mix: the order decides."""
    if not candidate.mix:
        return 2, []
    takers = [sum(rank >= memory * 65536 + vcpus for rank, _ in rows) for vcpus, memory, _ in candidate.mix]
    largest = max(range(len(takers)), key=lambda i: (candidate.mix[i][1], -i))
    if candidate.order == "spread" and 4 * takers[largest] > 3 * len(rows):
        return 2, []
    if takers[largest] > CAREFUL:
        return 5, [(*entry, 0.1) for entry in candidate.mix]
    return CAREFUL, [(*entry, 300 / max(1, n) ** 3) for entry, n in zip(candidate.mix, takers, strict=True)]


def _lost(room: NodeRoom, need: Need, weights: Sequence[tuple[int, int, float, float]]) -> float:
    """Future VMs, by their share in the mix, that no longer fit: in fractions, and the more in whole ones the scarcer
    their places are."""
    free_vcpus = min(room.free.vcpus, _VCPUS_MAX)
    vcpus_after, memory_after = free_vcpus - need.vcpus, room.free.memory_mib - need.memory_mib
    total = 0.0
    for vcpus, memory, share, whole in weights:
        before = min(free_vcpus / vcpus, room.free.memory_mib / memory)
        after = min(vcpus_after / vcpus, memory_after / memory)
        total = total + (before - after + whole * (before // 1 - after // 1)) * share
    return total


def in_order(candidate: Candidate, verdicts: Sequence[NodeVerdict], shape: Shape, settings: CapacitySettings,
             best: int | None = None) -> list[NodeVerdict]:  # fmt: skip
    """``tried``, as a list of at most ``best``."""
    return list(islice(tried(candidate, verdicts, need_of(shape, settings)), best))


def taken(candidate: Candidate, shape: Shape, terms: Terms, settings: CapacitySettings) -> NodeVerdict | None:
    """The server node layer two would take; None: no room."""
    verdicts = judge_nodes(candidate.nodes, shape, terms, settings)
    return next(tried(candidate, verdicts, need_of(shape, settings)), None)


def with_one_more(candidate: Candidate, shape: Shape, settings: CapacitySettings, terms: Terms) -> Candidate:
    """The domain node after one more VM of ``shape``, on the server node layer two would take: what layer one plans the
    next VM of a bulk request with."""
    found = taken(candidate, shape, terms, settings)
    return put_on(candidate, found.node, shape, settings, terms) if found else candidate
