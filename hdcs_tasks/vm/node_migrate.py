"""Live migration inside a domain node, step by step on the server nodes. Each step looks first at what is there."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.errors import Conflict, HdcsError, HypervisorRefused, NotFound, OutcomeUnknown
from hdcs_tasks.hypervisor import guests, migration, whereabouts
from hdcs_tasks.hypervisor.connection import Host, peer_of
from hdcs_tasks.hypervisor.keys import KeyRing, give_to_libvirt
from hdcs_tasks.hypervisor.spec import GuestInfo
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import HandOver, NodeContext, Run
from hdcs_tasks.pool import node_cables
from hdcs_tasks.vm.node import layout, lock, release
from hdcs_tasks.vm.node_address import give_address
from hdcs_tasks.vm.node_start import choose, decision, noted, place_request, restore_checkpoints

log = logger(__name__)

ENDED = "it arrived, and has ended since"

UNSEEN = {"total_ms": -1, "downtime_ms": -1, "bytes": -1, "memory_bytes": -1, "disk_bytes": -1}
"""Figures of a move whose end nobody watched; the target's libvirt may know them (``finish``)."""


def prepare(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target: claim capacity and IP by layer two, and tell this node's DHCP of the VM."""
    ctx = run.ctx
    placed = choose(run, place_request(run, spec, spec["vm_id"], start_s=0))
    if placed.node != ctx.server_node:
        raise HandOver(placed.node, noted(spec, placed))
    layout(ctx)
    give_to_libvirt(ctx.host(), KeyRing.of(ctx.settings).find(spec.get("disk_key")))
    run.check()
    give_address(ctx, spec["mac"], placed.ip, spec["name"])
    return {
        "node": placed.node, "ip": placed.ip, "port": placed.port, "address": ctx.settings.server_node_ip,
        "decision": decision(run, spec, placed),
    }  # fmt: skip


def perform(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the source: move the guest. Where it is gone already, an earlier attempt moved it."""
    ctx, target = run.ctx, spec["target"]
    if spec["source"]["name"] != ctx.server_node:
        raise HandOver(spec["source"]["name"], spec)
    with lock(ctx, spec["vm_id"]):
        if has_left(run, spec):
            return dict(UNSEEN)
        run.check()
        try:
            done = migration.migrate_live(
                ctx.host(), spec["vm_id"], unsafe=ctx.settings.migrate_unsafe,
                postcopy=bool(spec["options"].get("postcopy")), **terms(run, spec),
            )  # fmt: skip
        except (NotFound, Conflict, HypervisorRefused):
            # libvirt went on with an earlier attempt's move, and ended it while this one waited for its turn?
            if has_left(run, spec):
                return dict(UNSEEN)
            raise
    log.info("moved", vm=spec["name"], to=target["node"], downtime_ms=done.downtime_ms)
    return measured(done)


def terms(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """What every live move is told, inside a domain node or between two."""
    config, address, options = run.ctx.settings, spec["target"]["address"], spec["options"]
    return {
        "target_uri": peer_of(config, address), "target_address": address, "tls": config.migrate_tls,
        "graphics_uri": f"spice://{address}", "bandwidth_mib_s": options.get("bandwidth_mib_s"),
        "auto_converge": options.get("auto_converge", True), "on_progress": run.progress,
        "cancelled": run.cancelled, "deadline_s": config.step_deadline_s,
    }  # fmt: skip


def measured(done: migration.MigrationResult) -> dict[str, Any]:
    return {
        "total_ms": done.total_ms, "downtime_ms": done.downtime_ms, "bytes": done.bytes,
        "memory_bytes": done.memory_bytes, "disk_bytes": done.disk_bytes,
    }  # fmt: skip


def has_left(run: Run, spec: dict[str, Any]) -> bool:
    """Whether an earlier attempt moved the guest away; one still at it is watched to its end. The finish step sees
    whether it runs at the target, and says so if not. Raises HypervisorRefused: it has ended here."""
    ctx = run.ctx
    left = migration.adopt(
        ctx.host(), spec["vm_id"], on_progress=run.progress, cancelled=run.cancelled,
        deadline_s=ctx.settings.step_deadline_s,
    )  # fmt: skip
    seen = guests.info(ctx.host(), spec["vm_id"])
    if seen is not None and seen.active and not (seen.state == "paused" and _is_left_over(run, spec)):
        return False
    if seen is None or not seen.active:
        _check_not_ended(run, spec)
    log.warning("guest gone from its source", vm=spec["vm_id"], to=spec["target"]["node"], earlier=str(left))
    return True


def _check_not_ended(run: Run, spec: dict[str, Any]) -> None:
    """A guest that does not run here may have ended by itself (shut down by its user, say) while it was to move: its
    disk is here, and what has arrived of it at the target is not it. Raises HypervisorRefused then, else OutcomeUnknown
    where that is not certain yet."""
    ctx, presence = run.ctx, whereabouts.Presence
    at = whereabouts.observe(ctx.host(), peer(ctx, spec["target"]["address"]), spec["vm_id"])
    if at.target is presence.ABSENT:
        raise HypervisorRefused(
            f"the guest of VM {spec['name']} ended on {ctx.server_node} before it had moved",
            next=f"It is stopped where it was. Start it again: hdcs vm start {spec['name']}",
        )
    if at.source is not presence.ABSENT and at.target is not presence.RUNNING:
        raise OutcomeUnknown(
            f"the guest of VM {spec['name']} ended on {ctx.server_node} while it moved to {spec['target']['node']}",
            next="What has arrived there is looked at again",
        )


def _is_left_over(run: Run, spec: dict[str, Any]) -> bool:
    """Whether the guest that stands still here is what a hand-over left that nobody saw the end of.

    A guest that ran is stopped by libvirt only to hand it over. If its libvirtd dies right then, it stays stopped here
    whatever became of the other side. At the target libvirt keeps a definition from the moment the guest runs there,
    so none means that it never did: then it goes on here.
    """
    if spec["was"] != "running":
        return False
    ctx, vm_id = run.ctx, spec["vm_id"]
    seen = whereabouts.observe(ctx.host(), peer(ctx, spec["target"]["address"]), vm_id)
    if seen.busy:
        return False
    if seen.target is whereabouts.Presence.ABSENT:
        run.check()
        guests.resume(ctx.host(), vm_id)
        return False
    if seen.target in (whereabouts.Presence.UNKNOWN, whereabouts.Presence.PAUSED):
        raise OutcomeUnknown(
            f"VM {spec['name']} was stopped for its hand-over to {spec['target']['node']}, which has not ended there",
            next=f"Is libvirtd of {spec['target']['node']} up? The move is tried again",
        )
    return True


def peer(ctx: NodeContext, address: str) -> Host | None:
    """The libvirt of another server node; None where it cannot be reached."""
    try:
        return Host.open(peer_of(ctx.settings, address))
    except HdcsError:
        return None


def finish(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target: the guest runs here; its checkpoints and network follow."""
    ctx, vm_id = run.ctx, spec["vm_id"]
    with lock(ctx, vm_id):
        if not see_it_here(run, spec).active:
            return {"network": ENDED}
        run.check()
        take_over(run, spec)
        restore_checkpoints(ctx.host(), layout(ctx), vm_id)
        return {"network": renew(run, spec)} | figures(ctx, spec)


def see_it_here(run: Run, spec: dict[str, Any]) -> GuestInfo:
    """The guest, seen at the target; one that libvirt left paused half-way is let run. Raises OutcomeUnknown.

    Not active: it arrived and has ended since (its host lost power, say). libvirt keeps a definition at the target only
    from the moment the guest runs there, so what may stand still at the source is not it any more.
    """
    ctx = run.ctx
    seen = guests.info(ctx.host(), spec["vm_id"])
    if seen is not None and seen.state == "paused" and spec["was"] == "running":
        _held_by(run, spec)
        seen = guests.info(ctx.host(), spec["vm_id"])
    if seen is None:
        raise OutcomeUnknown(
            f"VM {spec['name']} is neither at {spec['source']['name']} nor at {ctx.server_node}",
            next="Look at both server nodes' libvirt before starting it again",
        )
    return seen


def take_over(run: Run, spec: dict[str, Any]) -> None:
    """Have QEMU take over the disks of a VM that arrived suspended: the guest goes on for a moment. QEMU does it only
    then, and would end itself at the next move or save (7.2: an assertion of ``bdrv_inactivate_recurse``)."""
    if spec["was"] != "suspended":
        return
    host, vm_id = run.ctx.host(), spec["vm_id"]
    guests.resume(host, vm_id)
    guests.suspend(host, vm_id)


def figures(ctx: NodeContext, spec: dict[str, Any]) -> dict[str, Any]:
    """The move's figures as the target's libvirt has them, where nobody watched its end."""
    if not spec.get("unseen"):
        return {}
    found = migration.arrived(ctx.host(), spec["vm_id"])
    return measured(found) if found is not None else {}


def renew(run: Run, spec: dict[str, Any]) -> str:
    """The new server node has another subnet: the guest is made to ask DHCP again. What the result says of it."""
    return node_cables.renew(run.ctx, spec["vm_id"], spec["mac"])


def look(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target, after a move whose end nobody knows: who holds the guest. On the source, if the target is lost."""
    if run.ctx.server_node == spec["source"]["name"]:
        return _look_at_source(run, spec)
    with lock(run.ctx, spec["vm_id"]):
        run.check()
        return {"node": run.ctx.server_node, "held_by": _held_by(run, spec)}


def _look_at_source(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    with lock(run.ctx, spec["vm_id"]):
        seen = guests.info(run.ctx.host(), spec["vm_id"])
    if seen is not None and seen.active and seen.state != spec["was"].replace("suspended", "paused"):
        raise OutcomeUnknown(
            f"VM {spec['name']} stands still at its source, and its target is lost",
            next="Bring the target back, or make sure that it is off and resume the guest (virsh resume)",
        )
    # One that has ended here is here: libvirt takes the definition of a guest away when it has moved.
    held = "source" if seen is not None else "target"
    return {"node": run.ctx.server_node, "held_by": held}


def _seen_at_both(run: Run, spec: dict[str, Any]) -> whereabouts.Whereabouts:
    """On the target: where the guest is."""
    return whereabouts.observe(peer(run.ctx, spec["source"]["ip"]), run.ctx.host(), spec["vm_id"])


def _held_by(run: Run, spec: dict[str, Any]) -> str:
    """ "source" or "target". One that stands still here because libvirt's hand-over broke, and is the only one left, is
    let run. Raises OutcomeUnknown for what nobody may conclude."""
    ctx, vm_id = run.ctx, spec["vm_id"]
    seen = _seen_at_both(run, spec)
    held = seen.held_by
    if held == "unknown":
        raise OutcomeUnknown(
            f"guest of VM {spec['name']} is {seen.source} at its source and {seen.target} at its target",
            next="Look at both server nodes' libvirt (virsh list) before anything is started",
        )
    if held == "target" and spec["was"] == "running" and seen.target is whereabouts.Presence.PAUSED:
        run.check()
        whereabouts.finish_at_target(ctx.host(), vm_id)
    return held


def clean(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the source: what the VM held here is given back, once the guest is seen not to be here."""
    ctx = run.ctx
    with lock(ctx, spec["vm_id"]):
        leave(run, spec)
        release(ctx, spec["vm_id"], spec["mac"])
    return {"node": ctx.server_node}


def leave(run: Run, spec: dict[str, Any]) -> None:
    """The guest is seen not to run here, and no definition of it is left. Raises OutcomeUnknown.

    One that runs here beside the one at the target, where the record has it, went on when nobody could reach this
    server node: it ends.
    """
    ctx = run.ctx
    seen = guests.info(ctx.host(), spec["vm_id"])
    if seen is not None and seen.state == "running":
        there = peer(ctx, spec["target"]["address"])
        if not whereabouts.observe(ctx.host(), there, spec["vm_id"]).doubled:
            raise OutcomeUnknown(f"VM {spec['name']} still runs on {ctx.server_node}", next="Look at both server nodes")
        log.warning("the guest ran twice; it goes on where it moved to", vm=spec["name"], to=spec["target"]["node"])
    run.check()
    if seen is not None:
        # A left-over definition, or the stopped guest of a hand-over whose other side the finish step saw.
        guests.stop(ctx.host(), spec["vm_id"], force=True)


def undo(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target, after a move that did not happen: nothing of the VM stays here. If it did happen after all,
    ``held_by`` says so, and nothing is undone."""
    ctx = run.ctx
    with lock(ctx, spec["vm_id"]):
        if not take_back(run, spec):
            return {"node": ctx.server_node, "held_by": "target"}
        release(ctx, spec["vm_id"], spec["mac"])
    return {"node": ctx.server_node, "held_by": "source"}


def take_back(run: Run, spec: dict[str, Any]) -> bool:
    """End what a move that did not happen left of the guest here; False where the guest runs here and nowhere else (or
    ran, and has ended since). Of one that runs twice, the one at the source goes on. Raises OutcomeUnknown."""
    ctx = run.ctx
    seen = guests.info(ctx.host(), spec["vm_id"])
    if seen is not None and seen.state != "paused" and _held_by(run, spec) == "target":
        return False
    if seen is not None and seen.state == "running":
        if not _seen_at_both(run, spec).doubled:
            raise OutcomeUnknown(f"VM {spec['name']} runs on {ctx.server_node}", next="Look at both server nodes")
        log.warning("the guest ran twice; it goes on at its source", vm=spec["name"], source=spec["source"]["name"])
    run.check()
    if seen is not None:
        guests.stop(ctx.host(), spec["vm_id"], force=True)
    return True
