"""Starting a VM on a server node: layer two says where, and what cannot start leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from hdcs_tasks.errors import (
    BackupBroken,
    ClaimLost,
    HdcsError,
    NoCapacity,
    OutcomeUnknown,
    RebuildPending,
    Unavailable,
    Unreachable,
)
from hdcs_tasks.hypervisor import guests, storage
from hdcs_tasks.hypervisor.bitmaps import ensure_seed
from hdcs_tasks.hypervisor.checkpoints import redefine_checkpoints
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.keys import Key, KeyRing, give_to_libvirt
from hdcs_tasks.hypervisor.spec import GuestSpec
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import HandOver, NodeContext, Run
from hdcs_tasks.pool import node_cables
from hdcs_tasks.pool.identity import virt_type
from hdcs_tasks.reservations import Fence, MixEntry, Placed, PlaceRequest, Weighed
from hdcs_tasks.vm.node import CHECKPOINTS, OPEN, layout, lock, release, saved_memory, still_ours
from hdcs_tasks.vm.node_address import give_address

log = logger(__name__)

BEST = 5
"""How many server nodes an operation's decision names."""


def start(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Layer two, then the start: claim the best server node of the pool; if that is another one, hand over."""
    run.progress(10, "choosing a server node")
    if run.attempt == 1:
        spec = noted(spec, _place_here(run, spec))  # nobody's lock is waited for to hand over
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
    spec = noted(spec, placed)
    run.progress(40, f"starting on {placed.node}")
    # Before the guest runs: from then on nothing that fails may pass for a start that failed.
    why = decision(run, spec, placed)
    _start_here(run, spec, placed)
    if spec.get("saved"):
        # It comes back as it was and boots nothing; a booting guest counts until its agent answers.
        _start_ended(run.ctx, spec["guest"]["vm_id"])
    return {"node": placed.node, "port": placed.port, "ip": placed.ip, "decision": why} | _renewing(run.ctx, spec)


def _renewing(ctx: NodeContext, spec: dict[str, Any]) -> dict[str, str]:
    """A guest that came from its saved memory has the address of then: nobody waits until it has its new one."""
    if not spec.get("saved") or spec.get("isolated"):
        return {}
    if spec.get("paused"):
        return {"network": node_cables.AT_RESUME}
    node_cables.renew_soon(ctx, spec["guest"]["vm_id"])
    return {"network": node_cables.SOON}


def _place_here(run: Run, spec: dict[str, Any]) -> Placed:
    """Layer two's choice; HandOver where it is another server node."""
    ctx = run.ctx
    placed = choose(run, place_request(run, spec, spec["guest"]["vm_id"], start_s=ctx.settings.boot_slot_s))
    if placed.node != ctx.server_node:
        if (seen := _left_running(run, spec)) is not None:
            _end_earlier(run, spec, seen)
        raise HandOver(placed.node, noted(spec, placed))
    return placed


def noted(spec: dict[str, Any], placed: Placed) -> dict[str, Any]:
    """The spec with what the choice was made by, for whoever does the step: it is told once, with the claim."""
    return spec | {"weighed": [list(seen) for seen in placed.weighed]} if placed.weighed else spec


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
    still_ours(run)
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
        mix=tuple(MixEntry(*entry) for entry in spec["mix"]), told=BEST,
        marks=tuple(spec["marks"]), shuns=tuple(spec["shuns"]), seeks=tuple(spec["seeks"]), label=spec["label"],
        hint=spec["hint"], prefer=spec.get("prefer"),
    )  # fmt: skip


def decision(run: Run, spec: dict[str, Any], placed: Placed) -> dict[str, Any]:
    """What the operation keeps of the choice: counts, and the best server nodes with the scores it was made by."""
    need, pool = spec["need"], run.ctx.reservations.pool
    stand = pool.standing(run.ctx.domain_node, need["vcpus"], need["memory_mib"], spec["order"])
    counts = {"fits": stand.fitting, "too little room": stand.open - stand.fitting, "closed": stand.nodes - stand.open}
    weighed = placed.weighed or [Weighed(*seen) for seen in spec.get("weighed", ())]
    if not weighed:  # an earlier attempt claimed, and took to its grave what it had weighed
        weighed = [Weighed(*seen, None, "") for seen in stand.best]
    best = [
        seen._asdict() | {"score": None if seen.score is None else round(seen.score, 4)} for seen in weighed
    ]  # fmt: skip
    return {"node": placed.node, "order": spec["order"], "mix": spec["mix"], "counts": counts, "best": best}


def choose(run: Run, request: PlaceRequest) -> Placed:
    """Layer two's choice, which must be a living server node.

    One that died may be chosen until the lease sweep sees it, and an attempt that was handed to it still has its claim
    there. Nothing of this attempt can have begun on it: control sends a step that has to its own queue alone. A newer
    attempt's may: the claim is given back only while the step is ours.
    """
    ctx = run.ctx
    placed = ctx.reservations.pool.place(request)
    if placed.node == ctx.server_node or ctx.reservations.leases.holder("node", placed.node):
        return placed
    log.warning("placed on a server node without a lease: placing again", vm=request.vm, node=placed.node)
    still_ours(run)
    ctx.reservations.pool.release(
        request.domain_node, request.vm, placed.node, ctx.settings.dhcp_lease_s, step=request.step,
        fence=Fence(run.step, run.attempt, run.holder),
    )  # fmt: skip
    still_ours(run)
    return ctx.reservations.pool.place(replace(request, exclude=(*request.exclude, placed.node)))


def _start_here(run: Run, spec: dict[str, Any], placed: Placed) -> None:
    ctx, guest = run.ctx, spec["guest"]
    place, host = layout(ctx), ctx.host()
    # What runs from its saved memory already cannot be taken back: a cancel comes too late.
    check = still_ours if spec.get("saved") and _left_running(run, spec) else Run.check
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
    if saved is not None and not spec.get("isolated"):
        node_cables.note(ctx, guest["vm_id"])
    guests.start(host, wanted, saved=saved, paused=bool(spec.get("paused")))
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
    still_ours(run)
    try:
        seen = guests.info(ctx.host(), guest["vm_id"])
        if seen is None or not seen.active:
            if seen is not None:  # libvirtd died between its definition and its start
                still_ours(run)
                guests.stop(ctx.host(), guest["vm_id"], force=True)
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
