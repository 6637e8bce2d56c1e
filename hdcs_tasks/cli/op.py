"""``hdcs op``: operations, what was asked and what became of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from hdcs_tasks.cli import output, plans, waiting
from hdcs_tasks.cli.options import DURATION, Face, format_option, pass_face

COLUMNS = (
    output.Column("id", "id", output.short_id), output.Column("kind"), output.Column("subject"), output.Column("state"),
    output.column("percent"), output.Column("phase"), output.Column("requested_by", "by"),
    output.column("created_at", "asked"), output.column("seconds", "took"),
)  # fmt: skip
STEP_COLUMNS = (
    output.Column("seq", "step"), output.Column("name"), output.Column("queue"), output.Column("state"),
    output.Column("attempt"), output.Column("node"), output.column("waited_s"), output.column("worked_s"),
    output.Column("error"),
)  # fmt: skip
ATTEMPT_COLUMNS = (
    output.Column("step"), output.Column("attempt"), output.Column("node"), output.column("took_s"),
    output.Column("error"),
)  # fmt: skip
CHILD_COLUMNS = output.columns("id", "kind", "subject", "state", "percent", "phase", "eta_s", "seconds")
LEFT_COLUMNS = (output.Column("name", "not moved"), output.Column("why"))


@click.group()
def op() -> None:
    """Operations: what was asked, by whom, and what became of it."""


@op.command("list")
@click.option("--live", is_flag=True, help="Only those that have not ended.")
@click.option("--vm", default=None, help="Only those of this VM.")
@click.option("--kind", default=None, help="Only those of this kind, e.g. vm.clone.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@format_option
@pass_face
def list_(face: Face, live: bool, vm: str | None, kind: str | None, limit: int, form: str) -> None:
    """List the newest operations first.

    \b
    Examples:
      hdcs op list --live
      hdcs op list --vm desk-001 --kind vm.start -f json
    """
    output.print_rows(face.cloud.operations.list(live=live, vm=vm, kind=kind, limit=limit), COLUMNS, form)


@op.command()
@click.argument("operation_id")
@format_option
@pass_face
def show(face: Face, operation_id: str, form: str) -> None:
    """Show one operation: its steps with queue, server node, attempts and times, and its children.

    An id may be cut to 6 or more characters.

    \b
    Examples:
      hdcs op show 1f3a9c04
      hdcs op show 1f3a9c04 -f json
    """
    view = face.cloud.operations[operation_id].show()
    if form != "table":
        output.print_one(view, form)
        return
    output.print_one(view, form, hide=("steps", "children", "error", "decision"))
    if view["error"]:
        click.echo(output.printable(f"\nerror: {_told(view['error'])}"))
    if left := (view["error"] or {}).get("details", {}).get("left"):
        click.echo("")
        output.print_table([{"name": name, "why": why} for name, why in sorted(left.items())], LEFT_COLUMNS)
    if view["decision"]:
        click.echo("")
        plans.print_decision(view["decision"])
    if view["steps"]:
        click.echo("")
        output.print_table([_step_row(step) for step in view["steps"]], STEP_COLUMNS)
        _print_attempts(view["steps"])
    if view["children"]:
        click.echo("")
        told = (output.Column("error"),) if any(child["error"] for child in view["children"]) else ()
        children = [child | {"error": _told(child["error"])} for child in view["children"]]
        output.print_table(children, (*CHILD_COLUMNS, *told))


def _told(error: dict[str, Any] | None) -> str:
    return f"{error.get('code', 'error')}: {error.get('message', '')}" if error else ""


def _step_row(step: dict[str, Any]) -> dict[str, Any]:
    waited_s = _between(step["published_at"], step["started_at"])
    return step | {
        "waited_s": waited_s, "worked_s": _between(step["started_at"], step["ended_at"]), "error": _told(step["error"]),
    }  # fmt: skip


def _between(start: str | None, end: str | None) -> float | None:
    """Seconds from one ISO moment to the other."""
    if not start or not end:
        return None
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def _print_attempts(steps: list[dict[str, Any]]) -> None:
    """Every attempt of the steps that needed more than one."""
    rows = [
        {
            "step": step["seq"], "attempt": tried["attempt"], "node": tried["node"], "error": _told(tried["error"]),
            # Of one whose executor was lost nobody knows when it began.
            "took_s": tried["ended_at"] - tried["started_at"] if tried.get("started_at") else None,
        }
        for step in steps if len(step["history"]) > 1 or step["attempt"] > 1 for tried in step["history"]
    ]  # fmt: skip
    if rows:
        click.echo("")
        output.print_table(rows, ATTEMPT_COLUMNS)


@op.command()
@click.argument("operation_ids", nargs=-1, required=True, metavar="OPERATION_ID...")
@click.option("--timeout", "timeout_s", type=DURATION, default=None, help="Stop watching after this long (exit 7).")
@format_option
@pass_face
def watch(face: Face, operation_ids: tuple[str, ...], timeout_s: float | None, form: str) -> None:
    """Follow operations to their end; the exit code is theirs. Ctrl-C detaches.

    \b
    Examples:
      hdcs op watch 1f3a9c04
      hdcs op watch 1f3a9c04 --timeout 10m -f json
    """
    operations = [face.cloud.operations[operation_id] for operation_id in operation_ids]
    waiting.conclude(operations, form=form, wait=True, timeout_s=timeout_s, one=len(operations) == 1)


@op.command()
@click.argument("operation_ids", nargs=-1, required=True, metavar="OPERATION_ID...")
@format_option
@pass_face
def cancel(face: Face, operation_ids: tuple[str, ...], form: str) -> None:
    """Ask operations, and their children, to stop.

    A step nobody has begun ends at once, one at work when its server node has undone it: watch it.

    \b
    Examples:
      hdcs op cancel 1f3a9c04
    """
    views = [face.cloud.operations[operation_id].cancel() for operation_id in operation_ids]
    output.print_rows(views, output.columns("id", "kind", "subject", "state", "cancel_asked", "phase"), form)
