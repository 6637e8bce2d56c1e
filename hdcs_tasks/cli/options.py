"""What the commands share: the way to the cloud, options, units, selectors and the question before harm."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.failures import Declined

if TYPE_CHECKING:
    from hdcs_tasks.cloud import Cloud

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Face:
    """A command's way to the cloud, opened at first use: ``--help`` and a usage error need no service."""

    connect: Callable[[], Cloud]

    @cached_property
    def cloud(self) -> Cloud:
        return self.connect()


pass_face = click.make_pass_decorator(Face)


class Duration(click.ParamType[float]):
    """Seconds: ``90``, ``90s``, ``10m``, ``2h`` or ``7d``."""

    name = "duration"
    _units = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", str(value).strip())
        if not found or float(found[1]) <= 0:
            self.fail(f"{value!r} is not a duration: use seconds, or e.g. 90s, 10m, 2h, 7d", param, ctx)
        return float(found[1]) * self._units[found[2]]


class Size(click.ParamType[int]):
    """Bytes: ``512MiB``, ``20GiB``, ``1TiB``; a number needs its unit."""

    name = "size"
    _powers = "KMGT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(iB|B)?", str(value).strip(), re.IGNORECASE)
        if not found:
            self.fail(f"{value!r} is not a size: use a number with its unit, e.g. 512MiB or 20GiB", param, ctx)
        base = 1000 if (found[3] or "").upper() == "B" else 1024
        return round(float(found[1]) * float(base ** (1 + self._powers.index(found[2].upper()))))


DURATION = Duration()
SIZE = Size()


class Form(click.Choice[str]):
    """How data is printed. Where a command also takes an image's format, somebody may mean that one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            others = [each.opts[0] for each in ctx.command.params if each.name == "format"] if ctx else []
            if not others:
                raise
            self.fail(f"{error.message} This is how to print; the image's format: {others[0]}.", param, ctx)


format_option = click.option(
    "-f", "--format", "form", type=Form(["table", "json", "csv"]), default="table", show_default=True,
    help="How to print the data; json and csv hold raw numbers with the unit in the field's name.",
)  # fmt: skip
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
reason_option = click.option("--reason", default="", help="Why; kept with the operation.")
bandwidth_option = click.option(
    "--bandwidth-mib-s", type=click.IntRange(min=1), default=None, help="At most so many MiB/s per move. Default: any."
)
key_option = click.option(
    "--idempotency-key",
    "key",
    default=None,
    help="The same request with the same key is done once; another one is refused.",
)


def wait_options(command: F) -> F:
    """``--wait/--no-wait``, ``--timeout`` and ``-f``, for a command that opens an operation."""
    command = click.option(
        "--timeout", "timeout_s", type=DURATION, default=None,
        help="Stop waiting after this long (exit code 7; the operation goes on). Default: wait until it ends.",
    )(command)  # fmt: skip
    command = click.option(
        "--wait/--no-wait", default=True, show_default=True,
        help="Wait for the end and show progress, or print the operation's id and return.",
    )(command)  # fmt: skip
    return format_option(command)


def export_options(command: F) -> F:
    """How an image or a VM leaves."""
    options = (
        click.option("--as", "format", default=None, metavar="FORMAT",
                     help="raw, qcow2, vmdk, vdi, vhdx, vhd or ova. Default: as the name ends, else qcow2."),
        click.option("--compress", is_flag=True, help="Compress a qcow2."),
        click.option("--force", is_flag=True, help="Replace the file, or what the device holds."),
        click.option("--node", default=None, metavar="SERVER_NODE",
                     help="The server node that writes it; a device needs one."),
        click.option("--dry-run", is_flag=True, help="Print what would be written over; change nothing."),
        yes_option,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def selector_options(command: F) -> F:
    """VMs by name, or by what they have in common."""
    options = (
        click.option("--all", "every", is_flag=True, help="Every VM the command can be given to."),
        click.option("--tag", default=None, help="VMs with this tag."),
        click.option("--home", default=None, metavar="DOMAIN_NODE", help="VMs of this domain node."),
        click.option("--node", "server_node", default=None, metavar="SERVER_NODE", help="VMs on this server node."),
        click.option("--owner", default=None, help="VMs of this owner."),
        click.option("--state", default=None, help="VMs in this state."),
    )
    for option in reversed(options):
        command = option(command)
    return click.argument("names", nargs=-1, metavar="[VM]...")(command)


def drain_options(command: F) -> F:
    """How a drain moves what it moves."""
    options = (
        click.option("--concurrency", type=click.IntRange(min=1), default=2, show_default=True,
                     help="Moves under way at once."),
        bandwidth_option,
        click.option("--dry-run", is_flag=True, help="Print what would move where, and what would stay and why."),
        reason_option,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def vm_rule_options(command: F) -> F:
    """Rules about where VMs may run, of a profile or a clone request."""
    options = (
        click.option("--node-tag", "node_tags", multiple=True, help="Only on server nodes with this tag (repeatable)."),
        click.option("--together", multiple=True, metavar="TAG",
                     help="On the server node of a running VM with this tag, where there is one (repeatable)."),
        click.option("--apart", multiple=True, metavar="TAG",
                     help="Never on the server node of a VM with this tag (repeatable)."),
        click.option("--disposable", is_flag=True, default=None,
                     help="Their disks may be thrown away: a refresh does not ask."),
        click.option("--memory-overcommit", type=float, default=None, help="Claim only 1/RATIO of the memory."),
        click.option("--vcpu-overcommit", type=float, default=None, help="Claim only 1/RATIO of the vCPUs."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def vm_rules(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of ``vm_rule_options`` that were given out of ``options``."""
    keys = ("node_tags", "together", "apart", "disposable", "memory_overcommit", "vcpu_overcommit")
    return changes({key: options.pop(key) for key in keys})


