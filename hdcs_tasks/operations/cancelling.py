"""Cancelling: what nobody holds ends at once, what an executor holds is asked to stop and ends by its outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from hdcs_tasks.errors import Cancelled, NoCapacity, OutcomeUnknown
from hdcs_tasks.operations.lookups import WAITING_FOR
from hdcs_tasks.operations.rules import is_binding, is_touched
from hdcs_tasks.operations.settling import settle_failed
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.states import OPERATION_LIVE, STEP_LIVE, StepState
from hdcs_tasks.store.models import Operation, Step, now

if TYPE_CHECKING:
    from hdcs_tasks.operations.control import Tx


def ask_cancel(tx: Tx, operation: Operation) -> None:
    """Ask a live operation to stop: at once where nobody holds its step, else through its executor."""
    if operation.state not in OPERATION_LIVE:
        return
    tx.lock_operation(operation)
    operation.cancel_asked = True
    children = select(Operation).where(Operation.parent_id == operation.id, Operation.state.in_(OPERATION_LIVE))
    for child in tx.session.scalars(children.order_by(Operation.id)).all():
        ask_cancel(tx, child)
    if operation.waits_for is not None:
        tx.fail(operation, Cancelled("cancelled before it began"))
        return
    steps = select(Step).where(Step.operation_id == operation.id, Step.state.in_(STEP_LIVE))
    for step in tx.session.scalars(steps.with_for_update(key_share=True)).all():
        _cancel_step(tx, step)


def _cancel_step(tx: Tx, step: Step) -> None:
    if is_binding(step.spec) and not (step.state is StepState.PARKED and gives_way(tx, step)):
        return
    if step.state is StepState.PUBLISHED:
        step.operation.phase = f"cancelling {step.name}"
        step_id, attempt, touched = step.id, step.attempt, is_touched(step.attempt, step.node)
        tx.after(lambda: request_cancel(tx.control.reservations, step_id, attempt, touched))
    elif step.error is not None and step.error.get("code") == OutcomeUnknown.code:
        # Its outcome must be observed first; the next attempt does that at once.
        step.not_before = now()
    else:
        settle_failed(tx, step, Cancelled("cancelled before it began"))


def gives_way(tx: Tx, step: Step) -> bool:
    """Whether a binding step only waits for room (a VM that is started again after its move failed), while another
    operation waits for the end of its own: what supersedes is not to wait as long as that."""
    waits = step.error is not None and step.error.get("code") == NoCapacity.code
    return waits and tx.session.scalar(WAITING_FOR, {"ended": step.operation_id}) is not None


def request_cancel(reservations: Reservations, step_id: str, attempt: int, touched: bool) -> None:
    """Ask the executor to stop. An attempt nobody holds is thereby over, which must not happen to one that is to
    observe what an earlier one left behind: there the sweep asks as soon as it has an executor."""
    if touched:
        status = reservations.steps.status(step_id)
        if status is None or status.holder is None:
            return
    # Nobody can claim it once the flag is set; the sweep settles what nobody holds.
    reservations.steps.request_cancel(step_id, attempt)
