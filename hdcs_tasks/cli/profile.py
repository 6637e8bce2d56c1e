"""``hdcs profile``: the hardware shapes VMs are cloned with."""

from __future__ import annotations

from typing import Any

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.options import (
    SIZE,
    Face,
    delete_records,
    format_option,
    pass_face,
    vm_rule_options,
    vm_rules,
    yes_option,
)
from hdcs_tasks.errors import Invalid

COLUMNS = output.columns("name", "vcpus", "memory_mib", "disk_bytes", "usb", "disk_key", "rules")
MIB = 1024 * 1024


@click.group()
def profile() -> None:
    """Profiles: hardware shapes of VMs."""


@profile.command("list")
@format_option
@pass_face
def list_(face: Face, form: str) -> None:
    """List the profiles, the smallest memory first.

    \b
    Examples:
      hdcs profile list
    """
    output.print_rows(face.cloud.profiles.list(), COLUMNS, form)


@profile.command()
@click.argument("name")
@click.option("--vcpus", type=int, required=True, help="Virtual CPUs.")
@click.option("--memory", type=SIZE, required=True, help="Guest memory, e.g. 2GiB; whole MiB.")
@click.option("--disk", type=SIZE, default=None, help="Disk, e.g. 20GiB. Default: as large as the image.")
@click.option("--usb", default="off", show_default=True, help="USB policy: on, off or a SPICE filter.")
@click.option("--disk-key", default="", help="Encrypt the VMs' disks with the key of this name.")
@vm_rule_options
@format_option
@pass_face
def create(
    face: Face, /, name: str, vcpus: int, memory: int, disk: int | None, usb: str, disk_key: str, form: str,
    **options: Any,
) -> None:  # fmt: skip
    """Create a profile.

    \b
    Examples:
      hdcs profile create office --vcpus 2 --memory 3GiB --disk 40GiB
      hdcs profile create secret --vcpus 2 --memory 3GiB --disk-key disks
      hdcs profile create exam --vcpus 2 --memory 2GiB --memory-overcommit 1.5 --apart exam
    """
    if memory % MIB:
        raise Invalid(f"{memory} bytes of memory are not whole MiB", next="As in --memory 2048MiB")
    made = face.cloud.profiles.create(
        name, vcpus=vcpus, memory_mib=memory // MIB, disk_bytes=disk, usb=usb, disk_key=disk_key,
        rules=vm_rules(options),
    )  # fmt: skip
    output.print_one(made, form)


@profile.command()
@click.argument("names", nargs=-1, required=True, metavar="PROFILE...")
@yes_option
@format_option
@pass_face
def delete(face: Face, names: tuple[str, ...], yes: bool, form: str) -> None:
    """Delete profiles; VMs keep the shape they were cloned with.

    \b
    Examples:
      hdcs profile delete office -y
    """
    delete_records("profile", names, lambda each: face.cloud.profiles.delete(each), yes, form)
