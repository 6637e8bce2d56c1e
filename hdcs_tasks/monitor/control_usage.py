"""Statements of use: the spans of a time, added up."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import or_, select

from hdcs_tasks.errors import Invalid
from hdcs_tasks.monitor import usage_rules
from hdcs_tasks.monitor.usage_rules import BYS, By, Span
from hdcs_tasks.operations.control import Control
from hdcs_tasks.store.models import now
from hdcs_tasks.store.models_watch import UsageSpan

_COLUMNS = tuple(getattr(UsageSpan, name) for name in Span.__slots__)


def usage(
    control: Control, *, owner: str | None = None, tag: str | None = None, vm: str | None = None,
    start: datetime | None = None, end: datetime | None = None, month: str | None = None, by: By = "vm",
) -> dict[str, Any]:  # fmt: skip
    """``{start, end, by, rows}`` with rows as ``usage_rules.totals`` makes them; default: this month until now.

    ``vm``: a name or an id; of a name, all VMs that ever had it. Moments without a zone are UTC. Raises Invalid.
    """
    at = now()
    if month is not None and (start is not None or end is not None):
        raise Invalid("a month, or a beginning and an end, not both")
    if by not in BYS:
        raise Invalid(f"use is not told by {by!r}", next=f"Known: {', '.join(BYS)}")
    if month is not None or start is None:
        first, last = usage_rules.month(month or f"{at:%Y-%m}")
        start, end = first, last if end is None else _utc(end)
    begins, ends = _utc(start), min(at, _utc(end) if end is not None else at)
    if begins >= ends:
        if begins > at:
            raise Invalid("that has not begun yet", next="Ask for a time that has passed")
        raise Invalid("the end is not after the beginning")
    spans = _spans(control, begins, ends, owner, vm)
    rows = usage_rules.totals(spans, begins, ends, by, control.settings.rates, tag)
    return {"start": begins.isoformat(), "end": ends.isoformat(), "by": by, "rows": rows}


def _utc(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _spans(control: Control, begins: datetime, ends: datetime, owner: str | None, vm: str | None) -> Iterator[Span]:
    query = select(*_COLUMNS).where(
        UsageSpan.opened_at < ends, or_(UsageSpan.closed_at.is_(None), UsageSpan.closed_at > begins)
    )
    if owner is not None:
        query = query.where(UsageSpan.owner == owner)
    if vm is not None:
        query = query.where(or_(UsageSpan.vm_name == vm, UsageSpan.vm_id == vm))
    with control.store.read() as session:
        for row in session.execute(query.execution_options(yield_per=2000)):
            yield Span(*row)
