"""Monitoring on the control plane: what happened."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from hdcs_tasks.operations.control import Control
from hdcs_tasks.store.models import Event


def list_events(control: Control, limit: int) -> list[dict[str, Any]]:
    """The newest events first."""
    with control.store.read() as session:
        rows = session.scalars(select(Event).order_by(Event.id.desc()).limit(limit)).all()
    return [
        {"at": e.at.isoformat(), "kind": e.kind, "subject": e.subject, "message": e.message, "data": e.data}
        for e in rows
    ]
