"""Alembic's environment: one upgrade at a time, all of it in one transaction.

``store.migrate`` hands the engine over; the ``alembic`` program (pyproject.toml) makes one of HDCS_DATABASE_URL.
New revision: alter ``models.py``, then ``alembic revision --autogenerate -m "why" --rev-id 0002``.
"""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import DateTime, Engine, text

import hdcs_tasks.store.models_watch  # noqa: F401 - its tables are part of the schema
from hdcs_tasks.config import settings
from hdcs_tasks.store.engine import make_engine
from hdcs_tasks.store.models import Base, StateColumn, UtcDateTime

# Any constant: what two control planes that start together meet at.
ADVISORY_LOCK = 0x48444353


def render(kind: str, item: Any, _: AutogenContext) -> str | Literal[False]:
    """Our column types as plain ones: a revision must not change when ``models.py`` does."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, StateColumn):
        return "sa.String(length=20)"
    return False


def same_type(_context: Any, _inspected: Any, _metadata: Any, inspected: Any, model: Any) -> bool | None:
    """Whether the types differ; None leaves it to alembic. SQLite keeps no zone, so only the kind can be compared."""
    if isinstance(model, UtcDateTime):
        return not isinstance(inspected, DateTime)
    return None


def run() -> None:
    given: Engine | None = context.config.attributes.get("engine")
    engine = given or make_engine(context.config.get_main_option("sqlalchemy.url") or settings().database_url)
    try:
        # SQLite: the engine begins IMMEDIATE, so the second upgrade waits here and then finds nothing to do.
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
            context.configure(
                connection=connection, target_metadata=Base.metadata, render_item=render, compare_type=same_type,
                render_as_batch=connection.dialect.name == "sqlite",
            )  # fmt: skip
            with context.begin_transaction():
                context.run_migrations()
    finally:
        if given is None:
            engine.dispose()


if context.is_offline_mode():
    raise SystemExit("upgrades read the database: run without --sql")
run()
