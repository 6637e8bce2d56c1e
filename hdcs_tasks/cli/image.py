"""``hdcs image``: the disks VMs are cloned from."""

from __future__ import annotations

from typing import Any

import click

from hdcs_tasks.cli import output, plans, waiting
from hdcs_tasks.cli.options import (
    Face,
    confirm,
    confirm_device,
    export_options,
    format_option,
    key_option,
    named,
    pass_face,
    reason_option,
    wait_options,
    yes_option,
)

COLUMNS = (
    output.Column("name"), output.Column("version"), output.column("virtual_size_bytes", "virtual size"),
    output.Column("copies"), output.Column("published", "published on"), output.column("created_at", "created"),
    output.Column("sha256", "sha256", lambda value: f"{value[:12]}…" if value else "-"),
)  # fmt: skip
PUBLISHED = (
    output.column("domain_node"), output.Column("was", "was version"), output.Column("copied", "to be copied"),
    output.Column("vms", "vms behind"),
)  # fmt: skip


@click.group()
def image() -> None:
    """Images: golden disks to clone from, versioned."""


@image.command("list")
@format_option
@pass_face
def list_(face: Face, form: str) -> None:
    """List the images with their copies' state in each domain node.

    \b
    Examples:
      hdcs image list
      hdcs image list -f json
    """
    output.print_rows(face.cloud.images.list(), COLUMNS, form)


@image.command()
@click.argument("name")
@click.argument("file")
@click.option("--domain-node", "domain_nodes", multiple=True, help="Only there (may be repeated). Default: everywhere.")
@key_option
@wait_options
@pass_face
def add(
    face: Face, name: str, file: str, domain_nodes: tuple[str, ...], key: str | None, wait: bool,
    timeout_s: float | None, form: str,
) -> None:  # fmt: skip
    """Add a disk file as an image to the storage of the domain nodes.

    FILE is an absolute path on the server nodes. A name that exists becomes its next version.

    \b
    Examples:
      hdcs image add mini /srv/incoming/mini.qcow2
      hdcs image add mini /srv/incoming/mini.qcow2 --domain-node east --no-wait
    """
    operation = face.cloud.images.add(name, file, domain_nodes=domain_nodes, idempotency_key=key)
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


@image.command()
@click.argument("name")
@click.argument("domain_node")
@key_option
@wait_options
@pass_face
def copy(
    face: Face, name: str, domain_node: str, key: str | None, wait: bool, timeout_s: float | None, form: str
) -> None:
    """Bring an image to another domain node's storage, from one that has it.

    Only data travels (holes do not), a copy that was cut off goes on where it was, and it counts once its hash is that
    of the image.

    \b
    Examples:
      hdcs image copy mini west
      hdcs image copy mini:1 west --no-wait
    """
    operation = face.cloud.images.copy(name, domain_node, idempotency_key=key)
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


@image.command("import")
@click.argument("name")
@click.argument("source", metavar="FILE|DEVICE")
@click.option("--domain-node", "domain_nodes", multiple=True,
              help="There; others named get copies (repeatable). Default: that with most free storage.")  # fmt: skip
@click.option("--node", default=None, metavar="SERVER_NODE", help="The server node that reads it; a device needs one.")
@click.option("--source-format", "format", default=None, help="raw, qcow2, vmdk, vdi, vhdx, vhd, ova. Default: by its "
              "header; a raw disk has none, so say raw, unless its name ends in .raw, .img or .dd.")  # fmt: skip
