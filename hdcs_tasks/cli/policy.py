"""``hdcs policy``: which VMs are backed up when, what is kept, and what is proven."""

from __future__ import annotations

from typing import Any

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.backup import keep_options
from hdcs_tasks.cli.options import Face, delete_records, enabled_option, format_option, pass_face, yes_option

COLUMNS = (
    output.Column("name"), output.Column("enabled"), output.Column("schedule"), output.Column("selector"),
    output.Column("keep"), output.Column("full_every", "full every"), output.Column("drill_schedule", "drill"),
    output.Column("copy_to", "copy to"),
    output.Column("last_run_at", "last run", lambda at: output.in_time(at) if at else "never"),
    output.Column("pending"),
)  # fmt: skip


@click.group()
def policy() -> None:
    """Backup policies: backups by the calendar."""


@policy.command()
@click.argument("name")
@click.option("--when", "schedule", required=True,
              help="hourly, hourly :15, daily 02:00, weekdays 21:00, weekly sun 03:00, weekly mon,thu 03:00 or monthly "
                   "1 03:00; UTC.")  # fmt: skip
@click.option("--all", "every", is_flag=True, help="Every VM.")
@click.option("--vm", "names", multiple=True, help="This VM (may be given several times).")
@click.option("--tag", default=None, help="VMs with this tag.")
@click.option("--owner", default=None, help="VMs of this owner.")
@click.option("--home", default=None, metavar="DOMAIN_NODE", help="VMs of this domain node.")
@click.option("--full-every", type=click.IntRange(1, 64), default=64, show_default=True,
              help="Begin a new chain after so many points.")  # fmt: skip
@click.option("--full-percent", type=click.IntRange(1), default=None,
              help="Begin a new chain when the increments outgrow this share of the full backup.")  # fmt: skip
@keep_options
@click.option("--bandwidth", "bandwidth_mib_s", type=click.IntRange(1), default=None,
              help="All its backups on one domain node's storage together copy at most so many MiB/s.")  # fmt: skip
@click.option("--concurrency", type=click.IntRange(1), default=2, show_default=True,
              help="Backups at once on one domain node's storage.")  # fmt: skip
@click.option("--copy-to", default=None, metavar="DOMAIN_NODE", help="Keep a second copy in this one's storage.")
@click.option("--drill", "drill_schedule", default=None, help="When to prove points; words as for --when.")
@click.option("--drill-points", type=click.IntRange(1), default=1, show_default=True,
              help="How many points each drill proves: those of VMs never or longest ago proven.")  # fmt: skip
@format_option
@pass_face
def create(
    face: Face, /, name: str, every: bool, names: tuple[str, ...], tag: str | None, owner: str | None, home: str | None,
    form: str, **more: Any,
) -> None:  # fmt: skip
    """Create a policy; it first runs at the next moment it names.

    \b
    Examples:
      hdcs policy create nightly --when 'daily 02:00' --tag office --last 3 --daily 7 --weekly 4
      hdcs policy create safe --when 'daily 02:00' --tag office --last 7 --copy-to west
      hdcs policy create labs --when hourly --home east --full-every 24 --last 24 --drill 'weekly sun 04:00'
    """
    chosen = {"names": list(names), "tag": tag, "owner": owner, "home": home}
    selector = {key: value for key, value in chosen.items() if value}
    if every == bool(selector):
        raise click.UsageError("Select VMs with --vm, --tag, --owner or --home, or all of them with --all.")
    output.print_one(face.cloud.policies.create(name, selector=selector, **more), form)


@policy.command("list")
@format_option
@pass_face
def list_(face: Face, form: str) -> None:
    """List the policies.

    \b
    Examples:
      hdcs policy list
    """
    output.print_rows(face.cloud.policies.list(), COLUMNS, form)


@policy.command()
@click.argument("name")
@format_option
@pass_face
def show(face: Face, name: str, form: str) -> None:
    """Show one policy.

    \b
    Examples:
      hdcs policy show nightly -f json
    """
    output.print_one(face.cloud.policies.show(name), form)


@policy.command()
@click.argument("name")
@format_option
@pass_face
def run(face: Face, name: str, form: str) -> None:
    """Run a policy now, besides its schedule; its backups show in `hdcs op list`.

    \b
    Examples:
      hdcs policy run nightly
    """
    output.print_one(face.cloud.policies.run(name), form)


@policy.command()
@click.argument("name")
@enabled_option("Let it run by its schedule, or not.")
@format_option
@pass_face
def switch(face: Face, name: str, enabled: bool, form: str) -> None:
    """Switch a policy on or off.

    \b
    Examples:
      hdcs policy switch nightly --off
    """
    output.print_one(face.cloud.policies.enable(name, enabled), form)


@policy.command()
@click.argument("name")
@yes_option
@format_option
@pass_face
def delete(face: Face, name: str, yes: bool, form: str) -> None:
    """Delete a policy; its backups stay.

    \b
    Examples:
      hdcs policy delete nightly -y
    """
    delete_records(
        "policy", [name], lambda each: face.cloud.policies.delete(each), yes, form, told="; its backups stay"
    )
