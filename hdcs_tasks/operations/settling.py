"""Ending a step: its feature moves the record on, or undoes it; then the operation goes on or has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hdcs_tasks.errors import HdcsError, from_dict
from hdcs_tasks.operations.handlers import ON_CHILD_ENDED, ON_DONE, ON_FAILED, PLANS
from hdcs_tasks.operations.lookups import CHILDREN, LIVE_STEP, LOCKED_OPERATION
from hdcs_tasks.operations.rules import bulk_percent, first_few, operation_percent
from hdcs_tasks.states import OPERATION_LIVE, OperationState, StepState
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


def child_ended(tx: Tx, parent_id: str) -> None:
    """Record how far a parent has come; with the last of its children it ends: failed if one of them did."""
    tx.session.flush()
    parent = tx.session.scalar(LOCKED_OPERATION, {"id": parent_id})
    if parent is None or parent.state not in OPERATION_LIVE:
        return
    children = _children(tx, parent_id)
    later = 0
    if parent.kind in ON_CHILD_ENDED:
        left = ON_CHILD_ENDED[parent.kind](tx, parent, children)
        if left is None:
            return
        later = left
        tx.session.flush()
        children = _children(tx, parent_id)
    ended = [child for child in children if child.state not in OPERATION_LIVE]
    percents = [100.0 if child in ended else child.percent for child in children]
    parent.percent = bulk_percent(percents + [0.0] * later)
    parent.phase = f"{len(ended)} of {len(children) + later}"
    if len(ended) < len(children):
        return
    failed = [child for child in children if child.state is not OperationState.DONE]
    if not failed:
        tx.finish(parent, {"children": [child.subject for child in children]})
        return
    shown = first_few([f"{c.subject}: {(c.error or {}).get('message', c.state)}" for c in failed], parent.id)
    error = from_dict((failed[0].error or {}) | {
        "message": f"{len(failed)} of {len(children)} failed: {shown}",
        "details": {
            "failed": [c.subject for c in failed], "done": [c.subject for c in children if c not in failed],
        },
    })  # fmt: skip
    tx.fail(parent, error)


def _children(tx: Tx, parent_id: str) -> list[Operation]:
    return list(tx.session.scalars(CHILDREN, {"parent": parent_id}))
