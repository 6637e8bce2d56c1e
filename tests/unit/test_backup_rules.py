"""Rules of backups: what follows what, what stays, when, and that no kept point ever loses what it stands on."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.backup import rules
from hdcs_tasks.backup.rules import (
    FullRule,
    Keep,
    Point,
    choose_drills,
    kept,
    next_point,
    plan_prune,
)
from hdcs_tasks.errors import Invalid
from hdcs_tasks.states import BackupState

NOON = datetime(2026, 3, 11, 12, 0, tzinfo=UTC)  # a Wednesday
READY = BackupState.READY


def point(name: str, *, seq: int = 1, parent: str | None = None, days: float = 0, **more: object) -> Point:
    chain = name.split("-")[0]
    made = Point(name, chain, seq, READY, "east", f"hdcs-{name}", parent, NOON + timedelta(days=days), 100)
    return replace(made, **more)  # type: ignore[arg-type]


def chain(name: str, length: int, days: float = 0.0) -> list[Point]:
    return [
        point(f"{name}-{n}", seq=n, parent=f"{name}-{n - 1}" if n > 1 else None, days=days + n)
        for n in range(1, length + 1)
    ]


@pytest.mark.parametrize(
    ("points", "options", "kind", "why"),
    [
        ([], {}, "full", "the first"),
        (chain("a", 2), {}, "increment", "follows"),
        (chain("a", 2), {"full": True}, "full", "asked for"),
        (chain("a", 2), {"home": "west"}, "full", "lies in east"),
        ([point("a-1", state=BackupState.BROKEN)], {}, "full", "is broken"),
        ([point("a-1", checkpoint=None)], {}, "full", "cannot go on"),
        (chain("a", 3), {"rule": FullRule(every=3)}, "full", "3 points"),
        (chain("a", 2), {"rule": FullRule(every=3)}, "increment", "follows"),
        (chain("a", 64), {}, "full", "64 points"),
        (chain("a", 3), {"rule": FullRule(percent=199)}, "full", "over 199 %"),
        (chain("a", 3), {"rule": FullRule(percent=200)}, "increment", "follows"),
        (chain("a", 9) + chain("b", 2, 20), {"rule": FullRule(every=5)}, "increment", "follows"),
    ],
)
def test_the_next_point(points: list[Point], options: dict[str, object], kind: str, why: str) -> None:
    found = next_point(points, **({"home": "east", "full": False} | options))  # type: ignore[arg-type]
    assert (found.kind, found.parent) == (kind, points[-1] if kind == "increment" else None)
    assert why in found.why


def test_what_is_kept() -> None:
    points = [point(f"p-{n}", days=-n / 2) for n in range(60)]  # two a day, 30 days
    assert kept(points, Keep(last=3)) == {"p-0", "p-1", "p-2"}
    assert kept(points, Keep(last=0)) == {"p-0"}, "the newest always: increments follow it"
    daily = kept(points, Keep(last=0, daily=4))
    assert daily == {"p-0", "p-2", "p-4", "p-6"} or daily == {"p-0", "p-1", "p-3", "p-5"}
    weekly = kept(points, Keep(last=0, weekly=3))
    assert len(weekly) == 3
    days = sorted(p.created_at.isocalendar()[1] for p in points if p.id in weekly)
    assert days == [9, 10, 11]
    assert len(kept(points, Keep(last=0, monthly=12))) == 2
    broken = [replace(points[0], state=BackupState.BROKEN), *points[1:]]
    assert kept(broken, Keep(last=2)) == {"p-0", "p-1", "p-2"}, "a broken one takes no good one's place"


def test_a_chain_goes_from_its_end_or_whole() -> None:
    points = chain("a", 4) + chain("b", 3, 10)
    plan = plan_prune(points, Keep(last=2), merge=False)
    assert plan.keep == {"b-2", "b-3"}
    assert [p.id for p in plan.drop] == ["a-4", "a-3", "a-2", "a-1"]
    assert plan.merges == ()
    merged = plan_prune(points, Keep(last=2), merge=True)
    assert [(m.point, m.below) for m in merged.merges] == [("b-2", None)]
    assert [p.id for p in merged.drop] == ["a-4", "a-3", "a-2", "a-1", "b-1"]


def test_a_backup_under_way_keeps_what_it_stands_on() -> None:
    points = chain("a", 3)
    points.append(replace(points[2], id="a-4", seq=4, parent="a-3", state=BackupState.CREATING))
    newer = [*points, point("b-1", days=50)]
    for merge in (False, True):
        dropped = {p.id for p in plan_prune(newer, Keep(last=1), merge=merge).drop}
        assert not dropped & {"a-3", "a-4"}


def test_a_broken_point_stays_as_long_as_if_it_were_good() -> None:
    """It may be mended; until then the newest good one stays besides, and nothing is merged across it."""
    full, broken, newest = (point(name, days=day) for day, name in enumerate(("a-1", "b-1", "c-1")))
    points = [full, replace(broken, state=BackupState.BROKEN), replace(newest, state=BackupState.BROKEN)]
    assert kept(points, Keep(last=2)) == {"a-1", "b-1", "c-1"}
    assert [p.id for p in plan_prune(points, Keep(last=1), merge=False).drop] == ["b-1"]
    inside = chain("a", 4)
    inside[1] = replace(inside[1], state=BackupState.BROKEN)
    plan = plan_prune(inside, Keep(last=1), merge=True)
    assert (plan.merges, plan.drop) == ((), ())


POINTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # how far down the chain its parent is; 0 begins a new chain
        st.sampled_from([READY, READY, READY, BackupState.BROKEN, BackupState.CREATING, BackupState.DELETING]),
        st.integers(1, 400_000),  # minutes since the one before
    ),
    max_size=14,
)
KEEP = st.builds(Keep, st.integers(0, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))


def build(rows: list[tuple[int, BackupState, int]]) -> list[Point]:
    points: list[Point] = []
    at = NOON
    for number, (up, state, minutes) in enumerate(rows):
        at += timedelta(minutes=minutes)
        parent = points[-1] if up and points else None
        if parent is None:
            points.append(Point(f"p{number}", f"c{number}", 1, state, "east", "x", None, at))
        else:
            seq = parent.seq + up  # numbers are missing where points were merged away
            points.append(Point(f"p{number}", parent.chain, seq, state, "east", "x", parent.id, at))
    return points


@given(POINTS, KEEP, st.booleans())
def test_a_kept_point_never_loses_what_it_stands_on(
    rows: list[tuple[int, BackupState, int]], keep: Keep, merge: bool
) -> None:
    """Carried out on a model of the repository: a point is its own change and its parent; content is the whole path."""
    points = build(rows)
    files = {p.id: (frozenset({p.id}), p.parent) for p in points}

    def content(name: str | None) -> frozenset[str]:
        return frozenset() if name is None else files[name][0] | content(files[name][1])

    before = {p.id: content(p.id) for p in points}
    plan = plan_prune(points, keep, merge=merge)
    for each in plan.merges:
        files[each.point] = (before[each.point] - content(each.below), each.below)
    for gone in plan.drop:
        assert not [n for n, (_, parent) in files.items() if parent == gone.id], "something stands on it"
        del files[gone.id]
    assert set(plan.keep) <= set(files)
    assert plan.keep == kept(points, keep)
    for name in files:
        assert content(name) == before[name]
    ready = [p for p in points if p.state is READY]
    if ready:
        assert ready[-1].id in files
    if merge and all(p.state is READY for p in points):
        assert set(files) == plan.keep


def test_numbers_that_say_nothing() -> None:
    with pytest.raises(Invalid):
        Keep(last=-1)


def test_what_to_prove_next() -> None:
    long_ago, lately = NOON - timedelta(days=90), NOON - timedelta(days=2)
    by_vm = {
        "never": chain("n", 2),
        "lately": [point("l-1", proven_at=lately), point("l-2", days=1)],
        "long ago": [point("o-1", proven_at=long_ago), point("o-2", days=1, state=BackupState.BROKEN)],
        "nothing": [],
    }
    assert [p.id for p in choose_drills(by_vm, 9)] == ["n-2", "o-1", "l-2"]
    assert [p.id for p in choose_drills(by_vm, 1)] == ["n-2"]
    assert choose_drills(by_vm, 0) == []


# --- where and how fast


@pytest.mark.parametrize(
    ("places", "up", "wanted", "found"),
    [
        ({"east": "ready"}, {"east"}, None, ("east", False)),
        ({"east": "ready", "west": "ready"}, {"west"}, None, ("west", False)),
        ({"east": "broken", "west": "ready"}, {"east", "west"}, None, ("west", False)),
        ({"east": "broken", "west": "broken"}, {"east", "west"}, None, None),
        ({"east": "ready"}, {"west"}, None, None),
        ({"east": "ready"}, {"east", "west"}, "west", ("west", True)),
        ({"east": "ready", "west": "ready"}, {"east", "west"}, "west", ("west", False)),
        ({"east": "ready", "west": "broken"}, {"east", "west"}, "west", ("west", True)),
        ({"east": "ready"}, {"west"}, "west", None),
        ({"east": "ready"}, {"east"}, "west", None),
    ],
)
def test_where_a_point_is_restored(
    places: dict[str, str], up: set[str], wanted: str | None, found: tuple[str, bool] | None
) -> None:
    states = {place: BackupState(state) for place, state in places.items()}
    assert rules.restore_in(states, up, wanted) == found


def test_the_bandwidth_of_a_storage_is_shared() -> None:
    assert rules.bandwidth_share(None, 4) is None
    assert rules.bandwidth_share(100, 4) == 25
    assert rules.bandwidth_share(2, 4) == 1


def test_a_grown_disk_begins_a_new_chain() -> None:
    last = rules.Point("p", "c", 1, BackupState.READY, "east", "hdcs-p", disk_bytes=10)
    assert rules.next_point([last], home="east", full=False, disk_bytes=10).kind == "increment"
    assert rules.next_point([last], home="east", full=False, disk_bytes=11).kind == "full"
    assert rules.next_point([last], home="east", full=False).kind == "increment", "its size is not known"
