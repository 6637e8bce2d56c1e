"""``hdcs idle``: which desktops are taken back when nobody uses them, and how."""

from __future__ import annotations

from typing import Any

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.options import (
    DURATION,
    SIZE,
    Face,
    delete_records,
    enabled_option,
    format_option,
    pass_face,
    yes_option,
)

RUNGS = ("warn", "suspend", "save", "stop", "delete")


def _ladder(policy: dict[str, Any]) -> str:
    return ", ".join(f"{rung} {output.in_seconds(policy[rung])}" for rung in RUNGS if policy[rung] is not None)


COLUMNS = (
    output.Column("name"), output.Column("enabled"), output.Column("rank"), output.Column("selector"),
    output.Column("ladder"), output.Column("inside"), output.Column("force"),
)  # fmt: skip
SEEN = (
    output.Column("name"), output.Column("state"), output.Column("policy"), output.column("idle_s", "idle"),
    output.Column("used"), output.Column("users"), output.Column("processes"), output.Column("consoles"),
    output.Column("cpu"), output.Column("disk"), output.Column("net"), output.Column("then"),
)  # fmt: skip


@click.group()
def idle() -> None:
    """Idle policies: desktops nobody uses are warned, suspended, saved, stopped or deleted.

    A desktop is idle when no console client is connected, nobody is logged in, no user's processes run, and CPU, disk
    and network stay under the policy's limits. VMs tagged always-on and those of warm pools are left alone.
    """


@idle.command()
@click.argument("name")
@click.option("--all", "every", is_flag=True, help="Every VM.")
@click.option("--vm", "names", multiple=True, help="This VM (may be given several times).")
@click.option("--tag", default=None, help="VMs with this tag.")
@click.option("--owner", default=None, help="VMs of this owner.")
@click.option("--home", default=None, metavar="DOMAIN_NODE", help="VMs of this domain node.")
@click.option("--profile", default=None, help="VMs of this profile.")
@click.option("--warn", type=DURATION, default=None, help="Say so in the guest after so long.")
@click.option("--suspend", type=DURATION, default=None, help="Suspend it after so long.")
@click.option("--save", type=DURATION, default=None, help="Save its memory and end its guest after so long.")
@click.option("--stop", type=DURATION, default=None, help="Stop it after so long.")
@click.option("--delete", type=DURATION, default=None, help="Delete it after so long (only once it is at rest).")
@click.option("--cpu", "cpu_percent", type=click.FloatRange(0), default=None,
              help="Up to this share of one vCPU counts as quiet, in percent (10).")  # fmt: skip
@click.option("--disk", "disk_bytes_s", type=SIZE, default=None, help="The same for its disk, per second (512K).")
@click.option("--net", "net_bytes_s", type=SIZE, default=None, help="The same for its network, per second (64K).")
@click.option("--inside/--outside", default=True, show_default=True,
              help="Ask the guest agent who is logged in and whose processes run, or not.")  # fmt: skip
@click.option("--force", is_flag=True, help="A stop pulls the plug.")
@click.option("--message", default="", help="What is shown in the guest.")
@click.option("--rank", type=int, default=100, show_default=True, help="Of several for a VM the lowest counts.")
@format_option
@pass_face
def create(
    face: Face, /, name: str, every: bool, names: tuple[str, ...], tag: str | None, owner: str | None, home: str | None,
    profile: str | None, form: str, **more: Any,
) -> None:  # fmt: skip
    """Create an idle policy. Each time is counted from when the desktop was last used; a suspended desktop that is
    stopped is switched off.

    \b
    Examples:
      hdcs idle create office --tag office --warn 25m --save 30m
      hdcs idle create kiosks --tag kiosk --stop 10m --delete 1d --force
      hdcs idle create one --vm desk-004 --suspend 1h --stop 8h --rank 1
    """
    chosen = {"names": list(names), "tag": tag, "owner": owner, "home": home, "profile": profile}
    selector = {key: value for key, value in chosen.items() if value}
    if every == bool(selector):
        raise click.UsageError("Select VMs with --vm, --tag, --owner, --home or --profile, or all of them with --all.")
    output.print_one(face.cloud.idle.create(name, selector=selector, **more), form)


@idle.command("list")
@format_option
@pass_face
def list_(face: Face, form: str) -> None:
    """List the idle policies.

    \b
    Examples:
      hdcs idle list
    """
    rows = face.cloud.idle.list()
    if form != "json":
        rows = [row | {"ladder": _ladder(row)} for row in rows]
    output.print_rows(rows, COLUMNS, form)


@idle.command()
@click.argument("name")
@format_option
@pass_face
def show(face: Face, name: str, form: str) -> None:
    """Show one idle policy.

    \b
    Examples:
      hdcs idle show office -f json
    """
    output.print_one(face.cloud.idle.show(name), form)


@idle.command()
@click.argument("name")
@enabled_option("Let it take desktops back, or not.")
@format_option
@pass_face
def switch(face: Face, name: str, enabled: bool, form: str) -> None:
    """Switch an idle policy on or off.

    \b
    Examples:
      hdcs idle switch office --off
    """
    output.print_one(face.cloud.idle.enable(name, enabled), form)


@idle.command()
@click.argument("name")
@yes_option
@format_option
@pass_face
def delete(face: Face, name: str, yes: bool, form: str) -> None:
    """Delete an idle policy; what it has taken back stays as it is.

    \b
    Examples:
      hdcs idle delete office -y
    """
    delete_records("idle policy", [name], lambda each: face.cloud.idle.delete(each), yes, form)


def flat(seen: dict[str, Any]) -> dict[str, Any]:
    """A desktop of the preview as one row of the table."""
    signals = seen["signals"]
    if seen["exempt"]:
        then = f"never: {seen['exempt']}"
    elif seen["next"] is None:
        then = "nothing more" if seen["idle_s"] is not None else "not observed yet"
    else:
        then = f"{seen['next']} " + ("now" if seen["in_s"] <= 0 else f"in {output.in_seconds(seen['in_s'])}")
    told = signals["says"] or ""
    cpu = signals["cpu_percent"]
    return seen | {
        "users": _who(signals["users"], told), "processes": _who(signals["processes"], ""),
        "consoles": signals["console_clients"], "cpu": None if cpu is None else f"{cpu:.0f} %",
        "disk": _rate(signals["disk_bytes_s"]), "net": _rate(signals["net_bytes_s"]), "then": then,
    }  # fmt: skip


def _who(names: list[str] | None, told: str) -> str:
    return told or "not looked yet" if names is None else ", ".join(names) or "nobody"


def _rate(bytes_s: float | None) -> str | None:
    return None if bytes_s is None else f"{output.in_bytes(bytes_s)}/s"
