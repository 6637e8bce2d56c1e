"""Operations a page at a time, for dashboards: filtered, counted and ordered by the database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import Session

from hdcs_tasks.app import describe
from hdcs_tasks.errors import Invalid
from hdcs_tasks.operations import views
from hdcs_tasks.operations.control import Control
from hdcs_tasks.states import OPERATION_LIVE, OperationState
from hdcs_tasks.store.models import Operation, Step

PAGE_MAX = 200
ORDERS = {
    "created_at": Operation.created_at, "kind": Operation.kind, "subject": Operation.subject, "state": Operation.state,
    "percent": Operation.percent, "requested_by": Operation.requested_by, "ended_at": Operation.ended_at,
}  # fmt: skip
SHOWN = {
    "all": (), "live": (Operation.state.in_(OPERATION_LIVE),), "done": (Operation.state == OperationState.DONE,),
    "failed": (Operation.state == OperationState.FAILED,), "cancelled": (Operation.state == OperationState.CANCELLED,),
    "operator": (Operation.needs_operator.is_(True),),
}  # fmt: skip


def check_page(offset: int, limit: int, order: str, orders: Sequence[str]) -> None:
    """Raise Invalid for a page that cannot be."""
    if offset < 0 or not 1 <= limit <= PAGE_MAX:
        raise Invalid(f"a page of {limit} from {offset} on cannot be", next=f"Ask for 1 to {PAGE_MAX} rows from 0 on")
    if order not in orders:
        raise Invalid(f"there is no order by {order!r}", next=f"Known: {', '.join(orders)}")


def page(
    control: Control, *, offset: int = 0, limit: int = 15, search: str = "", show: str = "all",
    order: str = "created_at", descending: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """``{total, found, rows}``: one page of operations as ``views.view`` shows them, those at work as their executor
    tells it right now. Children of bulk requests show only where ``search`` finds them.

    ``show``: all, live, done, failed, cancelled, operator (needs one). A row also has ``task`` (the Celery task id of
    its newest step), ``about`` (what that step is about) and ``children``: ``{all, ended}``. Raises Invalid.
    """
    check_page(offset, limit, order, list(ORDERS))
    if show not in SHOWN:
        raise Invalid(f"there are no operations {show!r}", next=f"Known: {', '.join(SHOWN)}")
    column = ORDERS[order]
    with control.store.read() as session:
        top = Operation.parent_id.is_(None)
        total = session.scalar(select(func.count()).select_from(Operation).where(top)) or 0
        query: Select[Any] = select(Operation).where(*(SHOWN[show]), _matching(search) if search else top)
        found = session.scalar(select(func.count()).select_from(query.subquery())) or 0
        ordered = query.order_by(column.desc() if descending else column.asc(), Operation.id)
        operations = session.scalars(ordered.offset(offset).limit(limit)).all()
        return {"total": total, "found": found, "rows": _rows(control, session, operations)}


def _matching(search: str) -> ColumnElement[bool]:
    shown = (Operation.subject, Operation.kind, Operation.requested_by, Operation.reason)
    return or_(Operation.id.startswith(search, autoescape=True),
               *(column.icontains(search, autoescape=True) for column in shown))  # fmt: skip


def _rows(control: Control, session: Session, operations: Sequence[Operation]) -> list[dict[str, Any]]:
    ids = [operation.id for operation in operations]
    steps: dict[str, list[Step]] = {}
    for step in session.scalars(select(Step).where(Step.operation_id.in_(ids)).order_by(Step.seq)):
        steps.setdefault(step.operation_id, []).append(step)
    at_work = [steps[o.id][-1].id for o in operations if o.state is OperationState.RUNNING and o.id in steps]
    statuses = dict(zip(at_work, control.reservations.steps.statuses(at_work), strict=True)) if at_work else {}
    children = _children(session, ids)
    rows = []
    for operation in operations:
        mine = steps.get(operation.id, [])
        shown = views.with_progress(views.view(operation), mine, statuses.get(mine[-1].id) if mine else None)
        rows.append(shown | {
            "task": f"{mine[-1].id}.{mine[-1].attempt}" if mine and mine[-1].attempt else None,
            "about": describe({"spec": mine[-1].spec}) if mine else "", "children": children.get(operation.id),
        })  # fmt: skip
    return rows


def _children(session: Session, ids: Sequence[str]) -> dict[str, dict[str, int]]:
    counted = select(Operation.parent_id, Operation.state, func.count()).where(Operation.parent_id.in_(ids))
    found: dict[str, dict[str, int]] = {}
    for parent, state, count in session.execute(counted.group_by(Operation.parent_id, Operation.state)):
        entry = found.setdefault(str(parent), {"all": 0, "ended": 0})
        entry["all"] += count
        entry["ended"] += 0 if state in OPERATION_LIVE else count
    return found
