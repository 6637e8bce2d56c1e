"""VMs on a server node: cloning, deleting, the short commands; starting is node_start.py.

Every function is the work of one step: ``(run, spec) -> result``. It may be repeated: each looks first at what is
there, and asks ``run.check()`` right before it changes anything.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import (
    Cancelled,
    HypervisorRefused,
    NoCapacity,
    NotFound,
    OutcomeUnknown,
    Unavailable,
)
from hdcs_tasks.hypervisor import disks, guests, networks, storage
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.keys import KeyRing
from hdcs_tasks.hypervisor.locks import vm_lock
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import NodeContext, Run
from hdcs_tasks.pool import node_cables

log = logger(__name__)

LOCK_WAIT_S = 10.0
CHECKPOINTS = "checkpoints.json"
OPEN = "open"


def layout(ctx: NodeContext) -> storage.StorageLayout:
    """The domain node's storage as mounted here; Rejected if it is not ours (an empty mount point, say)."""
    return storage.check(ctx.settings.storage_root, ctx.domain_node)


def lock(ctx: NodeContext, vm_id: str) -> Any:
    return vm_lock(ctx.settings.state_dir, vm_id, LOCK_WAIT_S)


# --- clone and delete


def clone(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Make the VM's derived image: an overlay on the base image, with a bitmap that records from the first write."""
    place = layout(run.ctx)
    base = image_path(place, spec["image"], spec["version"])
    if not base.is_file():
        raise NotFound(
            f"image {spec['image']}:{spec['version']} is not in this storage",
            next=f"Bring it here: hdcs image add {spec['image']} FILE --domain-node {run.ctx.domain_node}",
        )
    target = place.disk(spec["vm_id"])
    _check_space(run.ctx)
    run.check()
    target.parent.mkdir(mode=0o711, exist_ok=True)
    try:
        disks.create_overlay(
            base, target, size_bytes=spec["disk_bytes"] or None, bitmap=SEED, base_format="qcow2",
            key=KeyRing.of(run.ctx.settings).find(spec.get("disk_key")), attempt=str(run.attempt),
        )  # fmt: skip
    except Exception:
        still_ours(run)
        remove_folder(target.parent)
        raise
    for left in target.parent.glob(f"{target.name}.*.partial"):
        left.unlink(missing_ok=True)  # of an attempt that was killed
    return {"node": run.ctx.server_node, "disk": str(target)}


def still_ours(run: Run) -> None:
    """Before removing what a failed attempt left: a newer attempt may have made its disk there. Raises ClaimLost."""
    try:
        run.check()
    except Cancelled:
        return


SPACE_LEFT_BYTES = 64 * 1024 * 1024


def _check_space(ctx: NodeContext) -> None:
    """A storage that is full pauses every guest on it: the last bytes are theirs."""
    _, free = storage.disk_usage(ctx.settings.storage_root)
    if free < SPACE_LEFT_BYTES:
        raise NoCapacity(
            f"storage of domain node {ctx.domain_node} is full: {free} bytes are free",
            next="Delete VMs or images, or add storage",
        )


def image_path(place: storage.StorageLayout, name: str, version: int) -> Path:
    return place.path("images", name, f"{version}.qcow2")


def delete(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Remove the VM's folder and saved memory; the guest must be gone from this node."""
    ctx = run.ctx
    place = layout(ctx)
    with lock(ctx, spec["vm_id"]):
        run.check()
        guests.stop(ctx.host(), spec["vm_id"], force=True)
        remove_folder(place.vm_dir(spec["vm_id"]))
        saved_memory(place, spec["vm_id"]).unlink(missing_ok=True)
    return {"node": ctx.server_node}


def end_left(ctx: NodeContext, vm_id: str, mac: str) -> None:
    """End what runs here of a VM that the record has as deleted, and give back what it held. Safe to repeat."""
    with suppress(Unavailable), lock(ctx, vm_id):
        if guests.stop(ctx.host(), vm_id, force=True):
            log.warning("ended what ran of a deleted VM", vm=vm_id)
        release(ctx, vm_id, mac)


def remove_folder(folder: Path) -> None:
    """Remove a VM's folder; one that is gone already is a success."""
    shutil.rmtree(folder, ignore_errors=False, onerror=_unless_gone)


def _unless_gone(_function: Callable[..., Any], _path: str, error: Any) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def saved_memory(place: storage.StorageLayout, vm_id: str) -> Path:
    return place.path("state", f"{vm_id}.memory")


def release(ctx: NodeContext, vm_id: str, mac: str) -> None:
    """The guest was observed gone from this node: its DHCP host goes, its capacity is free, its IP cools."""
    networks.remove_dhcp_host(ctx.host(), ctx.settings.network_name, mac)
    node_cables.forget(ctx, vm_id)
    ctx.reservations.pool.release(ctx.domain_node, vm_id, ctx.server_node, ctx.settings.dhcp_lease_s)


# --- the short commands

last_looks: list[Callable[[Run, dict[str, Any]], None]] = []
"""What looks at a guest once more before a step that an idle policy asked for; raises Cancelled if somebody uses it."""


def _check_again(run: Run, spec: dict[str, Any]) -> None:
    """The fence, and for an idle policy the last look, right before the side effect."""
    if "guard" in spec:
        if not last_looks:
            raise HypervisorRefused("nobody looks whether this VM is used", next="Load monitor.node_tasks")
        for look in last_looks:
            look(run, spec)
    run.check()


def stop(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    ctx = run.ctx
    with lock(ctx, spec["vm_id"]):
        ended = run.attempt > 1 and guests.info(ctx.host(), spec["vm_id"]) is None
        _check_unless(ended, run, spec)
        ran = guests.stop(ctx.host(), spec["vm_id"], force=spec["force"], timeout_s=spec["timeout_s"])
        if ran:
            _ended_in_order(ctx, spec["vm_id"])
        _give_back(ctx, spec)
    return {"node": ctx.server_node, "ran": ran}


def _check_unless(ended: bool, run: Run, spec: dict[str, Any]) -> None:
    """Where an earlier attempt has ended the guest, a cancel comes too late: what is left to do is done."""
    if ended:
        still_ours(run)
    else:
        _check_again(run, spec)


def _give_back(ctx: NodeContext, spec: dict[str, Any]) -> None:
    """``release``, after the guest has ended: that is no failure to be cancelled, it has to be seen through."""
    try:
        release(ctx, spec["vm_id"], spec["mac"])
    except Unavailable as error:
        raise OutcomeUnknown(
            f"VM {spec['name']} has ended, and holds what it had: {error.message}",
            next="The next attempt gives it back",
        ) from error


def _ended_in_order(ctx: NodeContext, vm_id: str) -> None:
    (layout(ctx).vm_dir(vm_id) / OPEN).unlink(missing_ok=True)


def suspend(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    with lock(run.ctx, spec["vm_id"]):
        _check_again(run, spec)
        guests.suspend(run.ctx.host(), spec["vm_id"])
    return {"node": run.ctx.server_node}


def resume(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    with lock(run.ctx, spec["vm_id"]):
        run.check()
        guests.resume(run.ctx.host(), spec["vm_id"])
    node_cables.renew_soon(run.ctx, spec["vm_id"])  # one that was moved while it stood still
    return {"node": run.ctx.server_node}


def reboot(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    with lock(run.ctx, spec["vm_id"]):
        run.check()
        guests.reboot(run.ctx.host(), spec["vm_id"], force=spec["force"], timeout_s=spec["timeout_s"])
    return {"node": run.ctx.server_node}


def save(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Memory to the domain node's storage; the guest ends and gives back what it held."""
    ctx = run.ctx
    target = saved_memory(layout(ctx), spec["vm_id"])
    with lock(ctx, spec["vm_id"]):
        ended = run.attempt > 1 and target.is_file() and guests.info(ctx.host(), spec["vm_id"]) is None
        _check_unless(ended, run, spec)
        guests.save(ctx.host(), spec["vm_id"], target)
        _ended_in_order(ctx, spec["vm_id"])
        _give_back(ctx, spec)
    return {"node": ctx.server_node, "bytes": target.stat().st_size}


def console(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Set the console ticket kept in a short-lived Redis note."""
    note = run.ctx.reservations.notes.read(spec["note"])
    if "password" not in note:
        raise NotFound("the console ticket has expired", next="Ask again: hdcs vm console")
    run.check()
    guests.set_console_password(run.ctx.host(), spec["vm_id"], note["password"], spec["ttl_s"])
    return {"node": run.ctx.server_node}