@click.option("--disk", type=int, default=None, help="Which disk of an OVA with several, from 1.")
@click.option("--drivers", is_flag=True, help="Put in virtio drivers by virt-v2v (Windows of another hypervisor).")
@click.option(
    "--profile", default=None, help="Make this profile out of the shape of the OVA's machine; a disk has none."
)
@click.option("--dry-run", is_flag=True, help="Print what is there and where it would go; change nothing.")
@reason_option
@key_option
@wait_options
@pass_face
def import_(
    face: Face, /, name: str, source: str, dry_run: bool, key: str | None, wait: bool, timeout_s: float | None,
    form: str, **wanted: Any,
) -> None:  # fmt: skip
    """Make a new version of an image out of another hypervisor's disk, an OVA or a physical disk.

    FILE is a name in the import/ folder of the domain node's storage, or a path in a folder that HDCS_IMPORT_PATHS
    of its server nodes allows. The result is a flat, sparse qcow2. Nothing is left of an import that was cut.

    \b
    Examples:
      hdcs image import office office.ova --profile office
      hdcs image import win10 win10.vmdk --drivers --domain-node east
      hdcs image import lab /dev/sdb --node node1
      hdcs image import lab old-disk --source-format raw --dry-run
    """
    ask = face.cloud.images.import_
    if dry_run:
        plans.conclude_look(ask(name, source, dry_run=True, **wanted).explain(), form)
        return
    operation = ask(name, source, idempotency_key=key, **wanted)
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)
    result = (operation.show()["result"] or {}) if wait else {}
    for warning in result.get("warnings", ()):
        output.message(f"take care: {warning}")
    if (offered := result.get("profile")) and not wanted["profile"]:
        output.message(
            f"its machine had this shape: hdcs profile create {name} --vcpus {offered['vcpus']} "
            f"--memory {offered['memory_mib']}MiB"
        )


@image.command()
@click.argument("name")
@click.argument("target", metavar="FILE|DEVICE")
@export_options
@click.option("--domain-node", default=None, help="Read it there. Default: any that has it.")
@reason_option
@key_option
@wait_options
@pass_face
def export(
    face: Face, /, name: str, target: str, dry_run: bool, yes: bool, key: str | None, wait: bool,
    timeout_s: float | None, form: str, **wanted: Any,
) -> None:  # fmt: skip
    """Write an image (NAME is the newest version, NAME:VERSION that one) to a file, an OVA or a physical disk.

    FILE is a name in the export/ folder of the domain node's storage, or a path in a folder that HDCS_EXPORT_PATHS
    of its server nodes allows. FILE.json beside it is the manifest: hashes, sizes, the machine's shape.

    \b
    Examples:
      hdcs image export office office.ova
      hdcs image export office:2 office.vhdx --domain-node east
      hdcs image export lab /dev/sdb --node node1 --dry-run
    """
    ask = face.cloud.images.export
    if dry_run:
        plans.conclude_look(ask(name, target, dry_run=True, **wanted).explain(), form)
        return
    confirm_device(target, wanted["node"], yes)
    operation = ask(name, target, idempotency_key=key, **wanted)
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


@image.command()
@click.argument("name")
@click.argument("version", type=int)
@click.option(
    "--domain-node", "domain_nodes", multiple=True, help="Only there (repeatable). Default: wherever NAME is."
)
@click.option("--dry-run", is_flag=True, help="Print what would change; change nothing.")
@reason_option
@key_option
@wait_options
@pass_face
def publish(
    face: Face, name: str, version: int, domain_nodes: tuple[str, ...], dry_run: bool, reason: str, key: str | None,
    wait: bool, timeout_s: float | None, form: str,
) -> None:  # fmt: skip
    """Let clones of an image take this version from now on; it is copied to where it is not yet.

    VMs that stand on another version follow with `hdcs vm refresh`.

    \b
    Examples:
      hdcs image publish office 2
      hdcs image publish office 1 --domain-node east --reason 'version 2 does not print'
    """
    if dry_run:
        plan = face.cloud.images.publish(name, version, domain_nodes=domain_nodes, dry_run=True).explain()
        if form == "json":
            output.print_json(plan)
        else:
            output.print_rows(plan["domain_nodes"], PUBLISHED, form)
        return
    operation = face.cloud.images.publish(name, version, domain_nodes=domain_nodes, reason=reason, idempotency_key=key)
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


@image.command()
@click.argument("names", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--force", is_flag=True, help="Also one that only backups refer to (they keep a copy), or that is "
              "published.")  # fmt: skip
@yes_option
@wait_options
@pass_face
def delete(
    face: Face, names: tuple[str, ...], force: bool, yes: bool, wait: bool, timeout_s: float | None, form: str
) -> None:
    """Delete image versions (NAME is the newest, NAME:VERSION that one) that nobody uses.

    \b
    Examples:
      hdcs image delete mini:1 -y
      hdcs image delete mini:1 --force -y
    """
    confirm(f"Delete {named(names, 'image')}?", yes)
    opened, refused = waiting.each(names, lambda name: face.cloud.images.delete(name, force=force))
    one = len(names) == 1
    waiting.conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=one, refused=refused)
