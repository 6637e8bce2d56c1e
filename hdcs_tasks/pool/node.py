"""A server node joins its domain node's pool, keeps its lease, reports what runs on it, and leaves."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import Any

from kombu.exceptions import KombuError

from hdcs_tasks.clock import now_s
from hdcs_tasks.errors import HdcsError, Invalid, RebuildPending, Unavailable, Unreachable
from hdcs_tasks.hypervisor import facts as host_facts
from hdcs_tasks.hypervisor import guests, networks, storage, streams, transfer
from hdcs_tasks.hypervisor.locks import vm_lock
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import NodeContext
from hdcs_tasks.operations.sending import send, unwrap
from hdcs_tasks.pool.identity import instance_id, remember
from hdcs_tasks.pool.proof import JoinRequest
from hdcs_tasks.routing import CONTROL, check_name

log = logger(__name__)

_SHAPE = ("cpu_mhz", "sockets", "cores_per_socket", "threads_per_core", "max_vcpus", "memory_mib")


def join(ctx: NodeContext, *, answer_timeout_s: float = 15.0) -> dict[str, Any]:
    """Join: measure this host, prove the token, take subnet and role, and make network and storage pools real.

    Returns control's answer. Raises Rejected or Conflict with the reason when refused, Unreachable when no control
    worker answers, RebuildPending while the reservations are closed (ask again).
    """
    config = ctx.settings
    check_name("domain node", config.domain_node)
    check_name("server node", config.server_node)
    layout = storage.check(config.storage_root, config.domain_node)
    host = ctx.host()
    facts = host_facts.facts(host, config)
    try:
        answer = _ask(ctx, facts, answer_timeout_s)
    except RebuildPending:
        _report_unasked(ctx)
        raise
    remember(config, virt_type=facts.virt_type, **answer)
    spec = networks.NetworkSpec(
        answer["network_name"], answer["subnet"], answer["network_forward"], answer["dhcp_lease_s"]
    )
    networks.ensure_network(host, spec)
    storage.ensure_pools(host, layout)
    transfer.drop_send_pools(host)
    log.info("joined", domain_node=config.domain_node, subnet=answer["subnet"], primary=answer["storage_primary"])
    return answer


def _ask(ctx: NodeContext, facts: host_facts.HostFacts, timeout_s: float) -> dict[str, Any]:
    config = ctx.settings
    if config.join_token_file is None or not config.join_token_file.is_file():
        raise Invalid(
            f"server node {config.server_node} has no join token: HDCS_JOIN_TOKEN_FILE names no file",
            next=f"Get one with: hdcs domain token {config.domain_node}",
        )
    total, free = storage.disk_usage(config.storage_root)
    shape = {key: value for key, value in asdict(facts).items() if key in _SHAPE}
    request = JoinRequest(
        config.domain_node, config.server_node, config.server_node_ip, instance_id(config), shape,
        {"total_bytes": total, "free_bytes": free}, now_s(),
    ).signed(config.join_token_file.read_text())  # fmt: skip
    try:
        result = ctx.celery.send_task(
            "pool.join", kwargs={"request": asdict(request)}, queue=CONTROL, expires=timeout_s, ignore_result=False,
            argsrepr="", kwargsrepr=f"node={config.server_node}",
        )  # fmt: skip
        return unwrap(result.get(timeout=timeout_s, disable_sync_subtasks=False))
    except HdcsError:
        raise
    except Exception as error:  # broker errors come in many classes, and none may end the worker
        raise Unreachable(
            f"no control worker answered the join of {config.server_node}: {error!r}",
            next="Is a control worker running on the same Redis?",
        ) from error


def _report_unasked(ctx: NodeContext) -> None:
    """Tell what runs here for the rebuild that the join waits for: it would wait for this node, which takes no
    messages before it has joined."""
    with suppress(HdcsError, KombuError):  # a new server node has no network yet, and nothing to tell
        report(ctx, ctx.reservations.epoch.run_id())


def renew(ctx: NodeContext) -> bool:
    """Renew this node's lease; False when it ran out, and the node must join again."""
    config = ctx.settings
    return ctx.reservations.leases.renew("node", config.server_node, instance_id(config), config.lease_ttl_s)


