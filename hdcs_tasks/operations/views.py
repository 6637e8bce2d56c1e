"""Operations as callers see them: plain JSON-able dicts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.operations.cancelling import ask_cancel
from hdcs_tasks.operations.control import Control
from hdcs_tasks.operations.handlers import PLANS
from hdcs_tasks.operations.kinds import check_kind
from hdcs_tasks.operations.line import places_of
from hdcs_tasks.operations.lookups import get_operation
from hdcs_tasks.operations.rules import operation_percent
from hdcs_tasks.reservations import StepStatus
from hdcs_tasks.states import OPERATION_LIVE, OperationState
from hdcs_tasks.store.models import Operation, Step, Vm
from hdcs_tasks.store.naming import unknown


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at else None


def view(operation: Operation) -> dict[str, Any]:
    """An operation without its steps. ``percent`` 0 to 100, ``seconds`` from request to end (or None)."""
    ended = operation.ended_at
    return {
        "id": operation.id, "kind": operation.kind, "state": operation.state.value, "subject": operation.subject,
        "vm_id": operation.vm_id, "parent_id": operation.parent_id, "waits_for": operation.waits_for,
        "requested_by": operation.requested_by, "reason": operation.reason, "percent": round(operation.percent, 1),
        "phase": operation.phase, "error": operation.error, "needs_operator": operation.needs_operator,
        "cancel_asked": operation.cancel_asked, "result": operation.result,
        "decision": operation.decision, "created_at": _iso(operation.created_at),
        "started_at": _iso(operation.started_at), "ended_at": _iso(ended),
        "seconds": round((ended - operation.created_at).total_seconds(), 3) if ended else None,
    }  # fmt: skip


def step_view(step: Step) -> dict[str, Any]:
    """A step with its history: what was tried, where and when."""
    return {
        "id": step.id, "seq": step.seq, "name": step.name, "queue": step.sent_to or step.queue,
        "state": step.state.value, "attempt": step.attempt, "node": step.node, "outcome": step.outcome,
        "error": step.error, "history": step.history, "published_at": _iso(step.published_at),
        "started_at": _iso(step.started_at), "ended_at": _iso(step.ended_at),
        "ready_at": _iso(step.ready_at), "not_before": _iso(step.not_before),
    }  # fmt: skip


def show(control: Control, operation_id: str) -> dict[str, Any]:
    """One operation whole: its steps, and its children without theirs. Who waits to start shows its ``line``:
    ``{domain_node, place, of}``, and when it may be through (``eta_s``); a parent's is that of its last child."""
    with control.store.read() as session:
        operation = get_operation(session, operation_id)
        children = session.scalars(
            select(Operation).where(Operation.parent_id == operation.id).order_by(Operation.subject)
        ).all()
        live = [each.id for each in (operation, *children) if each.state in OPERATION_LIVE]
        lines = places_of(control, session, live) if live else {}
        whole = _live(control, view(operation), operation.steps) | lines.get(operation.id, {})
        if whole["eta_s"] is None:
            told = [found["eta_s"] for found in lines.values() if found["eta_s"] is not None]
            whole["eta_s"] = max(told, default=None)
        return whole | {
            "steps": [step_view(step) for step in operation.steps],
            "children": [view(child) | lines.get(child.id, {}) for child in children],
        }


def _live(control: Control, shown: dict[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    at_work = shown["state"] == OperationState.RUNNING and steps
    return with_progress(shown, steps, control.reservations.steps.status(steps[-1].id) if at_work else None)


def with_progress(shown: dict[str, Any], steps: Sequence[Step], status: StepStatus | None) -> dict[str, Any]:
    """A view with the progress its executor tells right now (of its newest step); the record follows with the next
    sweep."""
    shown["eta_s"] = None
    if shown["state"] != OperationState.RUNNING or not steps:
        return shown
    last = steps[-1]
    if status is not None and status.attempt == last.attempt and status.percent is not None:
        reached = operation_percent(PLANS.get(shown["kind"], {}), [step.name for step in steps], status.percent)
        shown["percent"] = round(max(shown["percent"], reached), 1)
        shown["phase"] = status.phase or shown["phase"]
        shown["eta_s"] = status.eta_s
    return shown


def list_operations(
    control: Control, *, live: bool = False, vm: str | None = None, kind: str | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    """The newest operations first; ``live`` only those that have not ended, ``vm`` by subject name. NotFound for a kind
    that there is not, and for a name that neither a VM nor any operation ever had."""
    with control.store.read() as session:
        query = select(Operation).order_by(Operation.created_at.desc()).limit(limit)
        if live:
            query = query.where(Operation.state.in_(OPERATION_LIVE))
        if vm is not None:
            query = query.where(Operation.subject == vm)
        if kind is not None:
            query = query.where(Operation.kind == kind)
        found = [view(operation) for operation in session.scalars(query)]
        if not found and kind is not None:
            check_kind(kind)
        if not found and vm is not None:
            _check_subject(session, vm)
        return found


def _check_subject(session: Session, name: str) -> None:
    for known in (select(Operation.id).where(Operation.subject == name), select(Vm.id).where(Vm.name == name)):
        if session.scalar(known.limit(1)) is not None:
            return
    raise unknown(session, Vm.name, name, "VM", "hdcs vm list", Vm.deleted_at.is_(None))


def cancel(control: Control, operation_id: str) -> dict[str, Any]:
    """Ask an operation (and its children) to stop; an operation that has ended stays as it is."""
    with control.transaction() as tx:
        operation = get_operation(tx.session, operation_id)
        ask_cancel(tx, operation)
        tx.session.flush()
        return view(operation)
