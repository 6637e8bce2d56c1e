"""Deciding alone: what reads first and then writes what follows from it, and has no row of its own to lock."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session


def decide_alone(session: Session, name: str) -> None:
    """Hold ``name`` until the transaction ends; who else asks for it waits. SQLite has one writer at a time anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
