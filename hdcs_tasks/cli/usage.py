"""``hdcs usage`` and ``hdcs quota``: what was used, what it costs, and how much of it one may have."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.options import SIZE, Face, delete_records, format_option, pass_face, yes_option
from hdcs_tasks.errors import Invalid

MIB = 1024 * 1024
GIB_S = 1024**3 * 3600


def _hours(value: Any) -> str:
    return f"{float(value or 0) / 3600:.2f}"


USED = (
    output.Column("vcpu_s", "vCPU h", _hours), output.Column("memory_mib_s", "GiB h", lambda v: _hours(v / 1024)),
    output.Column("disk_byte_s", "disk GiB h", lambda v: f"{v / GIB_S:.2f}"),
    output.Column("backup_byte_s", "backup GiB h", lambda v: f"{v / GIB_S:.2f}"),
    output.Column("console_s", "console h", _hours), output.Column("unobserved_s", "unobserved h", _hours),
    output.Column("cost"),
)  # fmt: skip
HEADS = {
    "vm": (output.Column("vm", "vm", lambda name: name or "all"), output.Column("owner")),
    "owner": (output.Column("owner", "owner", lambda name: name or "-"), output.Column("vms")),
    "tag": (output.Column("tag", "tag", lambda name: name or "-"), output.Column("vms")),
}
QUOTAS = output.columns(
    "owner", "vms", "used_vms", "running_vms", "used_running_vms", "vcpus", "used_vcpus", "memory_mib",
    "used_memory_mib", "disk_bytes", "used_disk_bytes",
)  # fmt: skip


class Moment(click.ParamType[datetime]):
    """``2026-11-01`` or ``2026-11-01T08:00``; in UTC unless it says otherwise."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            found = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a moment: write 2026-11-01 or 2026-11-01T08:00", param, ctx)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found


@click.command()
@click.option("--owner", default=None, help="Of this owner's VMs.")
@click.option("--tag", default=None, help="Of VMs with this tag.")
@click.option("--vm", default=None, help="Of this VM: a name, also of one that is deleted, or an id.")
@click.option("--from", "start", type=Moment(), default=None, help="From this moment on (UTC). Default: this month.")
@click.option("--to", "end", type=Moment(), default=None, help="Until this moment. Default: now.")
@click.option("--month", default=None, metavar="YYYY-MM", help="The statement of one month.")
@click.option("--by", type=click.Choice(["vm", "owner", "tag"]), default="vm", show_default=True,
              help="A row for each of these.")  # fmt: skip
@format_option
@pass_face
def usage(face: Face, /, form: str, **options: Any) -> None:
    """What was used: vCPU, memory, disk, backups, consoles, and what it costs (HDCS_RATES_*).

    JSON and CSV hold the exact sums in seconds: vcpu_s, memory_mib_s, disk_byte_s, backup_byte_s, console_s.
    unobserved_s are seconds in them during which the server node was out of reach.

    \b
    Examples:
      hdcs usage
      hdcs usage --month 2026-11 --by owner -f csv
      hdcs usage --vm desk-001 --from 2026-11-01 --to 2026-11-08
    """
    found = face.cloud.usage(**options)
    if form == "json":
        output.print_json(found)
        return
    output.print_rows(found["rows"], (*HEADS[found["by"]], *USED), form)
    output.message(f"from {output.in_time(found['start'])} to {output.in_time(found['end'])}")


@click.group()
def quota() -> None:
    """Quotas: how much one owner may have."""


@quota.command("list")
@format_option
@pass_face
def list_(face: Face, form: str) -> None:
    """Every quota, with what its owner has in use.

    \b
    Examples:
      hdcs quota list
    """
    output.print_rows(face.cloud.quotas.list(), QUOTAS, form)


class Limit(click.ParamType[str]):
    """A whole number, or ``none``."""

    name = "limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if text != "none" and not text.isdigit():
            self.fail(f"{value!r} is not a number, nor none", param, ctx)
        return text


class SizeLimit(Limit):
    """A size as in 20GiB, or ``none``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return "none" if str(value) == "none" else str(SIZE.convert(value, param, ctx))


@quota.command("set")
@click.argument("owner")
@click.option("--vms", type=Limit(), default=None, help="VMs, or none for no limit.")
@click.option("--running-vms", type=Limit(), default=None, help="VMs that run at once.")
@click.option("--vcpus", type=Limit(), default=None, help="vCPUs of running VMs.")
@click.option("--memory", type=SizeLimit(), default=None, help="Memory of running VMs, e.g. 64GiB.")
@click.option("--disk", type=SizeLimit(), default=None, help="Virtual disk of all VMs, e.g. 2TiB.")
@format_option
@pass_face
def set_(face: Face, /, owner: str, memory: str | None, disk: str | None, form: str, **counts: str | None) -> None:
    """Change limits of one owner; '*' means everybody without a quota. What is in use already stays.

    \b
    Examples:
      hdcs quota set alice --vms 10 --running-vms 5 --memory 32GiB
      hdcs quota set '*' --vms 3
      hdcs quota set alice --vms none
    """
    given = counts | {"disk_bytes": disk, "memory_mib": memory}
    limits = {name: None if text == "none" else int(text) for name, text in given.items() if text is not None}
    if not limits:
        raise click.UsageError("Give at least one limit.")
    if (size := limits.get("memory_mib")) is not None:
        if size % MIB:
            raise Invalid(f"{size} bytes of memory are not whole MiB", next="As in --memory 2048MiB")
        limits["memory_mib"] = size // MIB
    output.print_one(face.cloud.quotas.set(owner, **limits), form)


@quota.command()
@click.argument("owner")
@yes_option
@format_option
@pass_face
def drop(face: Face, owner: str, yes: bool, form: str) -> None:
    """The owner has no quota of their own any more.

    \b
    Examples:
      hdcs quota drop alice -y
    """
    delete_records("quota of", [owner], lambda each: face.cloud.quotas.drop(each), yes, form)
