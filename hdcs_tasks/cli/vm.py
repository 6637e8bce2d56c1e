"""``hdcs vm``: desktops; looking, cloning, migrating, console. What is done to many at once is in vm_commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from hdcs_tasks.cli import output, plans, vm_commands, vm_disks, waiting
from hdcs_tasks.cli.options import (
    DURATION,
    Face,
    bandwidth_option,
    format_option,
    key_option,
    pass_face,
    reason_option,
    vm_rule_options,
    vm_rules,
    wait_options,
)

COLUMNS = (
    output.Column("name"), output.Column("state"), output.Column("home"), output.Column("server_node", "server node"),
    output.Column("profile"), output.column("memory_mib"), output.Column("ip"), output.Column("port"),
    output.Column("owner"), output.Column("tags"), output.column("ready_at", "ready"),
    output.Column("warm_pool", "warm pool"),
)  # fmt: skip


@click.group()
def vm() -> None:
    """VMs: the desktops."""


for _command in (*vm_commands.COMMANDS, *vm_disks.COMMANDS):
    vm.add_command(_command)


@vm.command("list")
@click.option("--state", default=None, help="Only those in this state.")
@click.option("--home", default=None, metavar="DOMAIN_NODE", help="Only those of this domain node.")
@click.option("--node", "server_node", default=None, metavar="SERVER_NODE", help="Only those on this server node.")
@click.option("--owner", default=None, help="Only those of this owner.")
@click.option("--profile", default=None, help="Only those of this profile.")
@click.option("--tag", default=None, help="Only those with this tag.")
@format_option
@pass_face
def list_(face: Face, /, form: str, **filters: Any) -> None:
    """List the VMs by name.

    \b
    Examples:
      hdcs vm list
      hdcs vm list --home east --state running -f json
    """
    output.print_rows(face.cloud.vms.list(**filters), COLUMNS, form)


@vm.command()
@click.argument("name")
@format_option
@pass_face
def show(face: Face, name: str, form: str) -> None:
    """Show one VM.

    \b
    Examples:
      hdcs vm show desk-001
    """
    output.print_one(face.cloud.vms[name].show(), form)


@vm.command()
@click.argument("image")
@click.option("--name", required=True, help="Name of the VM, or a pattern with a number: 'desk-{:03d}'.")
@click.option("--count", type=int, default=1, show_default=True, help="How many.")
@click.option("--profile", default="small", show_default=True, help="Their hardware shape.")
@click.option("--domain-node", default=None, help="Where. Default: where they fit best.")
@click.option("--start", is_flag=True, help="Start them too.")
@click.option("--warm", is_flag=True, help="Take ready ones out of a warm pool where there are any; start the others.")
@click.option("--owner", default="", help="Whose they are. Default: yours.")
@click.option("--tag", "tags", multiple=True, help="A tag to find them by (may be repeated).")
@click.option("--on", "pin", default=None, metavar="SERVER_NODE", help="Pin them to this server node.")
@vm_rule_options
@click.option("--dry-run", is_flag=True, help="Print where they would go, or why they do not fit; change nothing.")
@reason_option
@key_option
@wait_options
@pass_face
def clone(
    face: Face, /, image: str, dry_run: bool, key: str | None, wait: bool, timeout_s: float | None, form: str,
    **wanted: Any,
) -> None:  # fmt: skip
    """Clone VMs from an image (NAME is its newest version, NAME:VERSION that one).

    \b
    Examples:
      hdcs vm clone mini --name desk-001 --start
      hdcs vm clone mini --name 'desk-{:03d}' --count 30 --profile small --start
      hdcs vm clone mini --name desk-002 --warm
      hdcs vm clone mini:2 --name 'lab-{:02d}' --count 8 --domain-node east --tag lab --dry-run
    """
    rules = {"pin": wanted.pop("pin"), **vm_rules(wanted)}
    rules = {rule: value for rule, value in rules.items() if value is not None}
    asked = face.cloud.vms.clone(image, rules=rules, dry_run=dry_run, idempotency_key=key, **wanted)
    if not dry_run:
        waiting.conclude([asked], form=form, wait=wait, timeout_s=timeout_s)
        return
    plans.conclude(asked.explain(), form)


@vm.command()
@click.argument("name")
@click.argument("to", required=False, metavar="[TARGET]")
@click.option(
    "--live/--offline",
    default=True,
    show_default=True,
    help="Keep the guest running while it moves, or save it and let it go on there.",
)
@bandwidth_option
@click.option(
    "--post-copy",
    "postcopy",
    is_flag=True,
    help="Let it go on there before all of its memory has come (inside a domain node).",
)
@click.option(
    "--auto-converge/--no-auto-converge",
    default=True,
    show_default=True,
    help="Slow a guest down that writes faster than it moves.",
)
@click.option("--dry-run", is_flag=True, help="Print where it would go, and why not elsewhere; change nothing.")
@reason_option
@key_option
@wait_options
@pass_face
def migrate(
    face: Face, /, name: str, to: str | None, dry_run: bool, reason: str, key: str | None, wait: bool,
    timeout_s: float | None, form: str, **options: Any,
) -> None:  # fmt: skip
    """Move a VM to TARGET, a server node or another domain node; without one, to where it fits best in its own.

    Inside a domain node a running VM moves live; a stopped one needs no move. To another domain node its own disk layer
    travels too, live with the running guest or, of a stopped one, as files; the image it stands on is brought once.
    Cancelled (hdcs op cancel), it runs on where it was; offline it goes on from its saved memory, on the server node
    it was on if that still has room, else on another one of its domain node.

    \b
    Examples:
      hdcs vm migrate desk-001
      hdcs vm migrate desk-001 node2 --reason 'new memory for node1'
      hdcs vm migrate desk-001 west --bandwidth-mib-s 100
      hdcs vm migrate desk-001 node2 --offline
      hdcs vm migrate desk-001 --dry-run
    """
    if dry_run:
        plans.conclude(face.cloud.vms[name].migrate(to, dry_run=True, **options).explain(), form)
        return
    operation = face.cloud.vms[name].migrate(to, idempotency_key=key, reason=reason, **options)
    for view in waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s):
        output.message(_moved(view))


def _moved(view: dict[str, Any]) -> str:
    """``desk-001: node1 -> node2, 912 ms, downtime 49 ms, 2.0 MiB``; what nobody measured is left out."""
    found = view["result"] or {}
    if not found.get("moved"):
        return f"{view['subject']} was not moved: {found.get('why', '')}"
    words = [f"{view['subject']}: {found['from']} -> {found['to']}"]
    figures = (("", "total_ms", _in_ms), ("downtime ", "downtime_ms", _in_ms), ("", "bytes", output.in_bytes))
    words += [f"{what}{show(found[key])}" for what, key, show in figures if found.get(key, -1) >= 0]
    return ", ".join(words)


def _in_ms(value_ms: int) -> str:
    return f"{value_ms} ms" if value_ms < 1000 else output.in_seconds(value_ms / 1000)


@vm.command()
@click.argument("name")
@click.argument("policy")
@format_option
@pass_face
def usb(face: Face, name: str, policy: str, form: str) -> None:
    """Set a VM's USB policy: on, off, or a SPICE filter. It takes effect at the next start.

    \b
    Examples:
      hdcs vm usb desk-001 on
      hdcs vm usb desk-001 -- '0x08,-1,-1,-1,1|-1,-1,-1,-1,0'
    """
    output.print_one(face.cloud.vms[name].set_usb(policy), form)
    output.message("it takes effect at the next start")


@vm.command()
@click.argument("name")
@click.option("--ttl", "ttl_s", type=DURATION, default="60s", show_default=True, help="How long the ticket works.")
@click.option("-o", "--output", "path", type=click.Path(dir_okay=False), default=None,
              help="Write the viewer file here, readable by you alone. Default: print it.")  # fmt: skip
@format_option
@pass_face
def console(face: Face, name: str, ttl_s: float, path: str | None, form: str) -> None:
    """Print a virt-viewer file with a ticket for the VM's console that soon expires.

    \b
    Examples:
      hdcs vm console desk-001 | remote-viewer -
      hdcs vm console desk-001 --ttl 5m -o desk-001.vv
    """
    text = face.cloud.vms[name].console(ttl_s=ttl_s)
    if form != "table":
        output.print_one({"vm": name, "ttl_s": ttl_s, "file": path, "viewer": None if path else text}, form)
    elif path is None:
        click.echo(text, nl=False)
    if path is None:
        return
    # Anew and for the owner alone: the text holds a password.
    Path(path).unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    output.message(f"{path} works for {output.in_seconds(ttl_s)}: remote-viewer {path}")


@vm.command()
@click.argument("names", nargs=-1, required=True, metavar="VM...")
@click.option("--timeout", "timeout_s", type=DURATION, default="2m", show_default=True,
              help="Give up after this long (exit code 7).")  # fmt: skip
@format_option
@pass_face
def wait(face: Face, names: tuple[str, ...], timeout_s: float, form: str) -> None:
    """Wait until the guest agent of each VM has answered since its last start.

    \b
    Examples:
      hdcs vm wait desk-001 --timeout 3m
    """
    import time

    end = time.monotonic() + timeout_s
    views = [face.cloud.vms[name].wait_ready(timeout_s=max(0.0, end - time.monotonic())) for name in names]
    output.print_rows(views, COLUMNS, form)
