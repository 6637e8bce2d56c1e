"""``hdcs vm export|refresh``: a VM's disk leaves, or is made anew on the published version of its image."""

from __future__ import annotations

from typing import Any

import click

from hdcs_tasks.cli import output, plans, waiting
from hdcs_tasks.cli.options import (
    SELECTOR_KEYS,
    Face,
    confirm,
    confirm_device,
    export_options,
    key_option,
    named,
    pass_face,
    reason_option,
    select,
    selector_options,
    wait_options,
    yes_option,
)

REFRESH = (
    output.Column("name"), output.column("domain_node"), output.Column("was", "stands on"),
    output.Column("image", "to"), output.Column("needs_yes", "needs --yes"),
)  # fmt: skip


@click.command()
@click.argument("name")
@click.argument("target", metavar="FILE|DEVICE")
@export_options
@reason_option
@key_option
@wait_options
@pass_face
def export(
    face: Face, /, name: str, target: str, dry_run: bool, yes: bool, key: str | None, wait: bool,
    timeout_s: float | None, form: str, **wanted: Any,
) -> None:  # fmt: skip
    """Write a VM's disk, flattened, to a file, an OVA with its shape, or a physical disk.

    FILE is a name in the export/ folder of its domain node's storage, or a path in a folder that HDCS_EXPORT_PATHS
    of its server nodes allows. FILE.json beside it is the manifest: hashes, sizes, the machine's shape. A running VM
    runs on: its disk leaves as it was at one moment, its file systems frozen for that moment if its agent answers.

    \b
    Examples:
      hdcs vm export desk-001 desk-001.ova
      hdcs vm export desk-001 desk-001.vmdk --force
      hdcs vm export desk-001 /dev/sdb --node node1
    """
    ask = face.cloud.vms[name].export
    if dry_run:
        plans.conclude_look(ask(target, dry_run=True, **wanted).explain(), form)
        return
    confirm_device(target, wanted["node"], yes)
    operation = ask(target, idempotency_key=key, **wanted)
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


@click.command()
@selector_options
@click.option("--dry-run", is_flag=True, help="Print which version each would follow to; change nothing.")
@yes_option
@reason_option
@key_option
@wait_options
@pass_face
def refresh(face: Face, /, dry_run: bool, yes: bool, **options: Any) -> None:
    """Give stopped VMs empty disks on the published version of their image; --yes discards changes.

    What a VM has written is gone; its name, MAC and backups stay. VMs that are disposable (a rule of their profile,
    or the tag "disposable") are not asked for.

    \b
    Examples:
      hdcs vm refresh --tag disposable
      hdcs vm refresh desk-001 --yes
      hdcs vm refresh --home east --dry-run
    """
    selector = {key: options[key] for key in SELECTOR_KEYS}
    chosen = select(face, "refresh", options["names"], options["every"], selector)
    found = [face.cloud.vms[name].refresh(dry_run=True).explain() for name in chosen.names]
    if dry_run:
        output.print_rows(found, REFRESH, options["form"])
        return
    asked = [plan["name"] for plan in found if plan["needs_yes"]]
    if asked:
        confirm(f"Discard what {named(asked)} wrote to disk?", yes)

    def one(name: str, key: str | None) -> Any:
        return face.cloud.vms[name].refresh(discard=bool(asked), reason=options["reason"], idempotency_key=key)

    waiting.act(
        chosen, one, key=options["key"], form=options["form"], wait=options["wait"], timeout_s=options["timeout_s"]
    )


COMMANDS = (export, refresh)
