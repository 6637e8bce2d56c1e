"""A guest that has a stopped VM's disk open and never runs: QEMU alone can read and write the bitmaps in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from hdcs_tasks.errors import Conflict, HypervisorRefused
from hdcs_tasks.hypervisor import keys
from hdcs_tasks.hypervisor.checkpoints import DISK_TARGET
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.hypervisor.keys import Key
from hdcs_tasks.hypervisor.layers import header


@contextmanager
def holder(host: Host, vm_id: str, disk: Path, key: Key | None = None) -> Iterator[None]:
    """A guest of ``vm_id`` that has ``disk`` open and never runs; gone at the end, or with the connection."""
    if host.lookup(vm_id) is not None:
        raise Conflict(f"guest {vm_id} is on this host", next="Back up the running guest instead")
    keys.give_to_libvirt(host, key)
    flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY
    try:
        with libvirt_errors(f"open the disk of VM {vm_id}", unsure=True):
            guest = host.conn.createXML(_holder_xml(vm_id, disk, key), flags)
    except HypervisorRefused:
        _refuse_open(disk)  # QEMU may be gone before libvirt has read why
        raise
    try:
        yield
    finally:
        with libvirt_errors(f"close the disk of VM {vm_id}", unsure=True):
            _end_gracefully(guest)


def _refuse_open(disk: Path) -> None:
    try:
        header(disk)
    except HypervisorRefused as error:
        if "lock" in error.message:
            raise Conflict(f"{disk} is in use", next="Another server node runs the VM: hdcs vm list") from error


def _end_gracefully(guest: Any) -> None:
    """End QEMU by SIGTERM, never SIGKILL: killed, it would leave the bitmaps broken."""
    for _ in range(10):
        try:
            guest.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return
            if error.get_error_code() != libvirt.VIR_ERR_SYSTEM_ERROR:
                raise
            time.sleep(0.5)  # QEMU takes its time to write the bitmaps
        else:
            return
    raise HypervisorRefused("the guest that holds the disk does not end", next="Destroy the paused guest backup-<id>")


def _holder_xml(vm_id: str, disk: Path, key: Key | None) -> str:
    root = ElementTree.Element("domain", type="qemu")
    ElementTree.SubElement(root, "name").text = f"backup-{vm_id}"
    ElementTree.SubElement(root, "uuid").text = vm_id
    ElementTree.SubElement(root, "memory", unit="MiB").text = "16"
    ElementTree.SubElement(root, "vcpu").text = "1"
    ElementTree.SubElement(ElementTree.SubElement(root, "os"), "type", machine="pc").text = "hvm"
    devices = ElementTree.SubElement(root, "devices")
    node = ElementTree.SubElement(devices, "disk", type="file", device="disk")
    ElementTree.SubElement(node, "driver", name="qemu", type="qcow2")
    source = ElementTree.SubElement(node, "source", file=str(disk))
    keys.encryption_element(source, key.name if key else None)
    ElementTree.SubElement(node, "target", dev=DISK_TARGET, bus="virtio")
    ElementTree.SubElement(devices, "memballoon", model="none")
    return ElementTree.tostring(root, encoding="unicode")
