"""``hdcs storm``: desktops that are to be ready at a time."""

from __future__ import annotations

from typing import Any

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.options import DURATION, Face, delete_records, enabled_option, format_option, pass_face, yes_option

COLUMNS = (
    output.Column("name"), output.Column("enabled"), output.Column("schedule"), output.Column("desktops"),
    output.column("next_at", "ready at"), output.column("begins_at", "begins"), output.column("lead_s", "lead"),
    output.Column("lead_by", "lead by"), output.Column("last_run", "last run"),
)  # fmt: skip
RUNS = (
    output.column("slot_at", "ready at"), output.column("began_at", "began"), output.Column("wanted"),
    output.Column("in_time", "in time"), output.Column("ready"), output.column("last_ready_at", "last ready"),
    output.Column("closed", "ended"), output.Column("refused"),
)  # fmt: skip
READY = (output.Column("vm"), output.column("ready_at", "ready"))


@click.group()
def storm() -> None:
    """Storms: desktops that are to be ready at a time."""


@storm.command()
@click.argument("name")
@click.option("--when", "schedule", required=True, help="When they are to be ready: weekdays 09:00, daily 08:30, "
              "weekly mon,thu 09:00, hourly :15, monthly 1 09:00; UTC.")  # fmt: skip
@click.option("--vm", "names", multiple=True, help="Start this VM (may be given several times).")
@click.option("--tag", default=None, help="Start VMs with this tag; with --image, the clones get it.")
@click.option("--owner", default=None, help="Start VMs of this owner; with --image, whose the clones are.")
@click.option("--home", default=None, metavar="DOMAIN_NODE",
              help="Start VMs of this domain node; with --image, where the clones go.")  # fmt: skip
@click.option("--image", default=None, help="Clone from this image what is missing.")
@click.option("--count", type=click.IntRange(1), default=None, help="With --image: how many desktops there are to be.")
@click.option("--name", "pattern", default=None, help="With --image: their names, as in 'a-{:02d}'.")
@click.option("--profile", default=None, help="With --image: their hardware shape. Default: small.")
@click.option("--lead", "lead_s", type=DURATION, default=None,
              help="Begin so long before. Default: as long as they took to get ready so far.")  # fmt: skip
@format_option
@pass_face
def create(
    face: Face, /, name: str, schedule: str, names: tuple[str, ...], tag: str | None, owner: str | None,
    home: str | None, image: str | None, count: int | None, pattern: str | None, profile: str | None,
    lead_s: float | None, form: str,
) -> None:  # fmt: skip
    """Have desktops ready at a time: VMs that are there, or clones of an image (which are started again next time).

    \b
    Examples:
      hdcs storm create class-a --when 'weekdays 09:00' --tag class-a
      hdcs storm create class-b --when 'weekly mon,thu 13:00' --image mini --count 60 --name 'b-{:02d}' --home east
    """
    selector: dict[str, Any] = {"names": list(names), "tag": tag, "owner": owner, "home": home}
    if image is None:
        if count or pattern or profile:
            raise click.UsageError("--count, --name and --profile are for clones: name their --image too.")
        chosen = {key: value for key, value in selector.items() if value}
        if not chosen:
            raise click.UsageError("Select VMs with --vm, --tag, --owner or --home, or clone them from an --image.")
        found = face.cloud.storms.create(name, schedule=schedule, selector=chosen, lead_s=lead_s)
    else:
        if names:
            raise click.UsageError("--vm starts VMs that are there; --image clones new ones: give one of them.")
        clone = {"image": image, "count": count, "name": pattern, "profile": profile, "tag": tag, "owner": owner,
                 "domain_node": home}  # fmt: skip
        found = face.cloud.storms.create(name, schedule=schedule, clone=clone, lead_s=lead_s)
    _print(found, form)


@storm.command("list")
@format_option
@pass_face
def list_(face: Face, form: str) -> None:
    """List the storms with their next time.

    \b
    Examples:
      hdcs storm list
    """
    output.print_rows([view | {"last_run": _told(view)} for view in face.cloud.storms.list()], COLUMNS, form)


def _told(view: dict[str, Any]) -> str:
    """The last run in one cell."""
    if not view["runs"]:
        return ""
    run = view["runs"][0]
    return f"{run['in_time']} of {run['wanted']} in time"


def _print(view: dict[str, Any], form: str) -> None:
    output.print_one(view, form, hide=("runs",) if form == "table" else ())
    if form == "table" and view["runs"]:
        click.echo("")
        output.print_table(view["runs"], RUNS)


@storm.command()
@click.argument("name")
@format_option
@pass_face
def show(face: Face, name: str, form: str) -> None:
    """Show one storm: its next time, its runs, and which desktop of the last run was ready when.

    \b
    Examples:
      hdcs storm show class-a
    """
    view = face.cloud.storms.show(name)
    _print(view, form)
    if form == "table" and view["runs"] and view["runs"][0]["ready_at"]:
        click.echo("")
        moments = sorted(view["runs"][0]["ready_at"].items(), key=lambda each: (each[1], each[0]))
        output.print_table([{"vm": vm, "ready_at": at} for vm, at in moments], READY)


@storm.command()
@click.argument("name")
@format_option
@pass_face
def run(face: Face, name: str, form: str) -> None:
    """Run a storm now, besides its schedule.

    \b
    Examples:
      hdcs storm run class-a
    """
    _print(face.cloud.storms.run(name), form)


@storm.command()
@click.argument("name")
@enabled_option("Let it run by its schedule, or not.")
@format_option
@pass_face
def enable(face: Face, name: str, enabled: bool, form: str) -> None:
    """Switch a storm on or off.

    \b
    Examples:
      hdcs storm enable class-a --off
    """
    _print(face.cloud.storms.enable(name, enabled), form)


@storm.command()
@click.argument("name")
@yes_option
@format_option
@pass_face
def delete(face: Face, name: str, yes: bool, form: str) -> None:
    """Delete a storm; its desktops stay.

    \b
    Examples:
      hdcs storm delete class-a -y
    """
    delete_records("storm", [name], lambda each: face.cloud.storms.delete(each), yes, form, told="; its desktops stay")
