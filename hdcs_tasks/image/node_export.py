"""Exporting on a server node: a disk of the storage, flattened, into a file or onto a block device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import Cancelled, Conflict, NotFound
from hdcs_tasks.hypervisor import conversion, devices, disks, exporting, importing
from hdcs_tasks.hypervisor.exporting import Order
from hdcs_tasks.hypervisor.keys import KeyRing
from hdcs_tasks.hypervisor.probing import Source
from hdcs_tasks.hypervisor.storage import StorageLayout
from hdcs_tasks.image.node_paths import layout, target_of, watch
from hdcs_tasks.operations.node import Run


def check(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Whether the image could leave as asked; what is at the target."""
    place = layout(run)
    return look(run, place, spec, image_file(place, spec))


def export(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Write the image as asked; the manifest."""
    place = layout(run)
    return deliver(run, place, spec, image_file(place, spec))


def image_file(place: StorageLayout, spec: dict[str, Any]) -> Path:
    return place.path("images", spec["image"], f"{spec['version']}.qcow2")


def look(run: Run, place: StorageLayout, spec: dict[str, Any], disk: Path) -> dict[str, Any]:
    order = order_of(run, place, spec, disk)
    target = target_of(run, place, spec["path"])
    return exporting.check(order, target) | {
        "format": order.fmt, "virtual_size_bytes": order.virtual_bytes, "node": run.ctx.server_node,
    }  # fmt: skip


def order_of(run: Run, place: StorageLayout, spec: dict[str, Any], disk: Path) -> Order:
    """What is to leave. Every layer below ``disk`` is one of the storage's files, of a said format."""
    if not disk.is_file():
        raise NotFound(f"there is no disk {disk}", next="See: hdcs image list")
    top = disks.chain(disk, root=place.root)[0]
    key = KeyRing.of(run.ctx.settings).find(spec.get("disk_key"))
    return Order(
        Source(disk, top.format, key=key), top.virtual_bytes, spec["format"], spec["shape"],
        spec["origin"] | {"operation": run.operation}, spec["compress"], spec["force"],
    )  # fmt: skip


def deliver(
    run: Run, place: StorageLayout, spec: dict[str, Any], disk: Path, *, percent_before: float = 0.0
) -> dict[str, Any]:
    """Write ``disk`` as the spec says. ``percent_before``: of the step, what was done before.

    A repeated attempt that finds its own file whole is done; over a device that an attempt of this step was writing to
    it begins anew.
    """
    target = target_of(run, place, spec["path"])
    conversion.sweep(exporting.leftovers(target, run.step))
    importing.sweep_stale(place.root / "images", place.root / "export")
    if (done := _done(run, target)) is not None:
        return done | {"node": run.ctx.server_node}
    mark = run.ctx.settings.state_dir / "exports" / run.step
    order = order_of(run, place, spec, disk)
    if mark.exists():
        order = replace(order, force=True)
    try:
        run.check()
    except Cancelled:
        if mark.exists():
            _give_up_device(order, target)
            mark.unlink()
        raise
    exporting.check(order, target)
    if devices.is_device(target):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    own_storage = target.resolve().is_relative_to(place.root.resolve())
    seen = watch(run, place if own_storage else None)
    manifest = exporting.export(
        order, target, replace(seen, on_progress=seen.told(percent_before, 100)), attempt=f"{run.step}-{run.attempt}"
    )
    mark.unlink(missing_ok=True)
    return manifest | {"node": run.ctx.server_node}


def _done(run: Run, target: Path) -> dict[str, Any] | None:
    """The manifest of a file this very operation wrote, in an attempt whose outcome was lost."""
    try:
        found = dict(json.loads(exporting.manifest_of(target).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if target.exists() and found.get("origin", {}).get("operation") == run.operation else None


def _give_up_device(order: Order, target: Path) -> None:
    """A device that a dead attempt half wrote, in an operation that was called off: it shall not look whole."""
    try:
        with devices.claimed(target, order.virtual_bytes, force=True) as device:
            devices.wipe_start(device.path)
    except Conflict:
        return  # somebody else's by now
