"""The one place that writes a state column."""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from typing import Any, TypeAlias

from sqlalchemy import Update, bindparam, inspect, update
from sqlalchemy.orm import Mapper, Session, object_session
from sqlalchemy.orm.attributes import set_committed_value

from hdcs_tasks.errors import Conflict
from hdcs_tasks.states import MACHINES, check
from hdcs_tasks.store import metering
from hdcs_tasks.store.models import Backup, BackupCopy, ImageCopy, Operation, ServerNode, Step, Vm, now
from hdcs_tasks.store.models_watch import Alarm

Stateful: TypeAlias = Vm | Operation | Step | ServerNode | ImageCopy | Backup | BackupCopy | Alarm


def move(record: Stateful, new: StrEnum) -> None:
    """Move ``record`` to state ``new`` by compare-and-set in the running transaction.

    Raises WrongState for an illegal move and Conflict when the row changed underneath.
    """
    old: StrEnum = record.state
    if old is new and new not in MACHINES[type(new)][new]:
        return
    check(old, new, subject_of(record))
    session = object_session(record)
    if session is None or record in session.new:
        setattr(record, "state", new)  # noqa: B010 - a plain assignment would ask for each machine's own enum
    else:
        _compare_and_set(session, record, old, new)
    if session is not None:
        metering.moved(session, record, new)


def _compare_and_set(session: Session, record: Stateful, old: StrEnum, new: StrEnum) -> None:
    kind = type(record)
    values: dict[str, object] = {"state": new}
    if hasattr(kind, "state_at"):
        values["state_at"] = now()
    mapper: Mapper[Any] = inspect(kind)
    row = zip(mapper.primary_key, mapper.primary_key_from_instance(record), strict=True)
    keys = {f"row_{column.name}": value for column, value in row}
    # What else has changed is written once, at the end, not before every move.
    with session.no_autoflush:
        done = session.execute(_statement(kind), {**values, **keys, "old": old})
    if getattr(done, "rowcount", 0) != 1:
        raise Conflict(f"{subject_of(record)} changed while it was moved from {old} to {new}", next="Try again")
    for name, value in values.items():
        # The row holds it already: the object shall neither write it nor read it again.
        set_committed_value(record, name, value)


@lru_cache
def _statement(kind: type[Stateful]) -> Update:
    """The update of one row that still is in state ``old``. Made once: most transactions move several records."""
    table: Any = kind.__table__
    row = [column == bindparam(f"row_{column.name}") for column in table.primary_key]
    changed: dict[str, Any] = {name: bindparam(name) for name in ("state", "state_at") if name in table.c}
    return update(table).where(*row, table.c.state == bindparam("old")).values(changed)


def subject_of(record: object) -> str:
    """What to call a record in a message: ``VM desk-01``, ``server node node1``."""
    words = {"Vm": "VM", "ServerNode": "server node", "Operation": "operation", "Step": "step", "Backup": "backup"}
    word = words.get(type(record).__name__, type(record).__name__.lower())
    if isinstance(record, ImageCopy):
        return f"image copy {record.image_id} on {record.domain_node}"
    name = getattr(record, "name", None) if type(record).__name__ != "Step" else None
    return f"{word} {name or getattr(record, 'id', '?')}"
