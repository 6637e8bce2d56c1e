"""Counting use: spans that follow the record, opened and closed in the transaction that moves it.

``transitions.move`` calls ``moved`` for every VM, backup and server node, and nothing else opens or closes a VM's span
but ``gone`` and ``seen``, which bring what was observed, and ``changed``, for what changes without a move. A span ends
at the very moment the next begins, so no second is counted twice or lost. On the way (starting, stopping, migrating, …)
a VM is counted as it was before; the moment that counts is the one the server node reported for the step
(``happened_at``), never one before the last span's.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from enum import StrEnum

from sqlalchemy import bindparam, or_, select
from sqlalchemy.orm import Session

from hdcs_tasks.states import BackupState, ServerNodeState, VmState
from hdcs_tasks.store.models import Backup, ServerNode, Vm, now
from hdcs_tasks.store.models_watch import UsageSpan

ON, PAUSED, OFF = "on", "paused", "off"
_LEVELS: dict[StrEnum, str | None] = {
    VmState.RUNNING: ON, VmState.SUSPENDED: PAUSED, VmState.STOPPED: OFF, VmState.SAVED: OFF, VmState.DELETED: None,
}  # fmt: skip
"""States that say how a VM is used. In any other it is used as before; a failed one too, until somebody looked."""
_KEPT = frozenset({BackupState.READY, BackupState.BROKEN, BackupState.DELETING})
_UNSEEN = frozenset({ServerNodeState.LOST, ServerNodeState.LEFT})
_HAPPENED = "hdcs_happened_at"


_OPEN_OF = select(UsageSpan).where(UsageSpan.open_key == bindparam("key"))
_TO_COMPARE = select(UsageSpan).where(
    UsageSpan.server_node == bindparam("node"), UsageSpan.closed_at.is_(None),
    or_(UsageSpan.observed.is_(False), UsageSpan.kind == "console"),
)  # fmt: skip


def happened_at(session: Session, at: datetime) -> None:
    """What this transaction settles came about at ``at``, by the clock of the server node."""
    session.info[_HAPPENED] = at


def moved(session: Session, record: object, new: StrEnum) -> None:
    """A record was moved to ``new`` in this transaction."""
    if isinstance(record, Vm):
        if new in _LEVELS:
            _switch(session, record, _LEVELS[new], session.info.get(_HAPPENED) or now())
    elif isinstance(record, Backup):
        _backup_moved(session, record, new)
    elif isinstance(record, ServerNode) and new in _UNSEEN:
        _lose_sight(session, record)


def changed(session: Session, vm: Vm) -> None:
    """What a VM's use is counted by (name, owner, tags, home, shape, disk) changed, while its state did not."""
    at = session.info.get(_HAPPENED) or now()
    fresh = {
        "vm_name": vm.name, "owner": vm.owner or "", "tags": list(vm.tags or []), "home": vm.home, "vcpus": vm.vcpus,
        "memory_mib": vm.memory_mib, "size_bytes": vm.disk_bytes,
    }  # fmt: skip
    for kind in ("vm", "console"):
        span = _open(session, f"{kind}:{vm.id}")
        told = fresh if kind == "vm" else {key: fresh[key] for key in ("vm_name", "owner", "tags", "home")}
        if span is not None and any(getattr(span, key) != value for key, value in told.items()):
            _next(session, span, at, **told)


def gone(session: Session, vm: Vm, last_seen: datetime | None, at: datetime) -> None:
    """The VM's guest was found gone at ``at``; what lies between and ``last_seen`` (None: ``at``) nobody saw."""
    span = _open(session, f"vm:{vm.id}")
    if span is not None and span.level != OFF:
        if last_seen is not None and span.observed and last_seen < at:
            span = _next(session, span, last_seen, observed=False)
        _next(session, span, at, level=OFF, server_node=None, observed=True)
    _close(session, f"console:{vm.id}", at)


def sampled(
    session: Session, server_node: str, running: Collection[str], connected: Collection[str], at: datetime
) -> None:
    """The guests of these VMs were seen on a server node, and exactly the ``connected`` have a console client. What was
    out of sight is in sight again; consoles are counted from sample to sample."""
    spans = session.scalars(_TO_COMPARE, {"node": server_node}).all()
    for span in spans:
        if not span.observed and span.vm_id in running:
            _next(session, span, at, observed=True)
    _consoles(session, server_node, {span.vm_id: span for span in spans if span.kind == "console"}, connected, at)


