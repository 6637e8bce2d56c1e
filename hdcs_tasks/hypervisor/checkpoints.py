"""Checkpoints of a VM's disk: the dirty bitmaps that increments are made from, and libvirt's records of them.

Two kinds. The **seed** bitmap is in the disk from its clone on and marks every cluster of the VM's own layer, so that a
full backup "since the seed" holds that layer and never the base image. The others are backup points. The bitmaps
live in the qcow2 file and survive stop, kill of libvirtd and live migration; libvirt's records survive neither
stop nor migration and are put back with ``redefine_checkpoints``. A QEMU that dies breaks the bitmaps it had open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import libvirt

from hdcs_tasks.errors import BackupBroken, HypervisorRefused, NotFound, WrongState
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors

SEED = "hdcs-seed"
DISK_TARGET = "vda"

_REDEFINE = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE


def export_checkpoints(host: Host, vm_id: str) -> list[str]:
    """XML of every checkpoint libvirt knows of the guest, parents first: what ``redefine_checkpoints`` takes."""
    guest = host.guest(vm_id)
    with libvirt_errors(f"read the checkpoints of guest {vm_id}"):
        found = guest.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
        return [str(each.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)) for each in found]


def redefine_checkpoints(host: Host, vm_id: str, xmls: Sequence[str]) -> None:
    """Put libvirt's records back (parents first), after a start or at the target of a migration.

    Checkpoints it knows already are left alone. A parent that is neither known nor given before is left out: it was
    dropped after the record was made, and increments need the checkpoint alone. Each is checked against the bitmap
    in the running guest's disk: if one is missing or broken, all are deleted and BackupBroken is raised (the next
    backup is a full one).
    """
    guest = host.guest(vm_id)
    known = set(checkpoint_names(guest))
    try:
        for xml in xmls:
            name = name_of(xml)
            if name not in known:
                with libvirt_errors(f"redefine checkpoint {name} of guest {vm_id}"):
                    guest.checkpointCreateXML(_without_lost_parent(xml, known), _REDEFINE)
                known.add(name)
    except BackupBroken:
        delete_all_checkpoints(host, vm_id)
        raise


def define_seed(guest: Any, disk_target: str = DISK_TARGET) -> bool:
    """Tell libvirt of the seed bitmap in the running ``guest``'s disk. False if it is missing or broken."""
    if SEED in checkpoint_names(guest):
        return True
    try:
        with libvirt_errors("define the seed checkpoint"):
            guest.checkpointCreateXML(checkpoint_xml(SEED, disk_target), _REDEFINE)
    except BackupBroken:
        return False
    return True


def checkpoint_names(guest: Any) -> list[str]:
    with libvirt_errors("list checkpoints"):
        found = guest.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
        return [str(each.getName()) for each in found]


def checkpoint_xml(name: str, disk_target: str = DISK_TARGET, *, others: Sequence[str] = ()) -> str:
    """A ``<domaincheckpoint>`` for one disk; ``others`` are targets explicitly left out.

    The creation time is what libvirt asks for in a redefinition (any but 0, which it forgets); it sets its own for
    a new checkpoint.
    """
    root = ElementTree.Element("domaincheckpoint")
    ElementTree.SubElement(root, "name").text = name
    ElementTree.SubElement(root, "creationTime").text = "1"
    disks = ElementTree.SubElement(root, "disks")
    ElementTree.SubElement(disks, "disk", name=disk_target, checkpoint="bitmap", bitmap=name)
    for other in others:
        ElementTree.SubElement(disks, "disk", name=other, checkpoint="no")
    return ElementTree.tostring(root, encoding="unicode")


def delete_checkpoint(host: Host, vm_id: str, name: str) -> bool:
    """Delete one checkpoint with its bitmap. False if it was not there, or the guest is not here."""
    guest = host.lookup(vm_id)
    return guest is not None and _delete(guest, name)


def keep_checkpoints(host: Host, vm_id: str, *names: str) -> list[str]:
    """Delete every checkpoint but the seed and ``names``; returns the deleted. Call when a new point is published.

    Each bitmap records on its own, so one newer point needs none of the older ones; each costs write speed.
    """
    guest = host.guest(vm_id)
    gone = [name for name in checkpoint_names(guest) if name not in (SEED, *names)]
    for name in gone:
        _delete(guest, name)
    return gone


def delete_all_checkpoints(host: Host, vm_id: str) -> None:
    """Delete all checkpoints, seed included: with their bitmaps where QEMU still can, else libvirt's record alone.

    ``bitmaps.ensure_seed`` makes the disk fit for increments again at the next start.
    """
    guest = host.lookup(vm_id)
    if guest is None:
        return
    for name in reversed(checkpoint_names(guest)):
        try:
            _delete(guest, name)
        except (BackupBroken, WrongState, HypervisorRefused):
            _delete(guest, name, libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def _delete(guest: Any, name: str, flags: int = 0) -> bool:
    try:
        with libvirt_errors(f"delete checkpoint {name}"):
            guest.checkpointLookupByName(name, 0).delete(flags)
    except NotFound:
        return False
    return True


def _without_lost_parent(xml: str, known: set[str]) -> str:
    root = ElementTree.fromstring(xml)
    parent = root.find("parent")
    if parent is None or parent.findtext("name") in known:
        return xml
    root.remove(parent)
    return ElementTree.tostring(root, encoding="unicode")


def name_of(xml: str) -> str:
    return ElementTree.fromstring(xml).findtext("name") or ""
