"""A disk leaves: flattened, into a file of any known format, an OVA, or onto a block device, with a manifest.

A file is written beside its place under a partial name and gets its own when it is whole. A device is held for us alone
while it is written, read back for its hash, and made to look empty when something goes wrong half way.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from glob import escape
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import Conflict, Invalid
from hdcs_tasks.hypervisor import conversion, devices, disks, ova, ovf
from hdcs_tasks.hypervisor.conversion import Watch
from hdcs_tasks.hypervisor.probing import FORMATS, Source

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Order:
    """What is to leave as what. ``shape``: the machine's (``name``, ``vcpus``, ``memory_mib``), for OVA and manifest;
    ``origin``: where it comes from, for the manifest."""

    source: Source
    virtual_bytes: int
    fmt: str
    shape: dict[str, Any]
    origin: dict[str, Any]
    compress: bool = False
    force: bool = False


def check(order: Order, target: Path) -> dict[str, Any]:
    """Whether ``target`` may be written now; what is there. Changes nothing. Raises Invalid, Conflict, NotFound."""
    if order.fmt not in (*FORMATS, "ova"):
        raise Invalid(f"disk format {order.fmt!r} is not known", next=f"Use {', '.join((*FORMATS, 'ova'))}")
    if order.compress and order.fmt != "qcow2":
        raise Invalid(f"{order.fmt} cannot be compressed", next="Only qcow2 can; an OVA is compressed anyway")
    if devices.is_device(target):
        if order.fmt != "raw":
            raise Invalid(f"{target} is a block device: it takes raw, not {order.fmt}", next="Leave the format out")
        with devices.claimed(target, order.virtual_bytes, force=order.force) as device:
            return {"device": str(device.path), "device_bytes": device.size_bytes}
    if str(target).startswith("/dev/"):
        devices.look(target)  # says that it is not there, or what else it is
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise Invalid(f"{target} is no plain file", next="Choose another name")
    if not order.force and (target.exists() or manifest_of(target).exists()):
        raise Conflict(f"{target} exists", next="Choose another name, or add --force to replace it")
    if not target.parent.is_dir():
        raise Invalid(f"there is no folder {target.parent}", next="Make it on that server node first")
    return {"file": str(target), "replaces": target.exists()}


def manifest_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def export(order: Order, target: Path, watch: Watch, *, attempt: str) -> dict[str, Any]:
    """Write ``target``; returns its manifest. Nothing half made is left. Raises as ``check``, and Cancelled,
    NoCapacity, HypervisorRefused."""
    check(order, target)
    if devices.is_device(target):
        return _to_device(order, target, watch)
    return _to_file(order, target, watch, attempt)


# --- onto a device


def _to_device(order: Order, target: Path, watch: Watch) -> dict[str, Any]:
    with devices.claimed(target, order.virtual_bytes, force=order.force) as device:
        try:
            devices.wipe_end(device, order.virtual_bytes)
            conversion.convert(order.source, device.path, "raw", watch, watch.part(0, 70, "convert"), existing=True)
            digest = _hash_device(device.path, order.virtual_bytes, watch)
        except BaseException:
            devices.wipe_start(device.path)
            raise
    return _manifest(order, [{"name": str(device.path), "bytes": order.virtual_bytes, "sha256": digest}])


def _hash_device(path: Path, size_bytes: int, watch: Watch) -> str:
    """The SHA-256 of the disk as it can be read back, past the page cache."""
    digest, done, tell = hashlib.sha256(), 0, watch.part(70, 100, "read back")
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while done < size_bytes:
            block = file.read(min(_BLOCK_BYTES, size_bytes - done))
            if not block:
                raise Invalid(f"{path} ends after {done} bytes", next="Is the device sound?")
            digest.update(block)
            done += len(block)
            watch.go_on(f"reading {path}")
            tell(100.0 * done / size_bytes)
    return digest.hexdigest()


# --- into a file


def _to_file(order: Order, target: Path, watch: Watch, attempt: str) -> dict[str, Any]:
    partial = target.with_name(f".{target.name}.{attempt}.partial")
    stream = target.with_name(f".{target.name}.{attempt}.vmdk.partial")
    try:
        files = _write_ova(order, target, partial, stream, watch) if order.fmt == "ova" else _write(
            order, target, partial, watch
        )  # fmt: skip
        manifest = _manifest(order, files)
        # The manifest first: a file that has its name has its manifest.
        _write_manifest(manifest, target, attempt)
        conversion.publish(partial, target, force=order.force)
    except Exception:
        if not target.exists():
            manifest_of(target).unlink(missing_ok=True)
        raise
    finally:
        conversion.sweep(path for path in (partial, stream) if path.exists())
    return manifest


def leftovers(target: Path, step: str) -> list[Path]:
    """What dead attempts of ``step`` at ``target`` left behind; another's may be at work."""
    return [*target.parent.glob(f".{escape(target.name)}.{step}-*.partial")]


def _write(order: Order, target: Path, partial: Path, watch: Watch) -> list[dict[str, Any]]:
    conversion.convert(order.source, partial, order.fmt, watch, watch.part(0, 80, "convert"), compress=order.compress)
    digest = disks.sha256(partial, on_progress=watch.told(80, 100), cancelled=watch.stop)
    return [{"name": target.name, "bytes": partial.stat().st_size, "sha256": digest}]


def _write_ova(order: Order, target: Path, partial: Path, stream: Path, watch: Watch) -> list[dict[str, Any]]:
    name = str(order.shape["name"])
    conversion.convert(order.source, stream, "stream", watch, watch.part(0, 60, "convert"))
    disk = ovf.OvfDisk(f"{name}-disk1.vmdk", order.virtual_bytes)
    machine = ovf.Machine(name, order.shape["vcpus"], order.shape["memory_mib"], (disk,))
    hashes = ova.write(partial, machine, stream, on_percent=watch.part(60, 85, "pack"), cancelled=watch.stop)
    digest = disks.sha256(partial, on_progress=watch.told(85, 100), cancelled=watch.stop)
    return [{"name": target.name, "bytes": partial.stat().st_size, "sha256": digest, "members": hashes}]


def _write_manifest(manifest: dict[str, Any], target: Path, attempt: str) -> None:
    partial = target.with_name(f".{target.name}.{attempt}.json.partial")
    partial.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    conversion.publish(partial, manifest_of(target), force=True)


def _manifest(order: Order, files: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "made_by": "hdcs", "manifest": 1, "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "format": order.fmt, "virtual_size_bytes": order.virtual_bytes, "files": files, "machine": order.shape,
        "origin": order.origin,
    }  # fmt: skip
