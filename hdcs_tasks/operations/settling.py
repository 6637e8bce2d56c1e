"""Ending a step: its feature moves the record on, or undoes it; then the operation goes on or has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.operations.handlers import ON_DONE, ON_FAILED, PLANS
from hdcs_tasks.operations.lookups import LIVE_STEP
from hdcs_tasks.operations.rules import operation_percent
from hdcs_tasks.states import OPERATION_LIVE, StepState
from hdcs_tasks.store.models import Operation, Step, now
from hdcs_tasks.store.transitions import move

if TYPE_CHECKING:
    from hdcs_tasks.operations.control import Tx


def settle_failed(tx: Tx, step: Step, error: HdcsError, *, needs_operator: bool = False) -> None:
    """End a step as failed or cancelled and let its feature undo the record; then the operation has ended."""
    step.error = error.to_dict()
    step.ended_at = now()
    move(step, StepState.CANCELLED if error.code == "cancelled" else StepState.FAILED)
    operation = step.operation
    for key in (step.name, f"{operation.kind}:{step.name}"):
        if key in ON_FAILED:
            ON_FAILED[key](tx, operation, step, error)
    if operation.state in OPERATION_LIVE and not has_live_step(tx, operation):
        tx.fail(operation, error, needs_operator=needs_operator)


def settle_done(tx: Tx, step: Step, result: dict[str, Any]) -> None:
    """End a step as done and let its feature move the record on; with no further step the operation is done."""
    step.outcome = result
    step.ended_at = now()
    move(step, StepState.DONE)
    operation = step.operation
    for key in (step.name, f"{operation.kind}:{step.name}"):
        if key in ON_DONE:
            ON_DONE[key](tx, operation, step, result)
    if operation.state in OPERATION_LIVE and not has_live_step(tx, operation):
        tx.finish(operation, result)
    elif operation.state in OPERATION_LIVE:
        advance(operation, 0.0)


def advance(operation: Operation, percent: float) -> None:
    """Record that the operation's last step is at ``percent``. What was shown once is never taken back: a step tried
    again, or another one instead, begins before where the last came to."""
    names = [step.name for step in operation.steps]
    reached = operation_percent(PLANS.get(operation.kind, {}), names, percent)
    operation.percent = max(operation.percent, reached)


def has_live_step(tx: Tx, operation: Operation) -> bool:
    tx.session.flush()
    return tx.session.scalar(LIVE_STEP, {"operation": operation.id}) is not None
