"""The layout of a domain node's storage, the same on all its server nodes.

    <root>/.hdcs-domain-node      marker: the name of the domain node the storage belongs to
    <root>/images/                disks to clone from
    <root>/vms/<vm_id>/disk0.qcow2
    <root>/backups/  state/  agent/  import/  export/

A server node whose mount lacks the marker, or carries another's, does not join: an unmounted mount point looks like
an empty storage otherwise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import libvirt

from hdcs_tasks.errors import Conflict, Invalid, Rejected
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.routing import check_name

KINDS = ("images", "vms", "backups", "state", "agent", "import", "export")
MARKER = ".hdcs-domain-node"
POOLS = {"images": "hdcs-images", "vms": "hdcs-vms"}
_NAME_MAX_BYTES = 200


@dataclass(frozen=True)
class Volume:
    """A file of a libvirt storage pool. ``capacity_bytes`` is what a guest sees, ``allocation_bytes`` what it takes."""

    name: str
    path: str
    capacity_bytes: int
    allocation_bytes: int


@dataclass(frozen=True)
class StorageLayout:
    """Paths below the mount point ``root`` of a domain node's storage."""

    root: Path

    def path(self, kind: str, *parts: str) -> Path:
        """``<root>/<kind>/<parts…>``; raises Invalid for a path that leads, or is linked, outside of it."""
        if kind not in KINDS:
            raise Invalid(f"the storage has no folder {kind!r}", next=f"Use {', '.join(KINDS)}")
        for part in parts:
            plain = part and part not in (".", "..") and "/" not in part and part.isprintable()
            if not plain or part.startswith("-") or len(part.encode()) > _NAME_MAX_BYTES:
                raise Invalid(f"{part!r} is not a name inside the storage", next="Use one plain file or folder name")
        base = self.root / kind
        made = base.joinpath(*parts)
        if not made.resolve().is_relative_to(base.resolve()):
            raise Invalid(f"{made} is linked out of the storage", next="Remove the link; the storage holds plain files")
        return made

    def contains(self, path: Path) -> bool:
        """Whether ``path``, with links followed, lies in one of the storage's folders."""
        real = path.resolve()
        return any(real.is_relative_to((self.root / kind).resolve()) for kind in KINDS)

    def vm_dir(self, vm_id: str) -> Path:
        return self.path("vms", vm_id)

    def disk(self, vm_id: str, number: int = 0) -> Path:
        return self.path("vms", vm_id, f"disk{number}.qcow2")


def prepare(root: Path, domain_node: str) -> StorageLayout:
    """Make the storage of ``domain_node`` at ``root`` (an existing mount point), or complete one it has.

    Raises Rejected when it belongs to another domain node or ``root`` does not exist.
    """
    check_name("domain node", domain_node)
    if not root.is_dir():
        raise Rejected(f"storage {root} does not exist", next="Mount the domain node's storage there first")
    marker = root / MARKER
    owner = _owner(marker)
    if owner not in (None, domain_node):
        raise Rejected(f"storage {root} belongs to domain node {owner}", next="Choose another storage")
    for kind in KINDS:
        (root / kind).mkdir(mode=0o711 if kind in ("images", "vms") else 0o700, exist_ok=True)
    if owner is None:
        _write_marker(marker, domain_node)
    return StorageLayout(root)


def _write_marker(marker: Path, domain_node: str) -> None:
    """Atomically, so that of two first server nodes of different domain nodes only one gets the storage."""
    partial = marker.with_name(f"{MARKER}.{os.getpid()}")
    partial.write_text(domain_node + "\n")
    try:
        os.link(partial, marker)
    except FileExistsError:
        if _owner(marker) != domain_node:
            raise Conflict(f"storage {marker.parent} was just taken by {_owner(marker)}") from None
    finally:
        partial.unlink()


def _owner(marker: Path) -> str | None:
    try:
        return marker.read_text()[:100].strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(f"cannot read {marker}: {error}", next="Check the mount of the domain node's storage") from error


def check(root: Path, domain_node: str) -> StorageLayout:
    """The layout at ``root`` if it is ``domain_node``'s; else Rejected, saying what is there instead."""
    owner = _owner(root / MARKER)
    if owner is None:
        raise Rejected(
            f"{root} is not the storage of domain node {domain_node}: no {MARKER} there",
            next=f"Mount that of {domain_node} there; for a new one: deploy/agent {root} --domain-node {domain_node}",
        )
    if owner != domain_node:
        raise Rejected(f"storage {root} belongs to domain node {owner}, not {domain_node}", next="Mount the right one")
    missing = [kind for kind in KINDS if not (root / kind).is_dir()]
    if missing:
        raise Rejected(f"storage {root} lacks {', '.join(missing)}", next="Prepare it anew")
    return StorageLayout(root)


def disk_usage(root: Path) -> tuple[int, int]:
    """Total and free bytes of the file system at ``root``; free is what an ordinary user may still write."""
    seen = os.statvfs(root)
    return seen.f_blocks * seen.f_frsize, seen.f_bavail * seen.f_frsize


def pool_xml(name: str, folder: Path) -> str:
    root = ET.Element("pool", type="dir")
    ET.SubElement(root, "name").text = name
    ET.SubElement(ET.SubElement(root, "target"), "path").text = str(folder)
    return ET.tostring(root, encoding="unicode")


def ensure_pools(host: Host, layout: StorageLayout) -> None:
    """Make libvirt's storage pools for images and VMs exist and run at ``layout``'s folders. Idempotent."""
    for kind, name in POOLS.items():
        folder = layout.root / kind
        with libvirt_errors(f"set up storage pool {name}"):
            pool = _current_pool(host, name, folder)
            if pool is None:
                pool = host.conn.storagePoolDefineXML(pool_xml(name, folder), 0)
            if not pool.isActive():
                pool.create(0)
            pool.setAutostart(1)


def _current_pool(host: Host, name: str, folder: Path) -> libvirt.virStoragePool | None:
    """The pool if it exists there; one that points elsewhere is taken away first (its files stay)."""
    try:
        pool = host.conn.storagePoolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_POOL:
            return None
        raise
    if ET.fromstring(pool.XMLDesc(0)).findtext("target/path") == str(folder):
        return pool
    if pool.isActive():
        pool.destroy()
    pool.undefine()
    return None


def volumes(host: Host, kind: str) -> list[Volume]:
    """The files of the "images" or "vms" pool as libvirt sees them now; folders are left out."""
    if kind not in POOLS:
        raise Invalid(f"no storage pool for {kind!r}", next=f"Use {', '.join(POOLS)}")
    with libvirt_errors(f"list storage pool {POOLS[kind]}"):
        pool = host.conn.storagePoolLookupByName(POOLS[kind])
        pool.refresh(0)
        found = []
        for volume in pool.listAllVolumes(0):
            what, capacity, allocation = volume.info()
            if what == libvirt.VIR_STORAGE_VOL_FILE:
                found.append(Volume(volume.name(), volume.path(), capacity, allocation))
    return sorted(found, key=lambda v: v.name)
