"""``hdcs backup``: points of VMs' backup chains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hdcs_tasks.cli import output, waiting
from hdcs_tasks.cli.options import (
    DURATION,
    F,
    Face,
    confirm,
    format_option,
    key_option,
    named,
    pass_face,
    reason_option,
    select,
    selector_options,
    wait_options,
    yes_option,
)

if TYPE_CHECKING:
    from hdcs_tasks.cloud import Operation


def _copy(copy: dict[str, Any]) -> str:
    good = copy["state"] == "ready"
    return str(copy["domain_node"]) + ("" if good else f" ({copy['state']})")


COLUMNS = (
    output.Column("id", "id", output.short_id), output.Column("vm_name", "vm"), output.Column("kind"),
    output.Column("seq"), output.Column("state"), output.Column("domain_node", "domain node"),
    output.column("file_bytes", "size"), output.column("created_at", "created"),
    output.Column("copies", "copies", lambda copies: ", ".join(_copy(each) for each in copies) or "-"),
    output.Column("proven_at", "proven", lambda at: output.in_time(at) if at else "never"),
)  # fmt: skip
PLAN = (
    output.Column("keep"), output.Column("merge"), output.Column("drop"), output.column("drop_bytes", "freed"),
)  # fmt: skip


def keep_options(command: F) -> F:
    """How many points stay: ``last``, ``daily``, ``weekly``, ``monthly``, and ``merge``."""
    options = (
        click.option("--last", type=click.IntRange(0), default=1, show_default=True, help="Keep the newest so many."),
        click.option("--daily", type=click.IntRange(0), default=0, help="Keep the newest of each of so many days."),
        click.option("--weekly", type=click.IntRange(0), default=0, help="Keep the newest of each of so many weeks."),
        click.option("--monthly", type=click.IntRange(0), default=0, help="Keep the newest of each of so many months."),
        click.option("--merge", is_flag=True, help="Take points out of the middle of a chain, too, by merging them."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def backup() -> None:
    """Backups: a full one and its increments, per VM."""


@backup.command()
@selector_options
@click.option("--full", is_flag=True, help="Begin a new chain with a full backup.")
@click.option("--bandwidth", "mib_s", type=click.IntRange(1), default=None, help="Copy at most so many MiB/s.")
@reason_option
@key_option
@wait_options
@pass_face
def create(
    face: Face, /, names: tuple[str, ...], every: bool, full: bool, mib_s: int | None, reason: str, key: str | None,
    wait: bool, timeout_s: float | None, form: str, **selector: Any,
) -> None:  # fmt: skip
    """Back up VMs: each one's own layer; after the first, only what changed.

    \b
    Examples:
      hdcs backup create desk-001
      hdcs backup create --home east --no-wait
      hdcs backup create desk-001 desk-002 --full
    """
    chosen = select(face, "backup", names, every, selector)

    def one(vm: str, vm_key: str | None) -> Operation:
        return face.cloud.backups.create(vm, full=full, bandwidth_mib_s=mib_s, idempotency_key=vm_key, reason=reason)

    waiting.act(chosen, one, key=key, form=form, wait=wait, timeout_s=timeout_s)


@backup.command("list")
@click.argument("vm", required=False)
@click.option("--unproven", is_flag=True, help="Only those no drill has brought up yet.")
@format_option
@pass_face
def list_(face: Face, vm: str | None, unproven: bool, form: str) -> None:
    """List the backups, the oldest first; only those of VM (name or id; it may be gone) where one is given.

    \b
    Examples:
      hdcs backup list
      hdcs backup list --unproven
      hdcs backup list desk-001 -f json
    """
    output.print_rows(face.cloud.backups.list(vm, unproven=unproven), COLUMNS, form)


@backup.command()
@click.argument("backup_id")
@format_option
@pass_face
def show(face: Face, backup_id: str, form: str) -> None:
    """Show one backup, in json and csv with its manifest. An id may be cut to 6 or more characters.

    \b
    Examples:
      hdcs backup show 5be20c1f
      hdcs backup show 5be20c1f -f json
    """
    shown = face.cloud.backups.show(backup_id)
    if form == "table":
        manifest = shown.pop("manifest") or {}
        shown |= {key: manifest.get(key) for key in ("consistency", "base", "sha256")}
    output.print_one(shown, form)


@backup.command()
@click.argument("backup_id")
@click.option("--name", default=None, help="Name of the new VM.")
@click.option("--in-place", is_flag=True, help="Set back the disk of the stopped VM it was taken of.")
@click.option("--domain-node", default=None, help="Where to restore it. Default: where it lies.")
@click.option("--start/--no-start", default=True, show_default=True, help="Start it when it is there.")
@yes_option
@key_option
@wait_options
@pass_face
def restore(
    face: Face, backup_id: str, name: str | None, in_place: bool, domain_node: str | None, start: bool, yes: bool,
    key: str | None, wait: bool, timeout_s: float | None, form: str,
) -> None:  # fmt: skip
    """Restore a backup: as a new VM of the same shape, or in place.

    \b
    Examples:
      hdcs backup restore 5be20c1f --name desk-001-back
      hdcs backup restore 5be20c1f --name desk-001-back --no-start
      hdcs backup restore 5be20c1f --name desk-001-back --domain-node west
      hdcs backup restore 5be20c1f --in-place -y
    """
    if in_place == (name is not None):
        raise click.UsageError("Give either --name NAME (a new VM) or --in-place.")
    if in_place:
        vm = face.cloud.backups.show(backup_id)["vm_name"]
        confirm(f"Set the disk of VM {vm} back? What was written since is lost.", yes)
    operation = face.cloud.backups.restore(
        backup_id, name=name, in_place=in_place, domain_node=domain_node, start=start, idempotency_key=key
    )
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


@backup.command()
@click.argument("backup_ids", nargs=-1, required=True, metavar="BACKUP_ID...")
@click.option("--drill", is_flag=True, help="Prove them: restore into a throwaway VM, whose guest must come up.")
@click.option("--agent-timeout", "agent_s", type=DURATION, default="10m", show_default=True,
              help="How long the guest may take to come up in a drill.")  # fmt: skip
@click.option("--domain-node", default=None, help="Verify the copy there instead of the first one.")
@wait_options
@pass_face
def verify(
    face: Face, backup_ids: tuple[str, ...], drill: bool, agent_s: float, domain_node: str | None, wait: bool,
    timeout_s: float | None, form: str,
) -> None:  # fmt: skip
    """Check backups, and every link below them, against the hashes in their manifests; or prove them by a drill.

    \b
    Examples:
      hdcs backup verify 5be20c1f
      hdcs backup verify 5be20c1f --drill
    """

    def one(backup_id: str) -> Operation:
        if drill:
            return face.cloud.backups.drill(backup_id, timeout_s=agent_s)
        return face.cloud.backups.verify(backup_id, domain_node=domain_node)

    opened, refused = waiting.each(backup_ids, one)
    single = len(backup_ids) == 1
    waiting.conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=single, refused=refused)


@backup.command()
@click.argument("backup_id")
@click.argument("name")
@click.option("--domain-node", default=None, help="From the copy in this one's storage. Default: where it lies.")
@key_option
@wait_options
@pass_face
def extract(
    face: Face, backup_id: str, name: str, domain_node: str | None, key: str | None, wait: bool,
    timeout_s: float | None, form: str,
) -> None:  # fmt: skip
    """Restore the disk alone, as the plain file import/NAME.qcow2 of the domain node's storage.

    \b
    Examples:
      hdcs backup extract 5be20c1f desk-001-monday
    """
    operation = face.cloud.backups.extract(backup_id, name, domain_node=domain_node, idempotency_key=key)
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


@backup.command()
@click.argument("backup_ids", nargs=-1, required=True, metavar="BACKUP_ID...")
@click.option("--to", required=True, metavar="DOMAIN_NODE", help="The domain node that gets the copy.")
@click.option("--bandwidth", "mib_s", type=click.IntRange(1), default=None, help="Copy at most so many MiB/s.")
@wait_options
@pass_face
def copy(
    face: Face, backup_ids: tuple[str, ...], to: str, mib_s: int | None, wait: bool, timeout_s: float | None, form: str
) -> None:
    """Keep a second copy in another domain node's storage, with all a backup stands on; it is verified there.

    \b
    Examples:
      hdcs backup copy 5be20c1f --to west
    """
    opened, refused = waiting.each(
        backup_ids, lambda backup_id: face.cloud.backups.copy(backup_id, to, bandwidth_mib_s=mib_s)
    )
    one = len(backup_ids) == 1
    waiting.conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=one, refused=refused)


@backup.command()
@click.argument("vms", nargs=-1, required=True, metavar="VM...")
@keep_options
@click.option("--dry-run", is_flag=True, help="Only print what would be kept, merged and dropped.")
@yes_option
@wait_options
@pass_face
def prune(
    face: Face, /, vms: tuple[str, ...], dry_run: bool, yes: bool, wait: bool, timeout_s: float | None, form: str,
    **keep: Any,
) -> None:  # fmt: skip
    """Drop the backups of VMs that need not stay; what a kept one stands on stays. A VM may be gone already.

    \b
    Examples:
      hdcs backup prune desk-001 --last 3 --daily 7 --weekly 4 --dry-run
      hdcs backup prune desk-001 --last 3 --merge -y
    """
    if dry_run:
        plans = [face.cloud.backups.prune(vm, dry_run=True, **keep).explain() for vm in vms]
        output.print_rows(plans, (output.Column("vm"), *PLAN), form)
        return
    confirm(f"Prune the backups of {named(vms)}?", yes)
    opened, refused = waiting.each(vms, lambda vm: face.cloud.backups.prune(vm, **keep))
    waiting.conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=len(vms) == 1, refused=refused)


@backup.command()
@click.argument("domain_node")
@wait_options
@pass_face
def adopt(face: Face, domain_node: str, wait: bool, timeout_s: float | None, form: str) -> None:
    """Read the manifests in a domain node's storage back into the record.

    \b
    Examples:
      hdcs backup adopt east
    """
    operation = face.cloud.backups.adopt(domain_node)
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


@backup.command()
@click.argument("backup_ids", nargs=-1, required=True, metavar="BACKUP_ID...")
@yes_option
@wait_options
@pass_face
def delete(face: Face, backup_ids: tuple[str, ...], yes: bool, wait: bool, timeout_s: float | None, form: str) -> None:
    """Delete backups no later one builds on; those of a chain may be named in any order.

    \b
    Examples:
      hdcs backup delete 5be20c1f -y
      hdcs backup delete 5be20c1f 7c01aa9e -y
    """
    confirm(f"Delete {named(backup_ids, 'backup')}?", yes)
    by_vm: dict[str, list[str]] = {}
    for backup_id in backup_ids:
        shown = face.cloud.backups.show(backup_id)
        by_vm.setdefault(shown["vm_id"], []).append(shown["id"])
    groups = {", ".join(output.short_id(each) for each in ids): ids for ids in by_vm.values()}
    opened, refused = waiting.each(list(groups), lambda group: face.cloud.backups.delete(*groups[group]))
    waiting.conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=len(groups) == 1, refused=refused)
