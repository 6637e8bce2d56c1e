"""``hdcs doctor``, ``hdcs dashboard`` and ``hdcs db``: looking after the control plane."""

from __future__ import annotations

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.options import Face, format_option, pass_face

CHECKS = output.columns("check", "ok", "message", "next", "repaired")


@click.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended, and look once more.")
@format_option
@click.pass_context
def doctor(ctx: click.Context, repair: bool, form: str) -> None:
    """Check database, Redis, sweeps, server nodes, operations, VMs and reservations. Exit code 1 if a check fails.

    --repair does at once what sweeps do in time, and settles VMs that failed by what their server nodes see of them:
    running, suspended, or stopped where all have looked and none has a guest. Where one could not, nothing is done.

    \b
    Examples:
      hdcs doctor
      hdcs doctor --repair
      hdcs doctor -f json
    """
    checks = ctx.ensure_object(Face).cloud.doctor(repair=repair)
    output.print_rows(checks, CHECKS, form)
    if not all(check["ok"] for check in checks):
        ctx.exit(1)


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5555, show_default=True, help="Flower's port.")
@format_option
def dashboard(port: int, form: str) -> None:
    """Print how to open Flower, the dashboard of workers, queues and live progress.

    \b
    Examples:
      hdcs dashboard
    """
    command = "celery -A hdcs_tasks.app flower --conf=deploy/flowerconfig.py"
    told = {
        "start": f"HDCS_FLOWER_AUTH=USER:PASSWORD HDCS_FLOWER_PORT={port} {command}",
        "open": f"http://127.0.0.1:{port}/", "from_elsewhere": f"ssh -L {port}:127.0.0.1:{port} HOST",
    }  # fmt: skip
    output.print_one(told, form)


@click.group()
def db() -> None:
    """The database of the control plane."""


@db.command()
@format_option
@pass_face
def upgrade(face: Face, form: str) -> None:
    """Bring the database HDCS_DATABASE_URL names to this version's schema.

    Every program of the control plane does so when it starts; this is for doing it beforehand.

    \b
    Examples:
      hdcs db upgrade
    """
    face.cloud  # noqa: B018 - opening the cloud upgrades the database
    output.message("the database is at this version's schema")
    if form != "table":
        output.print_one({"upgraded": True}, form)
