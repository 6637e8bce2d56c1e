"""A VM's disk grows, on a server node: under its running guest, or as a file. The step may be repeated."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.errors import NotFound
from hdcs_tasks.hypervisor import disks, guests, layers
from hdcs_tasks.hypervisor.growing import grow_running
from hdcs_tasks.hypervisor.keys import KeyRing
from hdcs_tasks.operations.node import Run
from hdcs_tasks.vm.node import layout, lock


def grow(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Raises Invalid (it would shrink), Conflict (open elsewhere), NotFound, HypervisorRefused."""
    ctx, vm_id, wanted = run.ctx, spec["vm_id"], spec["disk_bytes"]
    disk = layout(ctx).disk(vm_id)
    with lock(ctx, vm_id):
        if not disk.exists():
            raise NotFound(f"VM {spec['name']} has no disk here", next="See: hdcs vm show")
        run.check()
        seen = guests.info(ctx.host(), vm_id)
        if seen is not None and seen.active:
            grow_running(ctx.host(), vm_id, wanted)
            return {"node": ctx.server_node, "disk_bytes": wanted, "running": True}
        disks.resize(disk, wanted, key=KeyRing.of(ctx.settings).find(spec.get("disk_key")))
        return {"node": ctx.server_node, "disk_bytes": layers.virtual_bytes(disk), "running": False}
