"""Reading one record by its key, as ``Session.get`` does, with a statement that is made once.

Making a statement costs as much as running it, and settling a step looks up half a dozen records.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from sqlalchemy import Select, bindparam, select
from sqlalchemy.inspection import inspect
from sqlalchemy.orm import Session
from sqlalchemy.orm.util import identity_key

from hdcs_tasks.store.models import Base

Record = TypeVar("Record", bound=Base)


def by_key(session: Session, kind: type[Record], key: str) -> Record | None:
    """The record of ``kind`` whose primary key (one column) is ``key``; the one the session has already, if it has."""
    known: Record | None = session.identity_map.get(identity_key(kind, key))
    return known if known is not None else session.scalar(_statement(kind), {"key": key})


@cache
def _statement(kind: type[Record]) -> Select[tuple[Record]]:
    (column,) = inspect(kind).primary_key
    made: Select[Any] = select(kind).where(column == bindparam("key"))
    return made
