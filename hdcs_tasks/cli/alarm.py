"""``hdcs alarm``: what is wrong, what was, and whether the notices arrive."""

from __future__ import annotations

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.options import Face, format_option, pass_face

ALARMS = (
    output.Column("id", "id", output.short_id), output.Column("severity"), output.Column("state"),
    output.Column("kind"), output.Column("subject"), output.column("raised_at", "raised"), output.Column("message"),
    output.Column("next"),
)  # fmt: skip
HISTORY = (
    output.Column("id", "id", output.short_id), output.Column("severity"), output.Column("state"),
    output.Column("kind"), output.Column("subject"), output.column("raised_at", "raised"),
    output.Column("acknowledged_by", "by"), output.column("cleared_at", "cleared"), output.Column("message"),
)  # fmt: skip
TARGETS = output.columns("target", "ok", "message")


@click.group()
def alarm() -> None:
    """Alarms: what is wrong and lasts, raised once, acknowledged, cleared."""


@alarm.command("list")
@format_option
@pass_face
def list_(face: Face, form: str) -> None:
    """What is wrong now: alarms that are raised or acknowledged, critical ones first.

    \b
    Examples:
      hdcs alarm list
      hdcs alarm list -f json
    """
    output.print_rows(face.cloud.alarms.list(), ALARMS, form)


@alarm.command()
@click.argument("alarm_id", metavar="ALARM")
@format_option
@pass_face
def show(face: Face, alarm_id: str, form: str) -> None:
    """One alarm with the notices that went out about it.

    \b
    Examples:
      hdcs alarm show 1f3a9c04
    """
    output.print_one(face.cloud.alarms.show(alarm_id), form)


@alarm.command()
@click.argument("alarm_ids", metavar="ALARM...", nargs=-1, required=True)
@click.option("--note", default="", help="What is being done; kept with the alarm.")
@format_option
@pass_face
def ack(face: Face, alarm_ids: tuple[str, ...], note: str, form: str) -> None:
    """Acknowledge: somebody looks after it. It is cleared by itself when all is well again.

    An alarm about something that happened once (operation_stuck) is cleared by that.

    \b
    Examples:
      hdcs alarm ack 1f3a9c04 --note 'disk ordered'
    """
    output.print_rows([face.cloud.alarms.acknowledge(i, note=note) for i in alarm_ids], ALARMS, form)


@alarm.command()
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@format_option
@pass_face
def history(face: Face, limit: int, form: str) -> None:
    """Alarms of all times, that which changed last first.

    \b
    Examples:
      hdcs alarm history --limit 20
    """
    output.print_rows(face.cloud.alarms.history(limit), HISTORY, form)


@alarm.command()
@format_option
@click.pass_context
def test(ctx: click.Context, form: str) -> None:
    """Send a test notice to every target in HDCS_ALARM_URLS_FILE, now. Exit code 1 if one did not take it.

    \b
    Examples:
      hdcs alarm test
    """
    found = ctx.ensure_object(Face).cloud.alarms.test()
    output.print_rows(found, TARGETS, form)
    if not all(row["ok"] for row in found):
        ctx.exit(1)
