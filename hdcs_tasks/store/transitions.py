"""The one place that writes a state column."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

from sqlalchemy import update
from sqlalchemy.orm import Session, object_session
from sqlalchemy.orm.attributes import set_committed_value

from hdcs_tasks.errors import Conflict
from hdcs_tasks.states import allowed, check
from hdcs_tasks.store.models import ImageCopy, now


class Stateful(Protocol):
    """A record with a state column."""

    @property
    def state(self) -> StrEnum: ...


def move(record: Stateful, new: StrEnum) -> None:
    """Move ``record`` to state ``new`` by compare-and-set in the running transaction.

    Raises WrongState for an illegal move and Conflict when the row changed underneath.
    """
    old = record.state
    if old is new and not allowed(old, new):
        return
    check(old, new, subject_of(record))
    session = object_session(record)
    if session is None or record in session.new:
        record.state = new  # type: ignore[misc]
        return
    _compare_and_set(session, record, old, new)


def _compare_and_set(session: Session, record: Stateful, old: StrEnum, new: StrEnum) -> None:
    session.flush()
    cls: Any = type(record)
    mapper = cls.__mapper__
    identity = mapper.primary_key_from_instance(record)
    key = [column == value for column, value in zip(mapper.primary_key, identity, strict=True)]
    values: dict[str, Any] = {"state": new}
    if "state_at" in mapper.columns:
        values["state_at"] = now()
    statement = update(cls).where(*key, cls.state == old).values(values)
    done: Any = session.execute(statement, execution_options={"synchronize_session": False})
    if done.rowcount != 1:
        raise Conflict(f"{subject_of(record)} changed while it was moved from {old} to {new}", next="Try again")
    for name, value in values.items():
        # The row holds it already: the object shall neither write nor read it again.
        set_committed_value(record, name, value)


def subject_of(record: object) -> str:
    """What to call a record in a message: ``VM desk-01``, ``server node node1``."""
    words = {"Vm": "VM", "ServerNode": "server node", "Operation": "operation", "Step": "step", "Backup": "backup"}
    word = words.get(type(record).__name__, type(record).__name__.lower())
    if isinstance(record, ImageCopy):
        return f"image copy {record.image_id} on {record.domain_node}"
    name = getattr(record, "name", None) if type(record).__name__ != "Step" else None
    return f"{word} {name or getattr(record, 'id', '?')}"
