"""Live migration inside a domain node, step by step on the server nodes. Each step looks first at what is there."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.errors import Conflict, HdcsError, HypervisorRefused, NotFound, OutcomeUnknown
from hdcs_tasks.hypervisor import agent, guests, migration, networks
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.keys import KeyRing, give_to_libvirt
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import HandOver, Run
from hdcs_tasks.vm.node import choose, decision, layout, lock, place_request, release, restore_checkpoints

log = logger(__name__)


def prepare(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target: claim capacity and IP by layer two, and tell this node's DHCP of the VM."""
    ctx = run.ctx
    placed = choose(ctx, place_request(run, spec, spec["vm_id"], start_s=0))
    if placed.node != ctx.server_node:
        raise HandOver(placed.node, spec)
    layout(ctx)
    give_to_libvirt(ctx.host(), KeyRing.of(ctx.settings).find(spec.get("disk_key")))
    run.check()
    networks.add_dhcp_host(ctx.host(), ctx.settings.network_name, spec["mac"], placed.ip, spec["name"])
    return {
        "node": placed.node, "ip": placed.ip, "port": placed.port, "address": ctx.settings.server_node_ip,
        "decision": decision(run, spec, placed),
    }  # fmt: skip


def perform(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the source: move the running guest. Where it is gone already, an earlier attempt moved it."""
    ctx, target = run.ctx, spec["target"]
    if spec["source"]["name"] != ctx.server_node:
        raise HandOver(spec["source"]["name"], spec)
    with lock(ctx, spec["vm_id"]):
        if _has_left(run, spec):
            return _moved_earlier(spec)
        run.check()
        try:
            done = migration.migrate_live(
                ctx.host(), spec["vm_id"], target_uri=migrate_uri(target["address"]), target_address=target["address"],
                graphics_uri=f"spice://{target['address']}", unsafe=ctx.settings.migrate_unsafe,
                on_progress=run.progress, cancelled=run.cancelled, deadline_s=ctx.settings.step_deadline_s,
            )  # fmt: skip
        except (NotFound, Conflict, HypervisorRefused):
            # libvirt went on with an earlier attempt's move, and ended it while this one waited for its turn?
            if _has_left(run, spec):
                return _moved_earlier(spec)
            raise
    return {
        "total_ms": done.total_ms, "downtime_ms": done.downtime_ms, "bytes": done.bytes,
        "memory_bytes": done.memory_bytes, "disk_bytes": done.disk_bytes,
    }  # fmt: skip


def _has_left(run: Run, spec: dict[str, Any]) -> bool:
    seen = guests.info(run.ctx.host(), spec["vm_id"])
    return seen is None or not seen.active or (seen.state == "paused" and _is_left_over(run, spec))


def _is_left_over(run: Run, spec: dict[str, Any]) -> bool:
    """Whether the guest that stands still here is what a hand-over left that nobody saw the end of.

    A guest that may move runs; libvirt stops it only to hand it over. If its libvirtd dies right then, it stays
    stopped here whatever became of the other side. At the target libvirt keeps a definition from the moment the guest
    runs there, so none means that it never did: then it goes on here.
    """
    ctx, vm_id = run.ctx, spec["vm_id"]
    seen = migration.observe(ctx.host(), _target_host(spec), vm_id)
    if seen.busy:
        return False
    if seen.target is migration.Presence.ABSENT:
        run.check()
        guests.resume(ctx.host(), vm_id)
        return False
    if seen.target in (migration.Presence.UNKNOWN, migration.Presence.PAUSED):
        raise OutcomeUnknown(
            f"VM {spec['name']} was stopped for its hand-over to {spec['target']['node']}, which has not ended there",
            next=f"Is libvirtd of {spec['target']['node']} up? The move is tried again",
        )
    return True


def _target_host(spec: dict[str, Any]) -> Host | None:
    try:
        return Host.open(migrate_uri(spec["target"]["address"]), timeout_s=10)
    except HdcsError:
        return None


def migrate_uri(address: str) -> str:
    """How the source's libvirtd reaches the target's."""
    return f"qemu+tcp://{address}/system"


def _moved_earlier(spec: dict[str, Any]) -> dict[str, Any]:
    """The guest is not at its source: the finish step sees whether it runs at the target, and says so if not."""
    log.warning("guest gone from its source; a migration ended unseen", vm=spec["vm_id"], to=spec["target"]["node"])
    return {"total_ms": -1, "downtime_ms": -1, "bytes": -1, "memory_bytes": -1, "disk_bytes": -1}


def finish(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target: the guest runs here; its checkpoints and network follow."""
    ctx, vm_id = run.ctx, spec["vm_id"]
    host = ctx.host()
    with lock(ctx, vm_id):
        seen = guests.info(host, vm_id)
        if seen is None or not seen.active:
            raise OutcomeUnknown(
                f"VM {spec['name']} is neither at {spec['source']['name']} nor at {ctx.server_node}",
                next="Look at both server nodes' libvirt before starting it again",
            )
        run.check()
        restore_checkpoints(host, layout(ctx), vm_id)
        return {"network": _renew(run, spec)}


def _renew(run: Run, spec: dict[str, Any]) -> str:
    """The new server node has another subnet: pull the cable, so that the guest asks DHCP again."""
    try:
        agent.renew_network(run.ctx.host(), spec["vm_id"], spec["mac"])
    except HdcsError as error:
        log.warning("network not renewed after migration", vm=spec["vm_id"], error=str(error))
        return f"not renewed: {error.message}"
    return "renewed"


def clean(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the source: what the VM held here is given back, once the guest is seen not to be here."""
    ctx = run.ctx
    with lock(ctx, spec["vm_id"]):
        seen = guests.info(ctx.host(), spec["vm_id"])
        if seen is not None and seen.state == "running":
            raise OutcomeUnknown(f"VM {spec['name']} still runs on {ctx.server_node}", next="Look at both server nodes")
        run.check()
        if seen is not None:
            # A left-over definition, or the stopped guest of a hand-over whose other side the finish step saw run.
            guests.stop(ctx.host(), spec["vm_id"], force=True)
        release(ctx, spec["vm_id"], spec["mac"])
    return {"node": ctx.server_node}


def undo(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target, after a move that did not happen: nothing of the VM stays here."""
    ctx = run.ctx
    with lock(ctx, spec["vm_id"]):
        seen = guests.info(ctx.host(), spec["vm_id"])
        if seen is not None and seen.state == "running":
            raise OutcomeUnknown(f"VM {spec['name']} runs on {ctx.server_node}", next="Look at both server nodes")
        run.check()
        if seen is not None:
            guests.stop(ctx.host(), spec["vm_id"], force=True)
        release(ctx, spec["vm_id"], spec["mac"])
    return {"node": ctx.server_node}
