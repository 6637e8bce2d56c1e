"""Pure decisions about backups: full or increment, what to keep and what to merge, what to prove.

Times are aware datetimes in UTC.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hdcs_tasks.errors import Invalid
from hdcs_tasks.states import BackupState, VmState

CHAIN_MAX = 64
"""Points in a chain; QEMU opens every file of it at once."""

RESTORE_IN_PLACE_IN = frozenset({VmState.STOPPED})
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Point:
    """One point of a VM's chains as the record has it. ``parent``: id of the point it stands on."""

    id: str
    chain: str
    seq: int
    state: BackupState
    domain_node: str
    checkpoint: str | None
    parent: str | None = None
    created_at: datetime = _LONG_AGO
    file_bytes: int = 0
    proven_at: datetime | None = None
    disk_bytes: int = 0


# --- full or increment


@dataclass(frozen=True)
class FullRule:
    """When a chain has had its time: after ``every`` points, or when its increments outgrow ``percent`` of the full."""

    every: int = CHAIN_MAX
    percent: int | None = None


@dataclass(frozen=True)
class Plan:
    """What the next backup is; ``parent`` is None for a full one, and ``why`` says why it is full."""

    kind: str
    seq: int
    parent: Point | None
    why: str


def next_point(
    points: Sequence[Point], *, home: str, full: bool, rule: FullRule | None = None, disk_bytes: int = 0
) -> Plan:
    """The next backup of a VM whose points are given oldest first.

    An increment follows the newest point if that has its checkpoint, lies in the VM's own domain node and is of a disk
    of the present size (``disk_bytes``), and no point of its chain is broken: after a move, a set-back or a growth a
    chain begins anew.
    """
    newest = points[-1] if points else None
    if full:
        return Plan("full", 1, None, "asked for")
    if newest is None:
        return Plan("full", 1, None, "the first of this VM")
    if newest.state is not BackupState.READY or newest.checkpoint is None:
        return Plan("full", 1, None, f"the chain cannot go on: its newest point is {newest.state}")
    if newest.domain_node != home:
        return Plan("full", 1, None, f"the chain lies in {newest.domain_node}")
    if newest.disk_bytes and disk_bytes > newest.disk_bytes:
        return Plan("full", 1, None, f"the disk has grown from {newest.disk_bytes} to {disk_bytes} bytes")
    chain = [p for p in points if p.chain == newest.chain]
    if any(p.state is BackupState.BROKEN for p in chain):
        return Plan("full", 1, None, "the chain cannot go on: a point below is broken")
    why = _outgrown(chain, rule or FullRule())
    if why is not None:
        return Plan("full", 1, None, why)
    return Plan("increment", newest.seq + 1, newest, "follows the newest point")


def _outgrown(chain: Sequence[Point], rule: FullRule) -> str | None:
    if len(chain) >= min(rule.every, CHAIN_MAX):
        return f"the chain has {len(chain)} points"
    full_bytes, inc_bytes = chain[0].file_bytes, sum(p.file_bytes for p in chain[1:])
    if rule.percent is not None and full_bytes and inc_bytes * 100 > rule.percent * full_bytes:
        return f"the increments hold {inc_bytes} bytes, over {rule.percent} % of the full one's {full_bytes}"
    return None


# --- where it lies


def lies_in(places: Mapping[str, BackupState], domain_node: str) -> bool:
    """Whether a point can be restored from what ``domain_node`` holds of it."""
    return places.get(domain_node) is BackupState.READY


def restore_in(
    places: Mapping[str, BackupState], readable: Collection[str], wanted: str | None
) -> tuple[str, bool] | None:
    """Where a point is restored, and whether it must be copied there first; None: nowhere.

    ``places``: domain nodes that hold it, the first one first; ``readable``: those whose server nodes are up. What is
    ``wanted`` is kept to; else the first good place.
    """
    good = [place for place, state in places.items() if state is BackupState.READY and place in readable]
    if wanted is not None:
        return (wanted, wanted not in good) if good and wanted in readable else None
    return (good[0], False) if good else None


# --- what to keep


@dataclass(frozen=True)
class Keep:
    """How many points stay: the newest ``last``, and the newest of each of so many days, ISO weeks and months."""

    last: int = 1
    daily: int = 0
    weekly: int = 0
    monthly: int = 0

    def __post_init__(self) -> None:
        numbers = (self.last, self.daily, self.weekly, self.monthly)
        if not all(type(n) is int and 0 <= n <= 10_000 for n in numbers):
            raise Invalid(f"{self} does not say how many points to keep", next="Each number is 0 to 10000")


