"""Database engine and sessions for SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import Conflict, Invalid, Unreachable


def make_engine(url: str) -> Engine:
    """An engine with the pragmas and pool HDCS needs.

    SQLite: write-ahead log, foreign keys, and ``BEGIN IMMEDIATE``, so that two writers queue instead of deadlocking.
    """
    if not url.startswith("sqlite"):
        # psycopg 3 is the driver; a plain postgresql:// URL would ask for psycopg2.
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        return create_engine(url, pool_size=8, max_overflow=8, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        reading = connection.get_execution_options().get("hdcs_read")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


# PostgreSQL's serialization_failure and deadlock_detected: it rolled one of two transactions back.
_RACED = frozenset({"40001", "40P01"})


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).partition("\n")[0].strip()


def unreachable(error: DBAPIError) -> Unreachable:
    return Unreachable(
        f"the database does not answer: {_first_line(error)}", next="Check HDCS_DATABASE_URL and: hdcs doctor"
    )


def _translated(error: DBAPIError) -> Exception:
    """The driver's exception as ours; an IntegrityError stays: only the use case knows what it means."""
    if getattr(error.orig, "sqlstate", None) in _RACED:
        return Conflict(f"the database undid one of two changes at once: {_first_line(error)}", next="Try again")
    if isinstance(error, OperationalError) or error.connection_invalidated:
        return unreachable(error)
    if isinstance(error, DataError):
        return Invalid(
            f"a value does not fit into the record: {_first_line(error)}", next="Use a shorter or smaller value"
        )
    return error


class Store:
    """The record's door: one per process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sessions = sessionmaker(engine, expire_on_commit=False)
        self._readers = sessionmaker(engine.execution_options(hdcs_read=True), expire_on_commit=False)

    @classmethod
    def from_settings(cls, config: Settings) -> Store:
        return cls(make_engine(config.database_url))

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back on an exception."""
        with self._session(self._sessions) as session:
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads: on SQLite it waits for no writer."""
        with self._session(self._readers) as session:
            yield session

    @contextmanager
    def _session(self, make: sessionmaker[Session]) -> Iterator[Session]:
        try:
            with make() as session, session.begin():
                yield session
        except DBAPIError as error:
            raise _translated(error) from error

    def dispose(self) -> None:
        self.engine.dispose()
