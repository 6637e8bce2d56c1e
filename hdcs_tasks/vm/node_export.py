"""Exporting a VM on a server node: a stopped one's disk, or a running one's as it was at one moment."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.hypervisor import backup, conversion
from hdcs_tasks.hypervisor.keys import KeyRing
from hdcs_tasks.image import node_export
from hdcs_tasks.image.node_paths import target_of, watch
from hdcs_tasks.operations.node import Run
from hdcs_tasks.vm import node_swap
from hdcs_tasks.vm.node import layout, lock

COPIED = 40.0
"""Percent of the step when a running VM's disk has been copied, and is to leave."""


def check(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Whether the VM could leave as asked; what is at the target."""
    place = layout(run.ctx)
    return node_export.look(run, place, spec, place.disk(spec["vm_id"]))


def export(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Write the VM's disk as asked; the manifest."""
    place = layout(run.ctx)
    disk = place.disk(spec["vm_id"])
    with lock(run.ctx, spec["vm_id"]):
        if not spec["running"]:
            node_swap.check_stopped(run, spec["vm_id"], disk)
            spec["origin"]["consistency"] = "filesystem"
            return node_export.deliver(run, place, spec, disk)
        return _running(run, spec)


def _running(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """libvirt copies the disk of one moment while the guest goes on (frozen by its agent for that moment, if it
    answers); then that copy leaves. It lies beside the disk meanwhile, so the storage needs room for it."""
    place = layout(run.ctx)
    disk = place.disk(spec["vm_id"])
    moment = disk.with_name(f"export-{run.step}.qcow2")
    seen = watch(run, place)
    target_of(run, place, spec["path"])
    node_export.look(run, place, spec, disk)
    if run.attempt > 1:
        backup.discard_left_behind(run.ctx.host(), spec["vm_id"], moment, None)
    try:
        run.check()
        seen.need(disk.stat().st_blocks * 512)
        spec["origin"]["consistency"] = backup.copy_running(
            run.ctx.host(), spec["vm_id"], moment, on_progress=seen.told(0, COPIED), cancelled=seen.stop,
            key=KeyRing.of(run.ctx.settings).find(spec.get("disk_key")), deadline_s=run.ctx.settings.step_deadline_s,
        )  # fmt: skip
        return node_export.deliver(run, place, spec, moment, percent_before=COPIED)
    finally:
        conversion.sweep([moment] if moment.exists() else [])