_PERIODS: dict[str, Callable[[datetime], tuple[int, ...]]] = {
    "daily": lambda at: (at.year, at.month, at.day),
    "weekly": lambda at: at.isocalendar()[:2],
    "monthly": lambda at: (at.year, at.month),
}


def kept(points: Collection[Point], keep: Keep) -> set[str]:
    """Ids of the points ``keep`` asks for, among the ready ones. The newest is always one: increments follow it.

    And those it would ask for if none were broken: a broken one may be mended, from a second copy or when its base
    image is back, until it would go anyway.
    """
    ready = [p for p in points if p.state is BackupState.READY]
    return _kept_of(ready, keep) | _kept_of([*ready, *(p for p in points if p.state is BackupState.BROKEN)], keep)


def _kept_of(points: Collection[Point], keep: Keep) -> set[str]:
    ready = sorted(points, key=lambda p: (p.created_at, p.seq), reverse=True)
    found = {p.id for p in ready[: max(1, keep.last)]}
    for name, period_of in _PERIODS.items():
        seen: list[tuple[int, ...]] = []
        for point in ready:
            period = period_of(point.created_at)
            if len(seen) < getattr(keep, name) and period not in seen:
                seen.append(period)
                found.add(point.id)
    return found


@dataclass(frozen=True)
class Merge:
    """``point`` is to stand on ``below`` (None: on the base image, as a full one) instead of on its parent."""

    point: str
    below: str | None


@dataclass(frozen=True)
class Prune:
    """``merges`` first, in their order; then ``drop``, in its order: later points of a chain before earlier ones."""

    keep: frozenset[str]
    merges: tuple[Merge, ...] = field(default=())
    drop: tuple[Point, ...] = field(default=())


def plan_prune(points: Collection[Point], keep: Keep, *, merge: bool) -> Prune:
    """What of one VM's points can go. Whatever stays, stays whole: every point a kept one stands on stays too.

    ``merge``: points in the middle of a chain are taken out by merging them into the next kept one.
    """
    by_id = {p.id: p for p in points}
    wanted = kept(points, keep)
    # A backup under way stands on its parent; one being deleted is somebody else's business.
    held = wanted | {p.id for p in points if p.state in (BackupState.CREATING, BackupState.DELETING)}
    held |= {p.parent for p in points if p.state is BackupState.CREATING and p.parent is not None}
    merges: list[Merge] = []
    needed: set[str] = set()
    for point in sorted((by_id[i] for i in held if i in by_id), key=lambda p: (p.chain, p.seq)):
        needed.add(point.id)
        path = _below(point, by_id, held)
        between = path[:-1] if path and path[-1].id in held else path
        can = merge and all(p.state is BackupState.READY for p in (point, *path))
        if can and between and _is_whole(path, held):
            merges.append(Merge(point.id, path[-1].id if path[-1].id in held else None))
        else:
            needed |= {p.id for p in path}
    going = [p for p in points if p.id not in needed and p.state in (BackupState.READY, BackupState.BROKEN)]
    return Prune(frozenset(wanted), tuple(merges), tuple(sorted(going, key=lambda p: (p.chain, -p.seq))))


def _below(point: Point, by_id: dict[str, Point], held: Collection[str]) -> list[Point]:
    """The points under ``point``, nearest first, down to the first held one or the end of the chain."""
    path: list[Point] = []
    while point.parent is not None and point.parent in by_id:
        point = by_id[point.parent]
        path.append(point)
        if point.id in held:
            break
    return path


def _is_whole(path: Sequence[Point], held: Collection[str]) -> bool:
    """Whether the path ends on a held point or a full one: else a link is missing, and nothing may be merged."""
    return path[-1].id in held or path[-1].parent is None


def bandwidth_share(total_mib_s: int | None, concurrency: int) -> int | None:
    """What each backup of a policy may copy, so that all that run at once on one storage stay below the total."""
    return None if total_mib_s is None else max(1, total_mib_s // concurrency)


# --- what to prove


def choose_drills(by_vm: Mapping[str, Sequence[Point]], count: int) -> list[Point]:
    """The points to prove next: of each VM the newest ready one, VMs never or longest ago proven first."""
    candidates: list[tuple[datetime, Point]] = []
    for points in by_vm.values():
        ready = [p for p in points if p.state is BackupState.READY]
        if ready:
            newest = max(ready, key=lambda p: (p.created_at, p.seq))
            candidates.append((max(p.proven_at or _LONG_AGO for p in points), newest))
    candidates.sort(key=lambda each: (each[0], each[1].id))
    return [point for _, point in candidates[: max(0, count)]]
