"""What becomes of a step, for every combination of what can be known of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.errors import BY_CODE
from hdcs_tasks.operations.rules import (
    REPUBLISH_AFTER_S,
    UNKNOWN_AFTER_S,
    WAITING,
    StepFacts,
    Verdict,
    attempts_spent,
    backoff_s,
    bulk_percent,
    is_retryable,
    is_touched,
    judge,
    operation_percent,
)

ages = st.floats(0, 100_000)
facts = st.builds(
    StepFacts, spent=st.integers(1, 12), attempts_max=st.integers(1, 10), known=st.booleans(), holder=st.booleans(),
    leased=st.booleans(), done=st.booleans(), age_s=ages, done_s=ages, lease_ttl_s=st.floats(0.1, 600),
)  # fmt: skip


@given(facts)
def test_whoever_may_be_at_work_is_left_alone(f: StepFacts) -> None:
    if f.known and f.holder and f.leased and not f.done:
        assert judge(f) is Verdict.LEAVE


@given(facts)
def test_a_fresh_message_is_left_alone(f: StepFacts) -> None:
    if f.age_s <= UNKNOWN_AFTER_S and not f.holder and not f.done:
        assert judge(f) is Verdict.LEAVE


@given(facts)
def test_a_finished_executor_is_waited_for_however_long_it_worked(f: StepFacts) -> None:
    if f.known and f.done and f.done_s <= 10 * f.lease_ttl_s:
        assert judge(f) is Verdict.LEAVE


@given(facts)
def test_a_new_attempt_only_where_no_older_one_can_go_on(f: StepFacts) -> None:
    if judge(f) in (Verdict.NEW_ATTEMPT, Verdict.GIVE_UP):
        assert not f.known or f.done or (f.holder and not f.leased)


@given(facts)
def test_the_same_attempt_is_sent_again_only_while_it_can_be_claimed(f: StepFacts) -> None:
    if judge(f) is Verdict.SEND_AGAIN:
        assert f.known
        assert not f.holder
        assert not f.done
        assert f.age_s > REPUBLISH_AFTER_S


@given(facts)
def test_attempts_are_capped(f: StepFacts) -> None:
    verdict = judge(f)
    if verdict is Verdict.NEW_ATTEMPT:
        assert f.spent < f.attempts_max
    if verdict is Verdict.GIVE_UP:
        assert f.spent >= f.attempts_max


@given(facts)
def test_no_step_is_left_for_ever(f: StepFacts) -> None:
    from dataclasses import replace

    assert judge(replace(f, leased=False, age_s=1e9, done_s=1e9)) is not Verdict.LEAVE


codes = st.sampled_from([*BY_CODE, None])
entries = st.lists(st.tuples(st.integers(1, 9), codes), max_size=30)


@given(entries)
def test_an_attempt_counts_once_and_a_wait_never(seen: list[tuple[int, str | None]]) -> None:
    history: list[dict[str, Any]] = [{"attempt": a, "error": {"code": c} if c else None} for a, c in seen]
    spent = attempts_spent(history)
    assert spent == len({a for a, c in seen if c not in WAITING})
    assert attempts_spent(history + history) == spent


@given(st.integers(0, 10_000))
def test_backoff_grows_to_its_cap(attempt: int) -> None:
    assert 2.0 <= backoff_s(attempt) <= backoff_s(attempt + 1) <= 60.0


def test_retry_or_not_is_the_class_of_the_error() -> None:
    assert {code for code in BY_CODE if is_retryable({"code": code})} == {
        "unavailable", "no_capacity", "unreachable", "rebuild_pending", "outcome_unknown",
    }  # fmt: skip
    assert not is_retryable({"code": "of another version"})


def test_a_first_attempt_has_touched_nothing() -> None:
    assert not is_touched(1, "node1")
    assert not is_touched(2, None)
    assert is_touched(2, "node1")


@given(st.lists(st.floats(0, 100), max_size=50))
def test_a_parent_is_as_far_as_its_children_on_average(children: list[float]) -> None:
    assert 0 <= bulk_percent(children) <= 100.001


MOVE = {"prepare": 5.0, "move|copy": 80.0, "finish": 15.0}


@pytest.mark.parametrize(
    ("steps", "percent", "expected"),
    [
        (["prepare"], 0.0, 0.0),
        (["prepare"], 100.0, 5.0),
        (["prepare", "move"], 0.0, 5.0),
        (["prepare", "copy"], 50.0, 45.0),
        (["prepare", "move", "finish"], 0.0, 85.0),
        (["prepare", "move", "finish"], 100.0, 99.0),
        (["prepare", "move", "undo"], 50.0, 85.0),
        (["prepare", "prepare"], 40.0, 2.0),
    ],
)
def test_progress_of_an_operation_follows_its_plan(steps: list[str], percent: float, expected: float) -> None:
    assert operation_percent(MOVE, steps, percent) == pytest.approx(expected)


def test_without_a_plan_the_last_step_is_all_there_is() -> None:
    assert operation_percent({}, ["save"], 40.0) == 40.0
    assert operation_percent({}, ["save"], 100.0) == 99.0
