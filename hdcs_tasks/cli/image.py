"""``hdcs image``: the disks VMs are cloned from."""

from __future__ import annotations

import click

from hdcs_tasks.cli import output, waiting
from hdcs_tasks.cli.options import (
    Face,
    confirm,
    format_option,
    key_option,
    named,
    pass_face,
    wait_options,
    yes_option,
)

COLUMNS = (
    output.Column("name"), output.Column("version"), output.column("virtual_size_bytes", "virtual size"),
    output.Column("copies"), output.column("created_at", "created"),
    output.Column("sha256", "sha256", lambda value: f"{value[:12]}…" if value else "-"),
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


@image.command()
@click.argument("names", nargs=-1, required=True, metavar="IMAGE...")
@yes_option
@wait_options
@pass_face
def delete(face: Face, names: tuple[str, ...], yes: bool, wait: bool, timeout_s: float | None, form: str) -> None:
    """Delete image versions (NAME is the newest, NAME:VERSION that one) no VM is derived from.

    \b
    Examples:
      hdcs image delete mini:1 -y
    """
    confirm(f"Delete {named(names, 'image')}?", yes)
    opened, refused = waiting.each(names, face.cloud.images.delete)
    one = len(names) == 1
    waiting.conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=one, refused=refused)
