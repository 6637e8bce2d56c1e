"""VMs on a server node: starting where layer two says, the short commands, cloning, deleting.

Every function is the work of one step: ``(run, spec) -> result``. It may be repeated: each looks first at what is
there, and asks ``run.check()`` right before it changes anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import (
    BackupBroken,
    Cancelled,
    ClaimLost,
    HdcsError,
    HypervisorRefused,
    NoCapacity,
    NotFound,
    OutcomeUnknown,
    RebuildPending,
    Unavailable,
    Unreachable,
)
from hdcs_tasks.hypervisor import disks, guests, networks, storage
from hdcs_tasks.hypervisor.bitmaps import ensure_seed
from hdcs_tasks.hypervisor.checkpoints import SEED, redefine_checkpoints
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.keys import Key, KeyRing, give_to_libvirt
from hdcs_tasks.hypervisor.locks import vm_lock
from hdcs_tasks.hypervisor.spec import GuestSpec
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import HandOver, NodeContext, Run
from hdcs_tasks.pool.identity import virt_type
from hdcs_tasks.reservations import MixEntry, Placed, PlaceRequest
from hdcs_tasks.vm.node_address import give_address

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
    except HdcsError:
        _still_ours(run)
        remove_folder(target.parent)
        raise
    for left in target.parent.glob(f"{target.name}.*.partial"):
        left.unlink(missing_ok=True)  # of an attempt that was killed
    return {"node": run.ctx.server_node, "disk": str(target)}


def _still_ours(run: Run) -> None:
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


def remove_folder(folder: Path) -> None:
    """Remove a VM's folder; one that is gone already is a success."""
    shutil.rmtree(folder, ignore_errors=False, onerror=_unless_gone)


def _unless_gone(_function: Callable[..., Any], _path: str, error: Any) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def saved_memory(place: storage.StorageLayout, vm_id: str) -> Path:
    return place.path("state", f"{vm_id}.memory")


# --- start


