"""Bringing a database to the present schema (alembic; the revisions are in ``migrations/``)."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from hdcs_tasks.errors import WrongState
from hdcs_tasks.store.engine import make_engine, unreachable


def _config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    # alembic reads '%' as the start of an interpolation
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def upgrade(url: str) -> None:
    """Bring the database at ``url`` to the newest revision. Costs one query when it is there already.

    Processes that upgrade at once queue; the later ones find nothing to do. Raises Unreachable when the database does
    not answer, WrongState when it was made by a newer HDCS.
    """
    config = _config(url)
    engine = make_engine(url)
    try:
        present = _present(engine)
        script = ScriptDirectory.from_config(config)
        if present == set(script.get_heads()):
            return
        _check_known(script, present)
        config.attributes["engine"] = engine
        command.upgrade(config, "head")
    except OperationalError as error:
        raise unreachable(error) from error
    finally:
        engine.dispose()


def _present(engine: Engine) -> set[str]:
    with engine.execution_options(hdcs_read=True).connect() as connection:
        return set(MigrationContext.configure(connection).get_current_heads())


def _check_known(script: ScriptDirectory, present: set[str]) -> None:
    known = {revision.revision for revision in script.walk_revisions()}
    if strange := sorted(present - known):
        raise WrongState(
            f"the database is at revision {', '.join(strange)}, which this version of HDCS does not know",
            next="Run the newer HDCS that upgraded it, or restore the database's backup of before the upgrade",
        )
