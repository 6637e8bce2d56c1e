"""Idle policies as records, and desktops as those see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Conflict, Invalid
from hdcs_tasks.monitor.idle_rules import RUNGS, Desktop, Limits, Policy, Rung, check_selector, ladder_of
from hdcs_tasks.operations.control import Control
from hdcs_tasks.routing import check_name
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Vm, now
from hdcs_tasks.store.models_watch import IdlePolicy
from hdcs_tasks.store.naming import named

MESSAGE = "Nobody seems to use this desktop. Unless somebody does, it will be taken back soon."
COLUMNS = (
    Vm.id, Vm.name, Vm.state, Vm.home, Vm.owner, Vm.profile, Vm.tags, Vm.warm_pool, Vm.server_node, Vm.active_at,
    Vm.observed_at, Vm.idle,
)  # fmt: skip
_SWITCHED_ON = select(IdlePolicy).where(IdlePolicy.enabled)


def create(
    control: Control, name: str, *, selector: Mapping[str, Any], cpu_percent: float | None = None,
    disk_bytes_s: float | None = None, net_bytes_s: float | None = None, rank: int = 100, inside: bool = True,
    force: bool = False, message: str = "", **times: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Record a policy. ``times``: seconds of disuse after which each rung is taken: warn, suspend, save, stop, delete.

    ``selector``: names, tag, owner, home, profile, all of which a VM must match; empty means every VM. ``force``: a
    stop pulls the plug. ``message``: what is shown in the guest. Raises Invalid, Conflict (the name is taken).
    """
    check_name("idle policy", name)
    check_selector(selector)
    if unknown := sorted(set(times) - set(RUNGS)):
        raise Invalid(f"{unknown[0]!r} is not a rung of a ladder", next=f"Known: {', '.join(RUNGS)}")
    ladder = ladder_of(times)
    chosen = {"cpu_percent": cpu_percent, "disk_bytes_s": disk_bytes_s, "net_bytes_s": net_bytes_s}
    limits = asdict(Limits()) | {key: value for key, value in chosen.items() if value is not None}
    if any(value < 0 for value in limits.values()):
        raise Invalid("a limit is not below 0")
    with control.transaction() as tx:
        if tx.session.get(IdlePolicy, name) is not None:
            raise Conflict(f"there is an idle policy {name} already", next="See: hdcs idle list")
        row = IdlePolicy(
            name=name, selector=dict(selector), ladder=[[rung.do, rung.after_s] for rung in ladder], limits=limits,
            rank=rank, inside=inside, force=force, message=message, enabled=True, created_at=now(),
        )  # fmt: skip
        tx.session.add(row)
        tx.session.flush()
        return view(row)


def _get(session: Session, name: str) -> IdlePolicy:
    return named(session, IdlePolicy, name, "idle policy", "hdcs idle list")


def show(control: Control, name: str) -> dict[str, Any]:
    with control.store.read() as session:
        return view(_get(session, name))


def list_policies(control: Control) -> list[dict[str, Any]]:
    with control.store.read() as session:
        rows = session.scalars(select(IdlePolicy).order_by(IdlePolicy.rank, IdlePolicy.name))
        return [view(row) for row in rows]


def enable(control: Control, name: str, enabled: bool) -> dict[str, Any]:
    with control.transaction() as tx:
        row = _get(tx.session, name)
        row.enabled = enabled
        return view(row)


def delete(control: Control, name: str) -> None:
    with control.transaction() as tx:
        tx.session.delete(_get(tx.session, name))


def view(row: IdlePolicy) -> dict[str, Any]:
    keys = ("name", "enabled", "rank", "selector", "limits", "inside", "force", "message")
    times: dict[str, float | None] = dict.fromkeys(RUNGS)
    return {key: getattr(row, key) for key in keys} | times | {do: after_s for do, after_s in row.ladder} | {
        "created_at": row.created_at.isoformat()
    }  # fmt: skip


def load(session: Session) -> list[Policy]:
    """The policies that are switched on."""
    known = {field.name for field in fields(Limits)}
    return [
        Policy(
            row.name, tuple(Rung(do, after_s) for do, after_s in row.ladder), row.selector,
            Limits(**{key: value for key, value in row.limits.items() if key in known}), row.rank, row.inside,
            row.force, row.message,
        )
        for row in session.scalars(_SWITCHED_ON)
    ]  # fmt: skip


def desktop(row: Any) -> Desktop:
    """A VM, or a row of ``COLUMNS``, as policies see it. A running one is idle as far as it was observed, by its newest
    sample: what nobody looks at is not idle."""
    runs = row.state in (VmState.RUNNING, VmState.SUSPENDED)
    seen_at: datetime | None = row.observed_at if runs else now()
    active_at: datetime | None = row.active_at
    did_at = datetime.fromisoformat(row.idle["at"]) if row.idle else None
    valid = did_at is not None and active_at is not None and did_at > active_at
    return Desktop(
        row.name, row.state, row.home, row.owner, row.profile, row.tags, row.warm_pool, _between_s(active_at, seen_at),
        row.idle["did"] if valid else None, (_between_s(did_at, seen_at) or 0.0) if valid else 0.0,
    )  # fmt: skip


def _between_s(begin: datetime | None, end: datetime | None) -> float | None:
    return None if begin is None or end is None else max(0.0, (end - begin).total_seconds())
