"""Content to recognise: patterns written into VMs' disks, running or stopped, and looked for again later.

A note is a byte pattern in one slot of a disk. It goes through QEMU's own block layer, as a guest's write would:
bitmaps see it, backups must carry it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import libvirt
import libvirt_qemu

from deploy.lab import SRV
from deploy.lab.center import Center
from hdcs_tasks.errors import HdcsError
from tests.chaos.checker import open_host

SLOTS = 12
SLOT_BYTES = 64 * 1024
FIRST_BYTE = 8 * 1024 * 1024
DISK_BYTES = 16 * 1024 * 1024
IMAGE_PATTERN = 0xA5
IMAGE_BYTES = 1024 * 1024

Notes = dict[int, int]


def make_image(path: Path) -> None:
    """A small image that boots nothing; its first MiB has a pattern every VM cloned from it must show."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(DISK_BYTES)], check=True)
    subprocess.run(["qemu-io", "-c", f"write -q -P {IMAGE_PATTERN} 0 {IMAGE_BYTES}", str(path)], check=True)


def _command(slot: int, pattern: int) -> str:
    return f"write -q -P {pattern} {FIRST_BYTE + slot * SLOT_BYTES} {SLOT_BYTES}"


def disk(vm_id: str) -> str:
    """The VM's disk as every server node sees it."""
    return str(SRV / "vms" / vm_id / "disk0.qcow2")


def write(center: Center, vm: Mapping[str, str], slot: int, pattern: int) -> bool:
    """Write a note into the VM's disk, by its QEMU where it runs. False: it changed its place meanwhile."""
    try:
        if vm["server_node"]:
            return _write_running(center, vm, slot, pattern)
        return _write_stopped(center, vm, slot, pattern)
    except (HdcsError, libvirt.libvirtError, subprocess.SubprocessError):
        return False


def _write_running(center: Center, vm: Mapping[str, str], slot: int, pattern: int) -> bool:
    _ask_qemu(center, vm, _command(slot, pattern), "flush")
    return True


def _ask_qemu(center: Center, vm: Mapping[str, str], *commands: str) -> None:
    with open_host(center, vm["server_node"]) as host:
        guest = host.guest(vm["id"])
        shown = json.loads(libvirt_qemu.qemuMonitorCommand(guest, '{"execute":"query-block"}', 0))
        device = next(d["qdev"] for d in shown["return"] if d.get("inserted") and "virtio-disk0" in d["qdev"])
        for command in commands:
            said = libvirt_qemu.qemuMonitorCommand(guest, f'qemu-io -d {device} "{command}"', 1)
            if said.strip():
                raise HdcsError(f"the note was not written: {said}")


def _write_stopped(center: Center, vm: Mapping[str, str], slot: int, pattern: int) -> bool:
    node = center.lab.domain_nodes[vm["home"]][0]
    argv = ["qemu-io", "-f", "qcow2", "-c", _command(slot, pattern), disk(vm["id"])]
    return center.lab.run(node, argv, timeout_s=30, check=False).returncode == 0


def wrong_running(center: Center, vm: Mapping[str, str], notes: Notes) -> str:
    """What is not as it should be in the disk of a VM that runs; '' if all is there."""
    _ask_qemu(center, vm, "flush")
    return wrong(center, vm["home"], vm["id"], notes, "--force-share")


def wrong(center: Center, home: str, vm_id: str, notes: Notes, *options: str) -> str:
    """What is not as it should be in the disk of a VM that does not run; '' if all is there."""
    node = center.lab.domain_nodes[home][0]
    argv = ["qemu-io", *options, "-r", "-f", "qcow2", "-c", f"read -q -P {IMAGE_PATTERN} 0 {IMAGE_BYTES}"]
    for slot in range(SLOTS):
        argv += ["-c", f"read -q -P {notes.get(slot, 0)} {FIRST_BYTE + slot * SLOT_BYTES} {SLOT_BYTES}"]
    done = center.lab.run(node, [*argv, disk(vm_id)], timeout_s=60, check=False)
    bad = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "; ".join(bad) if bad or done.returncode else ""
