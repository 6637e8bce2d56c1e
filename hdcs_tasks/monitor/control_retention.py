"""Forgetting: what has ended leaves the record some time later, so that nothing in it grows without end.

``HDCS_KEEP_*`` say how long each kind is kept; nothing that lives, or that something living leans on, is touched.
Operations that go are added to ``OperationTally`` first: /metrics counts on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from hdcs_tasks.monitor.control_metrics import Histogram
from hdcs_tasks.monitor.control_signals import WATCHED_DAYS
from hdcs_tasks.operations.control import Control
from hdcs_tasks.states import OPERATION_LIVE, AlarmState, BackupState
from hdcs_tasks.store.models import Backup, BackupCopy, Event, Operation, Step, Vm, now
from hdcs_tasks.store.models_watch import Alarm, Notice, OperationTally, UsageSpan

AT_ONCE = 500
"""Rows of one transaction: others write in between."""
ROUNDS_MAX = 100
"""Of each kind in one sweep; what is left then has its turn in the next."""
LEAST_DAYS = WATCHED_DAYS + 1
"""Alarms look back so far; a cleared one that was forgotten sooner would be raised again."""

Forget = Callable[[Session, datetime], int]


def retention_sweep(control: Control) -> dict[str, int]:
    """Delete what ended longer ago than its setting says. Returns how many of each kind went."""
    keep = control.settings.keep
    kinds: tuple[tuple[str, float, Forget], ...] = (
        ("operations", keep.operations_days, _operations), ("vms", keep.operations_days, _vms),
        ("backups", keep.operations_days, _backups), ("events", keep.events_days, _events),
        ("alarms", keep.alarms_days, _alarms), ("usage", keep.usage_days, _usage),
    )  # fmt: skip
    counts = {}
    for kind, days, forget in kinds:
        counts[kind] = 0
        if not days:
            continue
        before = now() - timedelta(days=max(days, LEAST_DAYS))
        for _ in range(ROUNDS_MAX):
            with control.transaction() as tx:
                gone = forget(tx.session, before)
            counts[kind] += gone
            if not gone:
                break
    return counts


def _operations(session: Session, before: datetime) -> int:
    """Whole families: a bulk request goes with its children, when all of it ended long enough ago."""
    child = aliased(Operation)
    over = Operation.ended_at < before, Operation.state.not_in(OPERATION_LIVE)
    young = (child.ended_at.is_(None)) | (child.ended_at >= before)
    roots = select(Operation.id).where(*over, Operation.parent_id.is_(None), ~exists().where(
        child.parent_id == Operation.id, young)).order_by(Operation.ended_at).limit(AT_ONCE)  # fmt: skip
    family = generation = list(session.scalars(roots))
    while generation:
        below = [select(Operation.id).where(Operation.parent_id.in_(some)) for some in _batches(generation)]
        generation = [id_ for query in below for id_ in session.scalars(query)]
        family = family + generation
    for some in _batches(family[::-1]):  # children before their parents
        _tally(session, some)
        session.execute(update(Operation).where(Operation.waits_for.in_(some)).values(waits_for=None))
        session.execute(delete(Step).where(Step.operation_id.in_(some)))
        session.execute(delete(Operation).where(Operation.id.in_(some)))
    return len(family)


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """A bulk request may have more children than a statement may have parameters."""
    return (ids[at : at + AT_ONCE] for at in range(0, len(ids), AT_ONCE))


def _tally(session: Session, ids: Sequence[str]) -> None:
    columns = (Operation.kind, Operation.state, Operation.created_at, Operation.ended_at)
    found: dict[tuple[str, str], Histogram] = {}
    for kind, state, began, ended in session.execute(select(*columns).where(Operation.id.in_(ids))):
        if ended is not None:
            found.setdefault((kind, state.value), Histogram()).add(max(0.0, (ended - began).total_seconds()))
    for (kind, outcome), histogram in found.items():
        row = session.get(OperationTally, (kind, outcome), with_for_update=True)
        if row is None:
            row = OperationTally(kind=kind, outcome=outcome, buckets=[0] * len(histogram.buckets), total_s=0.0)
            session.add(row)
        row.buckets = [one + other for one, other in zip(row.buckets, histogram.buckets, strict=True)]
        row.total_s += histogram.total_s
        session.flush()


def _vms(session: Session, before: datetime) -> int:
    """Deleted ones of which nothing is told any more: no operation, no backup."""
    leant_on = exists().where(Operation.vm_id == Vm.id) | exists().where(Backup.vm_id == Vm.id)
    return _delete(session, Vm.id, Vm.deleted_at < before, ~leant_on)


def _backups(session: Session, before: datetime) -> int:
    """Points that are gone, or never came to be, of chains of which nothing is left."""
    other, over = aliased(Backup), (BackupState.DELETED, BackupState.FAILED)
    living = exists().where(other.chain == Backup.chain, other.state.not_in(over))
    copied = exists().where(BackupCopy.backup_id == Backup.id)
    return _delete(session, Backup.id, Backup.state.in_(over), Backup.created_at < before, ~living, ~copied)


def _events(session: Session, before: datetime) -> int:
    return _delete(session, Event.id, Event.at < before)


def _alarms(session: Session, before: datetime) -> int:
    over = (Alarm.state == AlarmState.CLEARED) & (Alarm.cleared_at < before)
    ids = list(session.scalars(select(Alarm.id).where(over).limit(AT_ONCE)))
    if ids:
        session.execute(delete(Notice).where(Notice.alarm_id.in_(ids)))
        session.execute(delete(Alarm).where(Alarm.id.in_(ids)))
    return len(ids)


def _usage(session: Session, before: datetime) -> int:
    return _delete(session, UsageSpan.id, UsageSpan.closed_at < before)


def _delete(session: Session, key: InstrumentedAttribute[Any], *where: ColumnElement[bool]) -> int:
    ids = list(session.scalars(select(key).where(*where).limit(AT_ONCE)))
    if ids:
        session.execute(delete(key.class_).where(key.in_(ids)))
    return len(ids)
