"""``hdcs backup``: points of VMs' backup chains."""

from __future__ import annotations

from typing import Any

import click

from hdcs_tasks.cli import output, waiting
from hdcs_tasks.cli.options import (
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

COLUMNS = (
    output.Column("id", "id", output.short_id), output.Column("vm_name", "vm"), output.Column("kind"),
    output.Column("seq"), output.Column("state"), output.Column("domain_node", "domain node"),
    output.column("file_bytes", "size"), output.column("created_at", "created"), output.column("proven_at", "proven"),
)  # fmt: skip


@click.group()
def backup() -> None:
    """Backups: a full one and its increments, per VM."""


@backup.command()
@selector_options
@click.option("--full", is_flag=True, help="Begin a new chain with a full backup.")
@reason_option
@key_option
@wait_options
@pass_face
def create(
    face: Face, /, names: tuple[str, ...], every: bool, full: bool, reason: str, key: str | None, wait: bool,
    timeout_s: float | None, form: str, **selector: Any,
) -> None:  # fmt: skip
    """Back up VMs: each one's own layer; after the first, only what changed.

    \b
    Examples:
      hdcs backup create desk-001
      hdcs backup create --home east --no-wait
      hdcs backup create desk-001 desk-002 --full
    """
    chosen = select(face, "backup", names, every, selector)
    waiting.act(
        chosen, lambda vm, vm_key: face.cloud.backups.create(vm, full=full, idempotency_key=vm_key, reason=reason),
        key=key, form=form, wait=wait, timeout_s=timeout_s,
    )  # fmt: skip


@backup.command("list")
@click.argument("vm", required=False)
@format_option
@pass_face
def list_(face: Face, vm: str | None, form: str) -> None:
    """List the backups, the oldest first; only those of VM (name or id; it may be gone) where one is given.

    \b
    Examples:
      hdcs backup list
      hdcs backup list desk-001 -f json
    """
    output.print_rows(face.cloud.backups.list(vm), COLUMNS, form)


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
@click.option("--name", required=True, help="Name of the new VM.")
@click.option("--domain-node", default=None, help="Where to restore it. Default: where the backup lies.")
@click.option("--start/--no-start", default=True, show_default=True, help="Start it when it is there.")
@key_option
@wait_options
@pass_face
def restore(
    face: Face, backup_id: str, name: str, domain_node: str | None, start: bool, key: str | None, wait: bool,
    timeout_s: float | None, form: str,
) -> None:  # fmt: skip
    """Restore a backup as a new VM of the same shape.

    \b
    Examples:
      hdcs backup restore 5be20c1f --name desk-001-back
      hdcs backup restore 5be20c1f --name desk-001-back --no-start
    """
    operation = face.cloud.backups.restore(
        backup_id, name=name, domain_node=domain_node, start=start, idempotency_key=key
    )
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


@backup.command()
@click.argument("backup_ids", nargs=-1, required=True, metavar="BACKUP_ID...")
@wait_options
@pass_face
def verify(face: Face, backup_ids: tuple[str, ...], wait: bool, timeout_s: float | None, form: str) -> None:
    """Check backups, and every link below them, against the hashes in their manifests.

    \b
    Examples:
      hdcs backup verify 5be20c1f
    """
    opened, refused = waiting.each(backup_ids, face.cloud.backups.verify)
    one = len(backup_ids) == 1
    waiting.conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=one, refused=refused)


@backup.command()
@click.argument("backup_ids", nargs=-1, required=True, metavar="BACKUP_ID...")
@yes_option
@wait_options
@pass_face
def delete(face: Face, backup_ids: tuple[str, ...], yes: bool, wait: bool, timeout_s: float | None, form: str) -> None:
    """Delete backups no later one builds on.

    \b
    Examples:
      hdcs backup delete 5be20c1f -y
    """
    confirm(f"Delete {named(backup_ids, 'backup')}?", yes)
    opened, refused = waiting.each(backup_ids, face.cloud.backups.delete)
    one = len(backup_ids) == 1
    waiting.conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=one, refused=refused)
