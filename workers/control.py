"""The control-plane worker: takes requests, schedules, settles outcomes, runs sweeps. Holds the database.

    python -m workers.control

Start as many as you like, on any host that reaches Redis and the database; beat runs once beside them.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

import click
from celery.signals import worker_ready

import hdcs_tasks.backup.control_tasks
import hdcs_tasks.image.control_tasks
import hdcs_tasks.monitor.control_tasks
import hdcs_tasks.operations.control_tasks
import hdcs_tasks.pool.control_tasks
import hdcs_tasks.vm.control_tasks  # noqa: F401 - importing registers the tasks
from hdcs_tasks.app import app
from hdcs_tasks.config import settings
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import configure_logging, logger
from hdcs_tasks.operations.control_tasks import control
from hdcs_tasks.pool import profiles, rebuild
from hdcs_tasks.routing import CONTROL
from hdcs_tasks.store.migrate import upgrade

log = logger(__name__)


@worker_ready.connect
def _open_for_business(**_: Any) -> None:
    """Do not wait for the first sweep: a new data center's reservations open at once."""
    try:
        profiles.ensure_built_in(control())
        log.info("reservations", state=rebuild.reservation_sweep(control()))
    except HdcsError as error:
        log.warning("not ready yet; the sweeps go on trying", error=str(error))


@click.command(help=__doc__)
@click.option("--concurrency", default=4, show_default=True, help="Threads.")
@click.option("--name", default=socket.gethostname, help="Host part of the worker's name.")
def main(concurrency: int, name: str) -> None:
    configure_logging(settings())
    try:
        upgrade(settings().database_url)
    except HdcsError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    app.worker_main([
        "worker", "--pool", "threads", "--concurrency", str(concurrency), "--queues", CONTROL,
        "--hostname", f"{CONTROL}@{name}", "--without-mingle", "--without-gossip", "--loglevel", settings().log_level,
    ])  # fmt: skip


if __name__ == "__main__":
    main()
