"""The one place that writes a state column."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from sqlalchemy import update
from sqlalchemy.orm import Session, object_session

from hdcs_tasks.errors import Conflict
from hdcs_tasks.states import check
from hdcs_tasks.store.models import ImageCopy, now


class Stateful(Protocol):
    state: StrEnum


def move(record: Stateful, new: StrEnum) -> None:
    """Move ``record`` to state ``new`` by compare-and-set in the running transaction.

    Raises WrongState for an illegal move and Conflict when the row changed underneath.
    """
    old = record.state
    if old is new and not _reentrant(record, new):
        return
    check(old, new, subject_of(record))
    session = object_session(record)
    if session is None or record in session.new:
        record.state = new
        return
    _compare_and_set(session, record, old, new)


def _reentrant(record: Stateful, new: StrEnum) -> bool:
    from hdcs_tasks.states import MACHINES

    return new in MACHINES[type(new)][new]


def _compare_and_set(session: Session, record: Stateful, old: StrEnum, new: StrEnum) -> None:
    session.flush()
    cls = type(record)
    mapper = cls.__mapper__  # type: ignore[attr-defined]
    key = [col == value for col, value in zip(mapper.primary_key, mapper.primary_key_from_instance(record), strict=True)]
    values = {"state": new}
    if "state_at" in mapper.columns:
        values["state_at"] = now()
    done = session.execute(
        update(cls).where(*key, cls.state == old).values(values).execution_options(synchronize_session=False)  # type: ignore[arg-type]
    )
    if done.rowcount != 1:  # type: ignore[attr-defined]
        raise Conflict(f"{subject_of(record)} changed while it was moved from {old} to {new}", next="Try again")
    session.refresh(record, ["state", *(["state_at"] if "state_at" in mapper.columns else [])])


def subject_of(record: object) -> str:
    """What to call a record in a message: ``VM desk-01``, ``server node node1``."""
    words = {"Vm": "VM", "ServerNode": "server node", "Operation": "operation", "Step": "step", "Backup": "backup"}
    word = words.get(type(record).__name__, type(record).__name__.lower())
    if isinstance(record, ImageCopy):
        return f"image copy {record.image_id} on {record.domain_node}"
    name = getattr(record, "name", None) if type(record).__name__ != "Step" else None
    return f"{word} {name or getattr(record, 'id', '?')}"
