"""When an alarm is raised and cleared: thresholds, hysteresis, duration; for every signal a flapping one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.config import AlarmSettings
from hdcs_tasks.monitor.alarm_rules import (
    Known,
    Rule,
    Signal,
    Verdict,
    judge,
    late_sweeps,
    n_plus_one_gone,
    notice_backoff_s,
    rules,
)

RULE = Rule("warning", 90.0, 80.0, 60.0, 120.0, "")


def follow(values: list[float | None], rule: Rule = RULE, every_s: float = 10.0) -> list[Verdict]:
    """The verdicts on a series of values, kept as the record keeps them."""
    state: str | None = None
    since = ok_since = 0.0
    ok = False
    found = []
    for number, value in enumerate(values):
        at = number * every_s
        known = None if state is None else Known(state, at - since, at - ok_since if ok else None)
        verdict = judge(Signal("k", "s", value, ""), known, rule)
        found.append(verdict)
        if verdict in (Verdict.BEGIN, Verdict.RAISE) and state is None:
            since = at
        if verdict is Verdict.BEGIN:
            state = "pending"
        elif verdict is Verdict.RAISE:
            state, ok = "raised", False
        elif verdict is Verdict.EASES:
            ok_since, ok = (ok_since if ok else at), True
        elif verdict is Verdict.GOES_ON:
            ok = False
        elif verdict in (Verdict.CLEAR, Verdict.FORGET):
            state, ok = None, False
    return found


def test_it_is_raised_after_its_time_and_cleared_after_its_time() -> None:
    found = follow([95.0] * 8 + [50.0] * 14)
    assert found.index(Verdict.RAISE) == 6 and found.index(Verdict.CLEAR) == 8 + 12
    assert found.count(Verdict.RAISE) == found.count(Verdict.CLEAR) == 1


def test_a_peak_is_forgotten() -> None:
    assert follow([95.0] * 5 + [10.0]) == [Verdict.BEGIN, *[Verdict.GOES_ON] * 4, Verdict.FORGET]


def test_what_swings_about_its_threshold_lasts_and_is_raised_once() -> None:
    found = follow([91.0, 85.0] * 6)
    assert found[0] is Verdict.BEGIN and found.count(Verdict.RAISE) == 1 and found.index(Verdict.RAISE) == 6
    assert Verdict.FORGET in follow([91.0, 79.0] * 6) and Verdict.RAISE not in follow([91.0, 79.0] * 6)


def test_between_the_thresholds_nothing_changes_and_what_is_unknown_neither() -> None:
    found = follow([95.0] * 7 + [85.0] * 100 + [None] * 100)
    assert found.count(Verdict.RAISE) == 1 and Verdict.CLEAR not in found


def test_a_fact_is_raised_at_once() -> None:
    lost = rules(AlarmSettings())["node_lost"]
    assert judge(Signal("node_lost", "node1", 1.0, ""), None, lost) is Verdict.RAISE
    assert judge(Signal("node_lost", "node1", 0.0, ""), Known("acknowledged", 9, None), lost) is Verdict.EASES


@given(st.lists(st.integers(1, 10), min_size=2, max_size=60))
def test_a_flapping_signal_raises_once_and_clears_once(lengths: list[int]) -> None:
    """Once it is raised, no flapping shorter than the time to clear raises it again."""
    flapping = [value for number, n in enumerate(lengths) for value in [20.0 if number % 2 == 0 else 99.0] * n]
    found = follow([95.0] * 8 + flapping + [20.0] * 30)
    assert found.count(Verdict.RAISE) == 1 and found.count(Verdict.CLEAR) == 1


def test_every_rule_clears_below_where_it_raises() -> None:
    for kind, rule in rules(AlarmSettings()).items():
        assert rule.clear_below <= rule.raise_at and rule.next, kind


@pytest.mark.parametrize(
    ("nodes", "gone"),
    [
        ([(8, 8000, 8, 8000)], False),  # one alone never had it
        ([(8, 8000, 4, 4000), (8, 8000, 4, 4000)], False),
        ([(8, 8000, 4, 3999), (8, 8000, 4, 4000)], True),
        ([(8, 8000, 0, 8000), (8, 8000, 7, 8000)], True),
        ([(8, 8000, 2, 2000), (8, 8000, 2, 2000), (8, 8000, 4, 4000)], False),
        ([(8, 8000, -2, -500), (8, 8000, 8, 8000)], True),  # overcommitted by a changed rule
    ],
)
def test_n_plus_one(nodes: list[tuple[int, int, int, int]], gone: bool) -> None:
    assert n_plus_one_gone(nodes) is gone


def test_a_sweep_is_late_after_three_periods_and_some_patience() -> None:
    found = late_sweeps({"a": 100.0, "b": 169.9}, {"a": 10.0, "b": 10.0, "never": 10.0}, 200.0, 5.0, 0.0)
    assert {s.subject: s.value for s in found} == {"a": 1.0, "b": 1.0, "never": 0.0}
    found = late_sweeps({"b": 170.0}, {"b": 10.0, "never": 10.0}, 200.0, 31.0, 0.0)
    assert {s.subject: s.value for s in found} == {"b": 0.0, "never": 1.0}


def test_notices_are_tried_in_growing_pauses() -> None:
    pauses = [notice_backoff_s(n) for n in range(1, 40)]
    assert pauses[0] == 10 and pauses == sorted(pauses) and pauses[-1] == 3600
