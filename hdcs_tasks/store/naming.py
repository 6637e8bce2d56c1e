"""Records looked up by a name somebody typed: found, or a NotFound that says which name comes close."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from hdcs_tasks.errors import NotFound
from hdcs_tasks.store.lookups import Record, by_key

LOOKED_AT = 2000
"""So many names are compared at most, those of like length first: among 50,000 a mistake must not take a second."""
LISTED = 8
"""So few names are told all where none comes close."""


def named(session: Session, model: type[Record], name: str, noun: str, see: str) -> Record:
    """The row whose key is ``name``; else NotFound. ``noun``: what it is; ``see``: the command that lists them."""
    found = by_key(session, model, name)
    if found is None:
        raise unknown(session, model.name, name, noun, see)  # type: ignore[attr-defined]
    return found


def unknown(
    session: Session, column: InstrumentedAttribute[str], name: str, noun: str, see: str, *among: ColumnElement[bool]
) -> NotFound:
    """The error for a name that is not in ``column``, of the rows ``among``."""
    length: ColumnElement[Any] = func.abs(func.length(column) - len(name))
    query = select(column).where(*among).group_by(column).order_by(length, column).limit(LOOKED_AT)
    return not_among(session.scalars(query).all(), name, noun, see)


def not_among(known: Sequence[str], name: str, noun: str, see: str) -> NotFound:
    """The error for a name that is none of ``known``."""
    close = get_close_matches(name, known, n=3)
    if close:
        told = f"Did you mean {' or '.join(close)}? "
    else:
        told = f"Known: {', '.join(sorted(known))}. " if 0 < len(known) <= LISTED else ""
    return NotFound(f"there is no {noun} {name!r}", next=f"{told}See: {see}")
