"""Importing on a server node: what lies there is looked at, then becomes an image of the domain node's storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hdcs_tasks.errors import Conflict
from hdcs_tasks.hypervisor import conversion, disks, importing, v2v
from hdcs_tasks.hypervisor.storage import StorageLayout
from hdcs_tasks.image.node_paths import layout, named_here, source_of, watch
from hdcs_tasks.operations.node import Run


def probe(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """What is to be imported: ``importing.Found.view``, ``node`` and ``domain_node``."""
    place = layout(run)
    if spec["drivers"]:
        v2v.require(run.ctx.server_node)
    found = _find(run, place, spec)
    watch(run, place).need(found.probed.needed_bytes)
    return found.view() | {"node": run.ctx.server_node, "domain_node": run.ctx.domain_node}


def bring_in(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Make the image. A repeated attempt first sweeps what dead ones left; one that finds the image whole is done."""
    place = layout(run)
    target = place.path("images", spec["image"], f"{spec['version']}.qcow2")
    try:
        conversion.sweep([path for path in importing.leftovers(target) if path.exists()])
        importing.sweep_stale(place.root / "images", place.root / "export")
        run.check()
        run.progress(0, "look")
        found = _find(run, place, spec)
        target.parent.mkdir(mode=0o711, exist_ok=True)
        digest = _made(run, place, spec, found, target)
    finally:
        _remove_if_empty(target)
    made = disks.probe(target, root=place.root)
    return {
        "sha256": digest, "virtual_size_bytes": made.virtual_bytes, "file_bytes": target.stat().st_size,
        "shape": found.shape(), "format": found.view()["format"], "warnings": found.warnings(),
        "image": f"{spec['image']}:{spec['version']}", "node": run.ctx.server_node, "domain_node": run.ctx.domain_node,
    }  # fmt: skip


def _made(run: Run, place: StorageLayout, spec: dict[str, Any], found: importing.Found, target: Path) -> str:
    """The hash of the image, which this attempt makes unless an earlier one did."""
    if not target.exists():
        drivers_on = run.ctx.server_node if spec["drivers"] else None
        try:
            return importing.bring_in(found, target, watch(run, place), attempt=run.attempt, drivers_on=drivers_on)
        except Conflict:
            if not target.exists():
                raise  # else an earlier attempt ended in between
    return disks.sha256(target, on_progress=run.progress, cancelled=run.cancelled)


def _find(run: Run, place: StorageLayout, spec: dict[str, Any]) -> importing.Found:
    path, root = source_of(run, place, spec["path"])
    max_bytes = run.ctx.settings.image_max_gib << 30
    with named_here(run):
        return importing.find(
            path, root, fmt=spec["format"], disk=spec["disk"], max_bytes=max_bytes, cancelled=run.cancelled
        )


def _remove_if_empty(target: Path) -> None:
    try:
        target.parent.rmdir()
    except OSError:
        return  # it holds this or other versions
