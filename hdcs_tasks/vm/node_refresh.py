"""Refreshing on a server node: a stopped VM's disk becomes a new, empty overlay on another version of its image."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.errors import NotFound
from hdcs_tasks.hypervisor import disks
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.keys import KeyRing
from hdcs_tasks.operations.node import Run
from hdcs_tasks.vm import node_swap
from hdcs_tasks.vm.node import image_path, layout, lock


def refresh(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Swap the disk for a new overlay; the old one is kept until the new one is in place and good."""
    place = layout(run.ctx)
    base = image_path(place, spec["image"], spec["version"])
    if not base.is_file():
        raise NotFound(f"image {spec['image']}:{spec['version']} is not in this storage", next="See: hdcs image list")
    disk = place.disk(spec["vm_id"])
    fresh, old = (disk.with_name(f"{what}-{run.step}.qcow2") for what in ("refreshed", "replaced"))
    with lock(run.ctx, spec["vm_id"]):
        node_swap.check_stopped(run, spec["vm_id"], disk)
        if not old.exists():
            try:
                for left in disk.parent.glob(f"{fresh.name}.*.partial"):
                    left.unlink(missing_ok=True)
                disks.create_overlay(
                    base, fresh, size_bytes=spec["disk_bytes"] or None, bitmap=SEED, base_format="qcow2",
                    key=KeyRing.of(run.ctx.settings).find(spec.get("disk_key")),
                    attempt=str(run.attempt),
                )  # fmt: skip
                disks.chain(fresh, root=place.root)
                run.check()
            except Exception:
                fresh.unlink(missing_ok=True)
                raise
            node_swap.set_aside(disk, old)
        run.check()
        node_swap.swap(disk, fresh, old)
    made = disks.probe(disk, root=place.root)
    return {
        "node": run.ctx.server_node,
        "disk_bytes": made.virtual_bytes,
        "image": f"{spec['image']}:{spec['version']}",
    }