def start(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Layer two, then the start: claim the best server node of the pool; if that is another one, hand over."""
    run.progress(10, "choosing a server node")
    if run.attempt == 1:
        _place_here(run, spec)  # nobody's lock is waited for to hand over
    with _lock_for_start(run, spec["guest"]):
        try:
            return _start_placed(run, spec)
        except (ClaimLost, HandOver):
            raise  # a newer attempt observes and settles; the claim on capacity stays with the VM
        except Exception as error:  # whatever it was: what was claimed is given back, or known to be in doubt
            _undo_start(run, spec, error)
            raise


def _start_placed(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    # In the lock: whoever had it before may have given back what was placed.
    placed = _place_here(run, spec)
    run.progress(40, f"starting on {placed.node}")
    # Before the guest runs: from then on nothing that fails may pass for a start that failed.
    why = decision(run, spec, placed)
    _start_here(run, spec, placed)
    if spec.get("saved"):
        # It comes back as it was and boots nothing; a booting guest counts until its agent answers.
        _start_ended(run.ctx, spec["guest"]["vm_id"])
    return {"node": placed.node, "port": placed.port, "ip": placed.ip, "decision": why}


def _place_here(run: Run, spec: dict[str, Any]) -> Placed:
    """Layer two's choice; HandOver where it is another server node."""
    ctx = run.ctx
    placed = choose(ctx, place_request(run, spec, spec["guest"]["vm_id"], start_s=ctx.settings.boot_slot_s))
    if placed.node != ctx.server_node:
        if (seen := _left_running(run, spec)) is not None:
            _end_earlier(run, spec, seen)
        raise HandOver(placed.node, spec)
    return placed


def _left_running(run: Run, spec: dict[str, Any]) -> guests.GuestInfo | None:
    """What an earlier attempt of this start left running here, if anything: nobody was told that it runs."""
    if run.attempt == 1:
        return None
    seen = guests.info(run.ctx.host(), spec["guest"]["vm_id"])
    return seen if seen is not None and seen.active and seen.step == run.step else None


def _end_earlier(run: Run, spec: dict[str, Any], seen: guests.GuestInfo) -> None:
    """End what an earlier attempt of this start left running: it has no place here, or is not wanted any more.

    Raises OutcomeUnknown for one that used up its saved memory: it cannot be started again as it was.
    """
    if spec.get("saved"):
        raise OutcomeUnknown(
            f"VM {seen.name} runs on {run.ctx.server_node}, which the pool has no place on for it",
            next="It is looked at again; if the server node left its pool, bring it back",
        )
    _still_ours(run)
    guests.stop(run.ctx.host(), seen.vm_id, force=True)
    release(run.ctx, seen.vm_id, spec["guest"]["mac"])


@contextmanager
def _lock_for_start(run: Run, guest: dict[str, Any]) -> Iterator[None]:
    """The VM's lock. Where an earlier attempt may hold it, and start the guest yet, nothing is known without it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(run.ctx, guest["vm_id"]))
        except Unavailable as error:
            if run.attempt > 1:
                raise OutcomeUnknown(f"an earlier attempt holds VM {guest['name']}: {error.message}") from error
            raise
        yield


def place_request(run: Run, spec: dict[str, Any], vm_id: str, *, start_s: float) -> PlaceRequest:
    """Layer two's request from a step's spec (vm/control.py: placing_fields)."""
    return PlaceRequest(
        run.ctx.domain_node, vm_id, run.step, spec["need"]["vcpus"], spec["need"]["memory_mib"], pin=spec["pin"],
        exclude=tuple(spec["exclude"]), order=spec["order"], tags=tuple(spec["node_tags"]), start_s=start_s,
        mix=tuple(MixEntry(*entry) for entry in spec["mix"]),
        marks=tuple(spec["marks"]), shuns=tuple(spec["shuns"]), seeks=tuple(spec["seeks"]), label=spec["label"],
        hint=spec["hint"],
    )  # fmt: skip


def decision(run: Run, spec: dict[str, Any], placed: Placed) -> dict[str, Any]:
    """What the operation keeps of the choice: counts, and the server nodes that were next in layer two's order."""
    need, pool = spec["need"], run.ctx.reservations.pool
    stand = pool.standing(run.ctx.domain_node, need["vcpus"], need["memory_mib"], spec["order"])
    counts = {"fits": stand.fitting, "too little room": stand.open - stand.fitting, "closed": stand.nodes - stand.open}
    best = [{"node": node, "free_vcpus": vcpus, "free_memory_mib": mib} for node, vcpus, mib in stand.best]
    return {"node": placed.node, "order": spec["order"], "counts": counts, "best": best}


def choose(ctx: NodeContext, request: PlaceRequest) -> Placed:
    """Layer two's choice, which must be a living server node.

    One that died may be chosen until the lease sweep sees it, and an attempt that was handed to it still has its claim
    there. Nothing of this step can have begun on it: control sends a step that has to its own queue alone.
    """
    placed = ctx.reservations.pool.place(request)
    if placed.node == ctx.server_node or ctx.reservations.leases.holder("node", placed.node):
        return placed
    log.warning("placed on a server node without a lease: placing again", vm=request.vm, node=placed.node)
    ctx.reservations.pool.release(
        request.domain_node, request.vm, placed.node, ctx.settings.dhcp_lease_s, step=request.step
    )  # fmt: skip
    return ctx.reservations.pool.place(replace(request, exclude=(*request.exclude, placed.node)))


def _start_here(run: Run, spec: dict[str, Any], placed: Placed) -> None:
    ctx, guest = run.ctx, spec["guest"]
    place, host = layout(ctx), ctx.host()
    # What runs from its saved memory already cannot be taken back: a cancel comes too late.
    check = _still_ours if spec.get("saved") and _left_running(run, spec) else Run.check
    check(run)
    if not spec.get("isolated"):
        give_address(ctx, guest["mac"], placed.ip, guest["name"])
    saved = saved_memory(place, guest["vm_id"]) if spec.get("saved") else None
    key = KeyRing.of(ctx.settings).find(guest.get("disk_key"))
    wanted = _guest_spec(run, guest, place, placed, "" if spec.get("isolated") else ctx.settings.network_name)
    check(run)
    if guests.info(host, guest["vm_id"]) is None:
        _mend_bitmaps(place, guest["vm_id"], key)
    give_to_libvirt(host, key)
    guests.start(host, wanted, saved=saved)
    restore_checkpoints(host, place, guest["vm_id"])


def _mend_bitmaps(place: storage.StorageLayout, vm_id: str, key: Key | None) -> None:
    """A killed QEMU leaves its disk's bitmaps broken; ``OPEN`` tells that the last one did not end in order."""
    mark = place.vm_dir(vm_id) / OPEN
    if mark.exists():
        ensure_seed(place.disk(vm_id), key=key)
    else:
        mark.touch()


def _guest_spec(
    run: Run, guest: dict[str, Any], place: storage.StorageLayout, placed: Placed, network: str
) -> GuestSpec:
    config = run.ctx.settings
    return GuestSpec.from_dict(guest | {
        "disks": (str(place.disk(guest["vm_id"])),), "network": network, "console_port": placed.port,
        "console_listen": config.console_listen, "virt_type": virt_type(config), "operation": run.operation,
        "step": run.step, "attempt": run.attempt,
    })  # fmt: skip


def restore_checkpoints(host: Host, place: storage.StorageLayout, vm_id: str) -> None:
    """Tell libvirt again which checkpoints the disk's bitmaps stand for; a broken chain makes the next backup full."""
    kept = place.vm_dir(vm_id) / CHECKPOINTS
    if not kept.exists():
        return
    try:
        redefine_checkpoints(host, vm_id, json.loads(kept.read_text()))
    except BackupBroken as error:
        kept.unlink(missing_ok=True)
        log.warning("backup chain broken; the next backup is a full one", vm=vm_id, error=str(error))


def _start_ended(ctx: NodeContext, vm_id: str) -> None:
    """The guest runs: that Redis does not hear of it now must not fail its start; the entry runs out by itself."""
    try:
        ctx.reservations.pool.started(ctx.domain_node, ctx.server_node, vm_id)
    except Unreachable as error:
        log.info("end of a start not noted", vm=vm_id, error=str(error))


def _undo_start(run: Run, spec: dict[str, Any], error: Exception) -> None:
    """After a failed start: whatever was claimed is free again, once the guest is seen not to run here.

    Running under this step: a start that is cancelled or has no place here ends it, any other leaves it to the next
    attempt, which finds it. What cannot be seen is not guessed. Raises OutcomeUnknown, or ClaimLost: what is here may
    be a newer attempt's.
    """
    ctx, guest = run.ctx, spec["guest"]
    _still_ours(run)
    try:
        seen = guests.info(ctx.host(), guest["vm_id"])
        if seen is None or not seen.active:
            release(ctx, guest["vm_id"], guest["mac"])
            return
        if seen.step != run.step:
            return  # another's guest: the error is a Conflict that says so
        if run.is_cancelled() or isinstance(error, NoCapacity | RebuildPending):
            _end_earlier(run, spec, seen)
            return
        what = f"it runs, but its start did not end: {error}"
    except OutcomeUnknown:
        raise
    except HdcsError as blind:
        what = f"its start failed ({error}), and what it left cannot be seen: {blind}"
    raise OutcomeUnknown(f"VM {guest['name']}: {what}", next="The next attempt observes") from error


def release(ctx: NodeContext, vm_id: str, mac: str) -> None:
    """The guest was observed gone from this node: its DHCP host goes, its capacity is free, its IP cools."""
    networks.remove_dhcp_host(ctx.host(), ctx.settings.network_name, mac)
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
        _check_again(run, spec)
        ran = guests.stop(ctx.host(), spec["vm_id"], force=spec["force"], timeout_s=spec["timeout_s"])
        if ran:
            _ended_in_order(ctx, spec["vm_id"])
        release(ctx, spec["vm_id"], spec["mac"])
    return {"node": ctx.server_node, "ran": ran}


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
        _check_again(run, spec)
        guests.save(ctx.host(), spec["vm_id"], target)
        _ended_in_order(ctx, spec["vm_id"])
        release(ctx, spec["vm_id"], spec["mac"])
    return {"node": ctx.server_node, "bytes": target.stat().st_size}


def console(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Set the console ticket kept in a short-lived Redis note."""
    note = run.ctx.reservations.notes.read(spec["note"])
    if "password" not in note:
        raise NotFound("the console ticket has expired", next="Ask again: hdcs vm console")
    run.check()
    guests.set_console_password(run.ctx.host(), spec["vm_id"], note["password"], spec["ttl_s"])
    return {"node": run.ctx.server_node}
