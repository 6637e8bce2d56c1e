"""An image from elsewhere becomes a plain, sealed qcow2: converted, sparse, hashed, under its name only when whole.

Whatever a dead worker left carries its attempt in its name (``<target>.<attempt>.partial``, ``….v2v/``) and is swept
by the next attempt, or by the next import into the same storage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import Invalid, NotFound
from hdcs_tasks.hypervisor import conversion, devices, disks, ova, probing, v2v
from hdcs_tasks.hypervisor.conversion import Watch
from hdcs_tasks.hypervisor.probing import Probed
from hdcs_tasks.hypervisor.processes import Cancel

STALE_S = 24 * 3600.0
_SLACK_BYTES = 64 << 20


@dataclass(frozen=True)
class Found:
    """What is to be imported. ``archive``: the OVA it lies in, with the shape of its machine and the hashes
    its manifest vouches for; ``users``: in words, who uses the device it lies on."""

    probed: Probed
    archive: ova.Archive | None = None
    users: tuple[str, ...] = ()

    def shape(self) -> dict[str, Any] | None:
        if self.archive is None:
            return None
        machine = self.archive.machine
        return {
            "name": machine.name, "vcpus": machine.vcpus, "memory_mib": machine.memory_mib, "system": machine.system,
            "disks_bytes": [disk.capacity_bytes for disk in machine.disks],
        }  # fmt: skip

    def warnings(self) -> list[str]:
        """What an operator must know of the image this makes."""
        return [f"{user}: what is written while it is read may be torn in the image" for user in self.users]

    def view(self) -> dict[str, Any]:
        return {
            "format": "ova" if self.archive else self.probed.format, "virtual_size_bytes": self.probed.virtual_bytes,
            "needed_bytes": self.probed.needed_bytes, "shape": self.shape(),
            "files": [path.name for path in self.probed.chain],
            "checksums": len(self.archive.hashes) if self.archive else 0, "warnings": self.warnings(),
        }  # fmt: skip


def find(
    path: Path, root: Path, *, fmt: str | None, disk: int | None, max_bytes: int, cancelled: Cancel | None = None
) -> Found:
    """Look at what is to be imported; nothing is changed. ``fmt``: as ``probing.probe``, or "ova". Raises as that."""
    if fmt == "ova":
        probing.check_inside(path, path, root)
        if not path.is_file():
            raise NotFound(f"there is no file {path}", next="Check its name and folder on that server node")
        archive = ova.read(path)
        named, member = archive.disk(disk)
        probed = probing.probe(
            path, root, max_bytes=max_bytes, offset=member.offset, length_bytes=member.size_bytes, cancelled=cancelled,
            fmt="vmdk" if (named.file or "").lower().endswith(".vmdk") else None,
        )  # fmt: skip
        return Found(probed, archive)
    if disk not in (None, 1):
        raise Invalid(f"{path.name} is one disk, not {disk} of them", next="--disk is for an OVA of several disks")
    probed = probing.probe(path, root, fmt=fmt, max_bytes=max_bytes, cancelled=cancelled)
    return Found(probed, users=tuple(devices.users(path)) if devices.is_device(path) else ())


def bring_in(found: Found, target: Path, watch: Watch, *, attempt: int, drivers_on: str | None = None) -> str:
    """Convert what was found into ``target``; returns its SHA-256. ``drivers_on``: this server node's name; then
    virt-v2v puts in drivers. Nothing half made is left. Raises Conflict (``target`` exists), Invalid, NoCapacity,
    Cancelled, HypervisorRefused."""
    if drivers_on is not None:
        v2v.require(drivers_on)
    needed = found.probed.needed_bytes
    watch.need(needed)
    first = 0.0
    if found.archive is not None and found.archive.hashes:
        ova.verify(found.archive, on_percent=watch.part(0, 15, "checksums"), cancelled=watch.stop)
        first = 15.0
    partial = target.with_name(f"{target.name}.{attempt}.partial")
    folder = target.with_name(f"{target.name}.{attempt}.v2v")
    limit = needed + needed // 8 + _SLACK_BYTES if needed is not None else None
    last = 40.0 if drivers_on else 85.0
    try:
        conversion.convert(
            found.probed.source, partial, "qcow2", watch, watch.part(first, last, "convert"), max_bytes=limit
        )
        whole = partial
        if drivers_on is not None:
            folder.mkdir(mode=0o700)
            watch.part(last, last, "drivers")(0)
            whole = v2v.convert(drivers_on, partial, folder, target.parent.name, watch)
        digest = disks.sha256(whole, on_progress=watch.told(85, 100), cancelled=watch.stop)
        conversion.publish(whole, target)
    finally:
        conversion.sweep([path for path in (partial, folder) if path.exists()])
    return digest


def leftovers(target: Path) -> Iterator[Path]:
    """What attempts at ``target`` left behind."""
    yield from target.parent.glob(f"{target.name}.*.partial")
    yield from target.parent.glob(f"{target.name}.*.v2v")


def sweep_stale(images: Path, exports: Path | None = None, older_than_s: float = STALE_S) -> list[Path]:
    """Remove partial files that nobody has written to for so long: of steps that were given up."""
    now = time.time()
    found = [*images.glob("*/*.partial"), *images.glob("*/*.v2v"), *(exports.glob(".*.partial") if exports else ())]
    stale = []
    for path in found:
        try:
            if now - path.lstat().st_mtime > older_than_s:
                stale.append(path)
        except FileNotFoundError:
            continue
    return conversion.sweep(stale)