def _consoles(
    session: Session, server_node: str, known: dict[str, UsageSpan], connected: Collection[str], at: datetime
) -> None:
    for vm_id, span in known.items():
        if vm_id not in connected:
            _end(span, at)
    new = set(connected) - known.keys()
    for vm in session.scalars(select(Vm).where(Vm.id.in_(new))) if new else ():
        _close(session, f"console:{vm.id}", at)  # it was on another server node until now
        session.add(_span(vm, "console", f"console:{vm.id}", at, server_node=server_node))
    if new or known.keys() - set(connected):
        session.flush()


def _switch(session: Session, vm: Vm, level: str | None, at: datetime) -> None:
    key = f"vm:{vm.id}"
    span = _open(session, key)
    node = None if level == OFF else vm.server_node
    if level != ON:
        _close(session, f"console:{vm.id}", at)
    if span is None:
        if level is not None:
            session.add(_span(vm, "vm", key, at, level=level, server_node=node, size_bytes=vm.disk_bytes))
            session.flush()
        return
    if level is None:
        _end(span, at)
        session.flush()
        return
    fresh = _span(vm, "vm", key, at, level=level, server_node=node, size_bytes=vm.disk_bytes)
    if any(getattr(span, field) != getattr(fresh, field) for field in _SAME):
        fresh.opened_at = _end(span, at)
        session.flush()
        session.add(fresh)
        session.flush()


_SAME = ("level", "server_node", "owner", "tags", "vm_name", "home", "vcpus", "memory_mib", "size_bytes", "observed")


def _span(vm: Vm, kind: str, key: str, at: datetime, *, server_node: str | None, level: str = "",
          size_bytes: int = 0) -> UsageSpan:  # fmt: skip
    return UsageSpan(
        kind=kind, vm_id=vm.id, vm_name=vm.name, owner=vm.owner or "", tags=list(vm.tags or []), home=vm.home,
        server_node=server_node, level=level, vcpus=vm.vcpus if kind == "vm" else 0,
        memory_mib=vm.memory_mib if kind == "vm" else 0, size_bytes=size_bytes, observed=True, open_key=key,
        opened_at=at,
    )  # fmt: skip


def _open(session: Session, key: str) -> UsageSpan | None:
    return session.scalar(_OPEN_OF, {"key": key})


def _end(span: UsageSpan, at: datetime) -> datetime:
    """Close a span; the moment it really ends: not before it began, and not in the future."""
    span.closed_at = max(span.opened_at, min(at, now()))
    span.open_key = None
    return span.closed_at


def _close(session: Session, key: str, at: datetime) -> None:
    span = _open(session, key)
    if span is not None:
        _end(span, at)
        session.flush()  # the key is free for the next span


def _next(session: Session, span: UsageSpan, at: datetime, **changes: object) -> UsageSpan:
    """Close a span and open the same with ``changes`` from there on."""
    kept = {field: getattr(span, field) for field in ("kind", "vm_id", *_SAME)}
    key = span.open_key
    ended = _end(span, at)
    session.flush()
    fresh = UsageSpan(**(kept | changes), open_key=key, opened_at=ended)
    session.add(fresh)
    session.flush()
    return fresh


def _backup_moved(session: Session, backup: Backup, new: StrEnum) -> None:
    if backup.id is None:
        session.flush()
    key = f"backup:{backup.id}"
    span = _open(session, key)
    size = backup.file_bytes or 0
    if span is not None and (new not in _KEPT or span.size_bytes != size):
        _end(span, now())
        session.flush()
        span = None
    if span is None and new in _KEPT:
        vm = session.get(Vm, backup.vm_id)
        session.add(UsageSpan(
            kind="backup", vm_id=backup.vm_id, vm_name=backup.vm_name, owner=vm.owner if vm else "",
            tags=list(vm.tags) if vm else [], home=backup.domain_node, server_node=None, level="", vcpus=0,
            memory_mib=0, size_bytes=size, observed=True, open_key=key, opened_at=now(),
        ))  # fmt: skip


def _lose_sight(session: Session, node: ServerNode) -> None:
    """From its last sample on nobody sees what runs on this server node."""
    at = node.observed_at or now()
    spans = select(UsageSpan).where(
        UsageSpan.server_node == node.name, UsageSpan.closed_at.is_(None), UsageSpan.observed.is_(True)
    )
    for span in session.scalars(spans).all():
        if span.kind == "console":
            _end(span, at)
        else:
            _next(session, span, at, observed=False)
