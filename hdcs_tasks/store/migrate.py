"""Bringing a database to the present schema (alembic; the revisions are in ``migrations/``)."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from hdcs_tasks.store.engine import make_engine


def _config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    # alembic reads '%' as the start of an interpolation
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def upgrade(url: str) -> None:
    """Bring the database at ``url`` to the newest revision. Costs one query when it is there already."""
    config = _config(url)
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            present = MigrationContext.configure(connection).get_current_heads()
        if set(present) != set(ScriptDirectory.from_config(config).get_heads()):
            config.attributes["engine"] = engine
            command.upgrade(config, "head")
    finally:
        engine.dispose()
