"""Operations whose executor, message or Redis was lost, and those that are called off: what recovery makes of them."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import time
from typing import Any

import pytest
import redis
from sqlalchemy import select

from hdcs_tasks.errors import OutcomeUnknown, Unreachable
from hdcs_tasks.operations.node import Run
from hdcs_tasks.operations.recovery import recovery_sweep, settle, sweep_once
from hdcs_tasks.operations.views import cancel, show
from hdcs_tasks.reservations.steps import Steps
from hdcs_tasks.routing import direct_queue
from hdcs_tasks.states import StepState
from hdcs_tasks.store.models import Operation, Step
from tests.contract.desk import Desk, Handler, ago, desk, failing, good, never  # noqa: F401 - desk is a fixture

pytestmark = pytest.mark.contract


def lose(steps: Steps, step: str, attempt: int) -> None:
    """The lease of the executor named ``dead`` ends now."""
    assert steps.renew(step, attempt, "dead", 0.001)
    deadline = time.monotonic() + 30
    while (seen := steps.status(step)) is not None and seen.leased:
        assert time.monotonic() < deadline, "its lease goes on"
        time.sleep(0.002)


def test_a_dead_executor_is_noticed_by_its_lease_and_never_before(desk: Desk) -> None:
    operation = desk.ask()
    message = desk.messages()[0]
    steps = desk.control.reservations.steps
    steps.claim(message["step"], 1, "dead", "node1", 600)
    assert recovery_sweep(desk.control)["new_attempt"] == 0
    lose(steps, message["step"], 1)
    assert recovery_sweep(desk.control)["new_attempt"] == 1
    assert desk.work(message, never) == "stale"
    assert desk.run(good, queue=direct_queue("east", "node1")) == ["done"]
    assert desk.state(operation) == "done"
    assert [entry["attempt"] for entry in desk.step(operation).history] == [1, 2]


def test_executors_lost_again_and_again_need_an_operator(desk: Desk) -> None:
    operation = desk.ask()
    steps = desk.control.reservations.steps
    for attempt in range(1, desk.control.settings.attempts_max + 1):
        assert steps.claim(desk.step(operation).id, attempt, "dead", "node1", 600) == "claimed"
        lose(steps, desk.step(operation).id, attempt)
        recovery_sweep(desk.control)
    found = show(desk.control, operation)
    assert (found["state"], found["needs_operator"]) == ("failed", True)
    assert found["error"]["code"] == "outcome_unknown"


def test_a_long_step_whose_outcome_is_on_its_way_is_left_alone(desk: Desk) -> None:
    operation = desk.ask()
    desk.due(operation, published_at=ago(7000))
    desk.work(desk.messages()[0], good)
    assert recovery_sweep(desk.control)["new_attempt"] == 0
    desk.settle_all()
    assert desk.state(operation) == "done"


def test_an_outcome_that_never_comes_is_observed_anew(desk: Desk) -> None:
    operation = desk.ask()
    desk.work(desk.messages()[0], good)
    desk.messages("control")  # lost, and the node's disk with it
    recovery_sweep(desk.control)
    desk.due(operation, finished_seen_at=ago(11 * desk.control.settings.lease_ttl_s))
    assert recovery_sweep(desk.control)["new_attempt"] == 1
    assert desk.run(good, queue=direct_queue("east", "node1")) == ["done"]
    assert desk.state(operation) == "done"


def test_a_lost_message_is_sent_again_as_the_same_attempt(desk: Desk) -> None:
    operation = desk.ask()
    desk.messages()
    assert recovery_sweep(desk.control)["send_again"] == 0
    desk.due(operation, published_at=ago(61))
    assert recovery_sweep(desk.control)["send_again"] == 1
    assert desk.run(good) == ["done"]
    assert desk.step(operation).attempt == 1


def test_a_lease_that_ran_out_by_its_own_clock_is_lost_whatever_redis_says(desk: Desk) -> None:
    operation = desk.ask()

    def stopped_for_long(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        run.renewed -= 2 * run.ctx.settings.lease_ttl_s
        run.check()
        return {}

    assert desk.run(stopped_for_long) == ["lost"]
    assert desk.state(operation) == "running"


def test_nothing_is_spent_while_reservations_are_closed(desk: Desk) -> None:
    operation = desk.ask()
    desk.lose(operation)
    desk.due(operation, published_at=ago(60))
    desk.control.reservations.epoch.close()
    assert recovery_sweep(desk.control)["new_attempt"] == 0
    desk.control.reservations.epoch.open()
    assert recovery_sweep(desk.control)["new_attempt"] == 1
    assert [m["attempt"] for m in desk.messages()] == [1, 2]


def test_a_late_outcome_of_an_older_attempt_only_enters_the_history(desk: Desk) -> None:
    operation = desk.ask()
    desk.work(desk.messages()[0], good)
    late = desk.messages("control")[0]["report"]
    with desk.control.transaction() as tx:
        step = tx.lock_step(late["step"])
        assert step is not None
        tx.publish(step)
    settle(desk.control, late)
    assert desk.state(operation) == "running"
    assert len(desk.step(operation).history) == 1


def test_a_step_that_cannot_be_recovered_does_not_keep_the_others(desk: Desk) -> None:
    bad, fine = desk.ask(), desk.ask()
    for operation in (bad, fine):
        desk.run(failing(Unreachable("away")))
        desk.due(operation, not_before=ago(1)) if operation == bad else None
    desk.due(fine, not_before=ago(1))
    with desk.control.store.session() as session:
        session.scalars(select(Step).where(Step.operation_id == bad)).one().history = "not a list"  # type: ignore[assignment]
        session.scalars(select(Step).where(Step.operation_id == bad)).one().state = StepState.PUBLISHED
    desk.lose(bad)
    desk.due(bad, published_at=ago(60))
    recovery_sweep(desk.control)
    assert desk.step(fine).state is StepState.PUBLISHED


def test_a_sweep_that_runs_when_asked_for_is_never_late(desk: Desk) -> None:
    known = desk.control.reservations.samples.sweeps
    assert sweep_once(desk.control, "asked", 1.0, lambda _: "ran", periodic=False) == "ran"
    assert "asked" not in known()
    assert sweep_once(desk.control, "beaten", 1.0, lambda _: "ran") == "ran"
    assert "beaten" in known()


def test_two_beats_run_a_sweep_once_in_a_period_and_one_that_is_early_misses_none(desk: Desk) -> None:
    def run(period_s: float) -> Any:
        return sweep_once(desk.control, "beaten", period_s, lambda _: "ran")

    assert (run(600), run(600)) == ("ran", None)
    redis.Redis.from_url(desk.control.settings.redis_url).delete(
        desk.control.settings.key_prefix + "lease:sweep:beaten"
    )
    assert run(1.0) == "ran"
    time.sleep(0.7)
    assert run(1.0) == "ran", "a message that waited made its turn late, and this one seem early"


# ---- cancelling


def test_cancel_before_the_claim(desk: Desk) -> None:
    operation = desk.ask()
    cancel(desk.control, operation)
    assert desk.run(never) == ["cancelled"]
    assert desk.state(operation) == "cancelled"


def test_cancel_of_a_lost_message_is_settled_by_the_sweep(desk: Desk) -> None:
    operation = desk.ask()
    desk.messages()
    cancel(desk.control, operation)
    recovery_sweep(desk.control)
    assert desk.state(operation) == "cancelled"


def test_cancel_while_it_runs_keeps_the_reason(desk: Desk) -> None:
    operation = desk.ask()

    def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        cancel(desk.control, operation)
        run.check()
        return {}

    assert desk.run(handler) == ["failed"]
    assert desk.state(operation) == "cancelled"


def test_a_cancel_lost_with_redis_is_asked_again(desk: Desk) -> None:
    operation = desk.ask()
    step = desk.step(operation).id
    desk.messages()
    steps = desk.control.reservations.steps
    steps.claim(step, 1, "executor", "node1", 30)
    with desk.control.store.session() as session:
        session.get_one(Operation, operation).cancel_asked = True  # the flag in Redis was never written
    recovery_sweep(desk.control)
    assert steps.check(step, 1, "executor") == "cancel"


def test_cancel_does_not_guess_an_unknown_outcome(desk: Desk) -> None:
    operation = desk.ask()
    desk.run(failing(OutcomeUnknown("the link was cut in the middle")))
    cancel(desk.control, operation)
    assert desk.state(operation) == "running", "its outcome is not known yet"
    recovery_sweep(desk.control)  # the next attempt is due at once …
    recovery_sweep(desk.control)  # … and is not cancelled before it observed
    assert desk.run(good, queue=direct_queue("east", "node1")) == ["done"]
    assert desk.state(operation) == "done"


def test_a_cancelled_step_that_fails_with_an_unknown_outcome_says_so(desk: Desk) -> None:
    operation = desk.ask()

    def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        cancel(desk.control, operation)
        while not run.cancelled():
            time.sleep(0.01)
        raise OutcomeUnknown("aborted, and nobody answers")

    desk.run(handler)
    assert desk.step(operation).state is StepState.PARKED
