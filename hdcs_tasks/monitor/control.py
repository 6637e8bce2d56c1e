"""Monitoring on the control plane: what happened, and the checks of hdcs doctor."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.monitor.control_signals import known_sweeps
from hdcs_tasks.operations.control import Control
from hdcs_tasks.pool.control import IN_POOL
from hdcs_tasks.store.models import Event, ServerNode, Vm, now


def list_events(control: Control, limit: int) -> list[dict[str, Any]]:
    """The newest events first."""
    with control.store.read() as session:
        rows = session.scalars(select(Event).order_by(Event.id.desc()).limit(limit)).all()
    return [
        {"at": e.at.isoformat(), "kind": e.kind, "subject": e.subject, "message": e.message, "data": e.data}
        for e in rows
    ]


def doctor(control: Control) -> list[dict[str, Any]]:
    """Checks of the control plane; each ``{check, ok, message, next}``."""
    checks = [_check("database", lambda: _database(control)), _check("redis", lambda: _redis(control))]
    if not all(check["ok"] for check in checks):
        return checks
    checks.append(_check("sweeps", lambda: _sweeps(control)))
    return [*checks, *(_check(f"server node {node.name}", lambda node=node: _node(node)) for node in _nodes(control)),
            _check("reservations", lambda: _reservations(control))]  # fmt: skip


def _check(name: str, look: Any) -> dict[str, Any]:
    try:
        return {"check": name, "ok": True, "message": look(), "next": ""}
    except HdcsError as error:
        return {"check": name, "ok": False, "message": error.message, "next": error.next}


def _database(control: Control) -> str:
    with control.store.read() as session:
        session.execute(text("SELECT 1"))
    return "answers"


def _redis(control: Control) -> str:
    return "reservations open" if control.reservations.epoch.is_open() else "waiting for the rebuild of reservations"


def _sweeps(control: Control) -> str:
    found = [signal for signal in known_sweeps(control) if signal.value]
    if found:
        raise HdcsError(found[0].message, next="Do hdcs-beat and a control worker run?")
    ran = control.reservations.samples.sweeps()
    return f"{len(ran)} ran in time" if ran else "none has run yet"


def _nodes(control: Control) -> list[ServerNode]:
    with control.store.read() as session:
        return list(session.scalars(select(ServerNode).order_by(ServerNode.name)))


def _node(node: ServerNode) -> str:
    if node.state not in IN_POOL:
        raise HdcsError(f"{node.name} is {node.state} since {node.state_at.isoformat()}", next="Start its worker")
    seen = "never" if node.observed_at is None else f"{(now() - node.observed_at).total_seconds():.0f} s ago"
    return f"{node.state}, sampled {seen}"


def _reservations(control: Control) -> str:
    with control.store.read() as session:
        vms = _living(session)
    orphans = control.reservations.orphans(vms)
    count = sum(len(part) for part in orphans)
    if count:
        raise HdcsError(f"{count} reservations have no owner: {orphans}", next="They are dropped by the next rebuild")
    return "every one has its owner"


def _living(session: Session) -> set[str]:
    return set(session.scalars(select(Vm.id).where(Vm.deleted_at.is_(None))))