def leave(ctx: NodeContext) -> None:
    """Tell control that this worker stops; the guests go on running."""
    config = ctx.settings
    message = {"server_node": config.server_node, "instance": instance_id(config)}
    send(ctx.celery, "pool.leave", message, CONTROL, expires_s=60)


def report(ctx: NodeContext, run_id: str) -> None:
    """Tell control what runs here, with the address and port each guest has: for a rebuild of the reservations."""
    host = ctx.host()
    hosts = {entry.mac: entry.ip for entry in networks.dhcp_hosts(host, ctx.settings.network_name)}
    seen = [guest for guest in guests.list_guests(host) if guest.active]
    found = [
        {"vm_id": g.vm_id, "state": g.state, "console_port": g.console_port, "ip": hosts.get(g.mac, ""), "step": g.step}
        for g in seen
    ]
    message = {"run_id": run_id, "node": ctx.server_node, "guests": found}
    send(ctx.celery, "pool.node_report", {"report": message}, CONTROL, expires_s=60)


def tidy(ctx: NodeContext) -> None:
    """Remove every definition of a guest that neither runs nor has a claim here, and every DHCP host entry whose VM
    does neither: one that runs gets its lost claim back (pool/tidy.py), and needs its address meanwhile. A VM being
    worked on is left for the next time."""
    if not ctx.reservations.epoch.is_open():
        return
    owned = {c.vm for c in ctx.reservations.pool.claims(ctx.domain_node) if c.node == ctx.server_node}
    for guest in guests.list_guests(ctx.host(), inactive=True):
        if guest.vm_id not in owned:
            _remove_definition(ctx, guest.vm_id)
    owners = {e.mac: ctx.reservations.macs.owner(e.mac) or "" for e in _dhcp_hosts(ctx)}
    left = {mac: vm_id for mac, vm_id in owners.items() if vm_id not in owned}
    running = {guest.mac.lower() for guest in guests.list_guests(ctx.host()) if guest.active} if left else set()
    for mac, vm_id in left.items():
        if mac.lower() not in running:
            _remove_dhcp_host(ctx, mac, vm_id)


def _dhcp_hosts(ctx: NodeContext) -> list[networks.DhcpHost]:
    return networks.dhcp_hosts(ctx.host(), ctx.settings.network_name)


def _remove_definition(ctx: NodeContext, vm_id: str) -> None:
    """What a start leaves whose libvirtd died between definition and start. Looked at once more under its lock."""
    with suppress(Unavailable), vm_lock(ctx.settings.state_dir, vm_id):
        seen = guests.info(ctx.host(), vm_id)
        if seen is not None and not seen.active and not _holds_here(ctx, vm_id):
            guests.stop(ctx.host(), vm_id, force=True)
            log.warning("removed the definition of a guest that does not run", vm=vm_id)


def free_cut_off(ctx: NodeContext) -> list[str]:
    """Let guests go on that wait for the target of a move which was cut off, and nobody watches any more: the worker
    that would have, died. Their ids."""
    return streams.end_silent(ctx.host())


def _remove_dhcp_host(ctx: NodeContext, mac: str, vm_id: str) -> None:
    """An entry whose VM holds nothing here. Looked at once more under its lock: a start claims before it adds one."""
    if not vm_id:
        networks.remove_dhcp_host(ctx.host(), ctx.settings.network_name, mac)
        return
    with suppress(Unavailable), vm_lock(ctx.settings.state_dir, vm_id):
        if not _holds_here(ctx, vm_id) and ctx.reservations.epoch.is_open():
            networks.remove_dhcp_host(ctx.host(), ctx.settings.network_name, mac)


def _holds_here(ctx: NodeContext, vm_id: str) -> bool:
    return any(claim.node == ctx.server_node for claim in ctx.reservations.pool.claim_of(vm_id))


def storage_facts(ctx: NodeContext) -> dict[str, int]:
    """Total and free bytes of the domain node's storage, zeros where it cannot be read."""
    try:
        total, free = storage.disk_usage(ctx.settings.storage_root)
    except (OSError, HdcsError):
        return {"total_bytes": 0, "free_bytes": 0}
    return {"total_bytes": total, "free_bytes": free}
