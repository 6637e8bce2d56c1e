"""A stopped VM's disk replaced by a new one: the old one is kept until the new one is in its place and good.

    disk0.qcow2   the disk          <old>   a second name of the disk as it was          <fresh>   the new one, whole

One rename swaps. An attempt that follows a dead one sees by these names how far that came.
"""

from __future__ import annotations

import os
from pathlib import Path

from hdcs_tasks.errors import Conflict, HypervisorRefused
from hdcs_tasks.hypervisor import disks, guests
from hdcs_tasks.hypervisor.bases import storage_errors
from hdcs_tasks.hypervisor.bitmaps import bitmaps
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.operations.node import Run
from hdcs_tasks.vm.node import CHECKPOINTS, OPEN


def check_stopped(run: Run, vm_id: str, disk: Path) -> None:
    """Conflict where the VM's guest is here, or any server node has its disk open."""
    seen = guests.info(run.ctx.host(), vm_id)
    if seen is not None and seen.active:
        raise Conflict(f"guest {vm_id} runs on {run.ctx.server_node}", next="Stop the VM first")
    if disk.exists():
        bitmaps(disk)  # refused by QEMU's own lock while any server node has the disk open


def set_aside(disk: Path, old: Path) -> None:
    """Give the disk its second name. From here on the next backup is a full one: the kept checkpoints are of it."""
    with storage_errors("setting the current disk aside"):
        (disk.parent / CHECKPOINTS).unlink(missing_ok=True)
        if disk.exists():
            os.link(disk, old)
            disks.sync(disk.parent)


def swap(disk: Path, fresh: Path, old: Path) -> None:
    """Put ``fresh`` in the disk's place and drop ``old``; put that back where the new disk is not good."""
    with storage_errors("swapping the disks"):
        if fresh.exists():
            os.replace(fresh, disk)
            disks.sync(disk.parent)
        try:
            if not bitmaps(disk).get(SEED):
                raise HypervisorRefused("the new disk lacks its seed bitmap", next="Ask again; the old one is back")
        except Exception:
            if old.exists():
                os.replace(old, disk)
                disks.sync(disk.parent)
            raise
        old.unlink(missing_ok=True)
        (disk.parent / OPEN).unlink(missing_ok=True)