def changes(options: dict[str, Any], defaults: tuple[str, ...] = ()) -> dict[str, Any]:
    """The rules to change: what was given, and None for each named by ``--default``."""
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()
             if value is not None and value != ()}  # fmt: skip
    return given | {name.replace("-", "_"): None for name in defaults}


SELECTOR_KEYS = ("tag", "home", "server_node", "owner", "state")


@dataclass(frozen=True)
class Selection:
    """The VMs a command acts on. ``one``: it was given exactly one name, so its output is one object, not a list.
    ``chosen_by``: the selector they were found by ({}: all), if they were not named."""

    names: list[str]
    one: bool
    chosen_by: dict[str, Any] | None = None


def select(face: Face, verb: str, names: Sequence[str], every: bool, selector: dict[str, Any]) -> Selection:
    """The named VMs; or, of the selected ones, those ``verb`` can be given to. Neither, or both, is a usage error."""
    wanted = {key: value for key, value in selector.items() if value is not None}
    if names and (every or wanted):
        raise click.UsageError("Give names or a selector (--all, --tag, --home, …), not both.")
    if names:
        unique = list(dict.fromkeys(names))
        return Selection(unique, one=len(unique) == 1)
    if not every and not wanted:
        raise click.UsageError("Name at least one VM, or select with --all, --tag, --home, --node, --owner or --state.")
    found = [vm["name"] for vm in face.cloud.vms.that_can(verb, **wanted)]
    if not found and (tag := wanted.get("tag")) and not face.cloud.vms.list(tag=tag):
        tags = sorted({each for vm in face.cloud.vms.list() for each in vm["tags"]})
        output.message(f"no VM has tag {tag!r}; there are: {', '.join(tags) or 'none'}")
    return Selection(found, False, wanted)


def confirm(question: str, yes: bool) -> None:
    """Ask on the terminal before harm. In a pipe nobody can answer: then only ``-y`` goes on."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError(f"{question} There is no terminal to ask on: nothing was done. Add -y to do it.")
    if not click.confirm(question, err=True):
        raise Declined("nothing was done")


def enabled_option(text: str) -> Callable[[F], F]:
    """``--on/--off`` of what can be switched; ``text`` says what it is for."""
    return click.option("--on/--off", "enabled", default=True, help=text)


def delete_records(
    noun: str, names: Sequence[str], delete: Callable[[str], object], yes: bool, form: str, *, ask: str = "",
    told: str = "",
) -> None:  # fmt: skip
    """Ask, delete these records, and say so. ``ask``: what goes with them; ``told``: what becomes of them."""
    confirm(f"Delete {named(names, noun)}{ask}?", yes)
    for name in names:
        delete(name)
        output.message(f"{noun} {name} is deleted{told}")
    if form != "table":
        output.print_rows([{"name": name, "deleted": True} for name in names], output.columns("name", "deleted"), form)


def confirm_device(target: str, node: str | None, yes: bool) -> None:
    """Ask before a whole device is overwritten."""
    if node is not None and target.startswith("/dev/"):
        confirm(f"Overwrite device {target} of server node {node}?", yes)


def named(names: Sequence[str], noun: str = "VM") -> str:
    """``VM desk-01``, or ``12 VMs (a, b, c, …)``: what a question is about."""
    if len(names) == 1:
        return f"{noun} {names[0]}"
    return f"{len(names)} {noun}s ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
