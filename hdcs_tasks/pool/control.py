"""Domain nodes and server nodes on the control plane: joining, leaving, losing, draining, capacity."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.clock import now_s
from hdcs_tasks.errors import Conflict, Rejected, WrongState
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.control import Control, Tx
from hdcs_tasks.operations.recovery import send_unheld_again
from hdcs_tasks.pool import admission, policy, rules, waiting
from hdcs_tasks.pool.proof import JoinRequest, proof_of, token_key
from hdcs_tasks.reservations import PoolNode
from hdcs_tasks.routing import check_name, direct_queue, quick_queue
from hdcs_tasks.states import IN_POOL, VM_HOLDS_GUEST, ServerNodeState
from hdcs_tasks.store.models import DomainNode, ServerNode, Vm, now
from hdcs_tasks.store.naming import named
from hdcs_tasks.store.transitions import move

log = logger(__name__)

PROOF_AGE_S = 300


@dataclass(frozen=True)
class NewDomainNode:
    """A domain node and its join token, which is shown once and never kept."""

    name: str
    token: str
    port_first: int
    port_last: int


def create_domain_node(control: Control, name: str, token: str | None = None) -> NewDomainNode:
    """Create a domain node: its queue name, console port range and join token.

    Raises Invalid for a bad name, Conflict when it exists, Unavailable when no port range is left.
    """
    check_name("domain node", name)
    config = control.settings
    token = token or secrets.token_urlsafe(24)
    with control.transaction() as tx:
        if tx.session.get(DomainNode, name) is not None:
            raise Conflict(f"there is a domain node {name} already", next="See: hdcs domain list")
        first, last = control.reservations.ports.allot_range(
            name, config.port_first, config.port_last, config.ports_per_domain_node
        )
        tx.session.add(DomainNode(name=name, token_key=token_key(token), port_first=first, port_last=last))
    return NewDomainNode(name, token, first, last)


def new_token(control: Control, name: str) -> str:
    """Replace a domain node's join token; nodes that are in stay in."""
    token = secrets.token_urlsafe(24)
    with control.transaction() as tx:
        get_domain_node(tx.session, name).token_key = token_key(token)
    return token


def get_domain_node(session: Session, name: str) -> DomainNode:
    return named(session, DomainNode, name, "domain node", "hdcs domain list")


def get_server_node(session: Session, name: str) -> ServerNode:
    return named(session, ServerNode, name, "server node", "hdcs node list")


# --- joining


def join(control: Control, request: JoinRequest) -> dict[str, Any]:
    """Take a server node into its domain node's pool, or refuse with a clear reason.

    Idempotent for the same instance. The answer holds what the node needs: subnet, network, state, role.
    """
    check_name("server node", request.server_node)
    with control.transaction() as tx:
        domain_node = get_domain_node(tx.session, request.domain_node)
        _check_proof(domain_node, request)
        _take_lease(control, request)
        subnet = control.reservations.subnets.take(
            request.server_node, control.settings.supernet, control.settings.subnet_prefix
        )
        lost_at = _lost_at(tx.session, request.server_node)
        node = _record(tx, request, subnet)
        domain_node.storage_total_bytes = request.storage["total_bytes"]
        domain_node.storage_free_bytes = request.storage["free_bytes"]
        _elect_primary(tx.session, domain_node)
        tx.event("server_node.joined", node.name, f"joined {domain_node.name} with {node.memory_mib} MiB")
        put_in_pool(control, tx, node)
        if lost_at is not None:
            its_own = [direct_queue(domain_node.name, node.name), quick_queue(domain_node.name, node.name)]
            _send_again(control, tx, [domain_node.name, *its_own], lost_at)
    return {
        "server_node": node.name, "domain_node": domain_node.name, "subnet": subnet, "state": node.state.value,
        "network_name": control.settings.network_name, "network_forward": control.settings.network_forward,
        "dhcp_lease_s": control.settings.dhcp_lease_s, "storage_primary": domain_node.storage_primary == node.name,
        "lease_ttl_s": control.settings.lease_ttl_s,
    }  # fmt: skip


def _check_proof(domain_node: DomainNode, request: JoinRequest) -> None:
    expected = proof_of(domain_node.token_key, request)
    if not hmac.compare_digest(expected, request.proof):
        raise Rejected(
            f"server node {request.server_node} was refused: its join token is not the one of domain node "
            f"{domain_node.name}",
            next=f"Make a new one (hdcs domain token {domain_node.name}) and put it into HDCS_JOIN_TOKEN_FILE",
        )
    if abs(now_s() - request.at) > PROOF_AGE_S:
        raise Rejected(
            f"server node {request.server_node} was refused: its clock differs by "
            f"{abs(now_s() - request.at):.0f} s from the control plane's",
            next="Synchronise the clocks (chrony or systemd-timesyncd), then start the node again",
        )


def _take_lease(control: Control, request: JoinRequest) -> None:
    granted = control.reservations.leases.grant(
        "node", request.server_node, request.instance, control.settings.lease_ttl_s
    )
    if not granted:
        raise Conflict(
            f"server node {request.server_node} was refused: a living server node has that name",
            next="Give this server another HDCS_SERVER_NODE, or stop the other one (hdcs node list)",
        )


def _record(tx: Tx, request: JoinRequest, subnet: str) -> ServerNode:
    node = tx.session.get(ServerNode, request.server_node)
    pool = get_domain_node(tx.session, request.domain_node)
    vcpus, memory_mib = _promised(tx.control, pool, request.facts, node.rules if node else {})
    if node is not None and node.domain_node != request.domain_node:
        if node.state in IN_POOL:
            raise Conflict(
                f"server node {node.name} belongs to domain node {node.domain_node}",
                next=f"Stop it there and remove it first: hdcs node remove {node.name}",
            )
        node.domain_node = request.domain_node
    if node is None:
        node = ServerNode(
            name=request.server_node, domain_node=request.domain_node, draining=pool.draining,
            state=ServerNodeState.DRAINING if pool.draining else ServerNodeState.UP,
            ip=request.ip, subnet=subnet, instance=request.instance, facts=request.facts, vcpus=vcpus,
            memory_mib=memory_mib,
        )  # fmt: skip
        tx.session.add(node)
    else:
        node.ip, node.subnet, node.instance = request.ip, subnet, request.instance
        node.facts, node.vcpus, node.memory_mib = request.facts, vcpus, memory_mib
        node.joined_at = now()
        wanted = ServerNodeState.DRAINING if node.draining else ServerNodeState.UP
        if node.state is not wanted:
            move(node, wanted)
    node.observed_at = now()
    tx.session.flush()
    return node


def _lost_at(session: Session, name: str) -> datetime | None:
    node = session.get(ServerNode, name)
    return node.state_at if node is not None and node.state is ServerNodeState.LOST else None


def _send_again(control: Control, tx: Tx, queues: list[str], lost_at: datetime) -> None:
    """What may have been given to a server node that was cut off, and was lost with its connection."""
    since = lost_at - timedelta(seconds=2 * control.settings.lease_ttl_s)
    tx.after(lambda: send_unheld_again(control, queues, since))


def _promised(control: Control, pool: DomainNode, facts: dict[str, Any], ruled: dict[str, Any]) -> tuple[int, int]:
    """vCPUs and MiB a server node of this domain node may promise to guests, by the rules that hold for it."""
    config = policy.capacity_settings(
        control.settings.capacity, policy.read(policy.PoolPolicy, pool.rules), policy.read(policy.NodePolicy, ruled)
    )
    known = rules.NodeFacts(**facts)
    return rules.schedulable_vcpus(known, config), rules.schedulable_memory_mib(known, config)


def _elect_primary(session: Session, domain_node: DomainNode) -> None:
    """The living server node with the lowest IP holds the storage-primary role."""
    session.flush()
    nodes = session.scalars(
        select(ServerNode).where(ServerNode.domain_node == domain_node.name, ServerNode.state.in_(IN_POOL))
    ).all()
    lowest = min(nodes, key=lambda node: ipaddress.ip_address(node.ip), default=None)
    domain_node.storage_primary = lowest.name if lowest else None


def put_in_pool(control: Control, tx: Tx, node: ServerNode) -> None:
    """Make Redis's pool show this node after the commit."""
    pool_node, domain_node = pool_node_of(control, node), node.domain_node
    tx.after(lambda: control.reservations.pool.put_node(domain_node, pool_node))
    tx.after(lambda: waiting.wake_waiting(control, domain_node))


def pool_node_of(control: Control, node: ServerNode) -> PoolNode:
    ruled, config = policy.read(policy.NodePolicy, node.rules), control.settings
    most = config.starts_max if ruled.max_starts is None else ruled.max_starts
    least = config.starts_min if ruled.min_starts is None else ruled.min_starts
    return PoolNode(
        name=node.name, vcpus=node.vcpus, memory_mib=node.memory_mib, subnet=node.subnet,
        max_starts=most, min_starts=min(least, most),
        schedulable=node.state is ServerNodeState.UP and not node.draining, tags=ruled.tags,
    )  # fmt: skip


# --- what operators rule


def set_domain_rules(control: Control, name: str, **changes: Any) -> dict[str, Any]:
    """Change placement rules of a domain node (``policy.PoolPolicy``; None: the default again). Its view; Invalid."""
    with control.transaction() as tx:
        row = get_domain_node(tx.session, name)
        row.rules = policy.changed(policy.PoolPolicy, row.rules, changes)
        max_starts = policy.read(policy.PoolPolicy, row.rules).max_starts
        tx.after(lambda: control.reservations.pool.limit_starts(name, max_starts))
        for node in tx.session.scalars(select(ServerNode).where(ServerNode.domain_node == name)):
            _count_anew(control, tx, row, node)
    return show_domain_node(control, name)


def set_node_rules(control: Control, name: str, **changes: Any) -> dict[str, Any]:
    """Change placement rules of a server node (``policy.NodePolicy``; None: the default again). Its view; Invalid."""
    with control.transaction() as tx:
        node = get_server_node(tx.session, name)
        node.rules = policy.changed(policy.NodePolicy, node.rules, changes)
        _count_anew(control, tx, get_domain_node(tx.session, node.domain_node), node)
    return show_server_node(control, name)


def _count_anew(control: Control, tx: Tx, pool: DomainNode, node: ServerNode) -> None:
    """What is claimed stays, also where it now is more than may be promised: then nothing more fits."""
    node.vcpus, node.memory_mib = _promised(control, pool, node.facts, node.rules)
    if node.state in IN_POOL:
        put_in_pool(control, tx, node)


# --- leaving and losing


def leave(control: Control, server_node: str, instance: str) -> None:
    """A server node's worker was stopped in order: the pool shrinks at once. Its guests go on running."""
    with control.transaction() as tx:
        node = get_server_node(tx.session, server_node)
        if node.instance != instance or node.state not in IN_POOL:
            return
        _take_out(control, tx, node, ServerNodeState.LEFT, "left the pool")
    control.reservations.leases.drop("node", server_node, instance)


def quick_queues(session: Session) -> list[str]:
    """The quick queue of every server node that is in its pool: whom a sweep asks."""
    return [quick_queue(domain_node, name) for domain_node, name in session.execute(_IN_POOL)]


# Made once: sweeps ask every few seconds.
_IN_POOL = select(ServerNode.domain_node, ServerNode.name).where(ServerNode.state.in_(IN_POOL))
_NOT_LEFT = select(ServerNode).where(ServerNode.state != ServerNodeState.LEFT)


def lease_sweep(control: Control) -> list[str]:
    """Server nodes whose lease ran out are lost: out of the pool at once. Returns their names."""
    if not control.reservations.epoch.is_open():
        return []  # A lease missing after Redis was lost is not a lost node.
    with control.store.read() as session:
        nodes = list(session.scalars(_NOT_LEFT))
    holders = control.reservations.leases.holders("node", [node.name for node in nodes])
    for node in nodes:
        if node.state is ServerNodeState.LOST and holders.get(node.name) == node.instance:
            # Its join took the lease and broke off before the record: without a lease it joins again.
            control.reservations.leases.drop("node", node.name, node.instance)
    suspects = [node.name for node in nodes if node.state in IN_POOL and not holders.get(node.name)]
    return [name for name in suspects if _lose(control, name)]


def _lose(control: Control, name: str) -> bool:
    """Take a server node out whose lease is missing; False if it came back while we looked."""
    with control.transaction() as tx:
        node = tx.session.get(ServerNode, name, with_for_update=True)
        if node is None or node.state not in IN_POOL or control.reservations.leases.holder("node", name):
            return False
        _take_out(control, tx, node, ServerNodeState.LOST, "lost: its lease ran out")
        _send_again(control, tx, [node.domain_node], now())
        return True


def _take_out(control: Control, tx: Tx, node: ServerNode, state: ServerNodeState, words: str) -> None:
    move(node, state)
    _elect_primary(tx.session, get_domain_node(tx.session, node.domain_node))
    tx.event(f"server_node.{state.value}", node.name, f"{node.name} {words}", domain_node=node.domain_node)
    name, domain_node = node.name, node.domain_node
    tx.after(lambda: control.reservations.pool.remove_node(domain_node, name, force=True))


def set_draining(tx: Tx, node: ServerNode, *, draining: bool) -> None:
    """Let no new VM start on this server node, or let them again; survives restarts of its worker."""
    node.draining = draining
    wanted = ServerNodeState.DRAINING if draining else ServerNodeState.UP
    if node.state in IN_POOL and node.state is not wanted:
        move(node, wanted)
        put_in_pool(tx.control, tx, node)


def remove(control: Control, server_node: str) -> None:
    """Forget a server node that has left: its record and subnet."""
    with control.transaction() as tx:
        node = get_server_node(tx.session, server_node)
        if node.state in IN_POOL:
            raise WrongState(f"server node {server_node} is {node.state}", next="Stop its worker first")
        held = tx.session.scalars(
            select(Vm.name).where(Vm.server_node == server_node, Vm.state.in_(VM_HOLDS_GUEST))
        ).all()
        if held:
            raise WrongState(
                f"server node {server_node} still holds {len(held)} guests: {', '.join(held[:5])}",
                next="Bring it back, or stop them with --force once it is certainly off",
            )
        tx.session.delete(node)
        tx.after(lambda: control.reservations.subnets.release(server_node))


# --- looking


def node_view(node: ServerNode) -> dict[str, Any]:
    return {
        "name": node.name, "domain_node": node.domain_node, "state": node.state.value, "draining": node.draining,
        "ip": node.ip, "subnet": node.subnet, "vcpus": node.vcpus, "memory_mib": node.memory_mib,
        "rules": node.rules, "facts": node.facts, "joined_at": node.joined_at.isoformat(),
        "observed_at": node.observed_at.isoformat() if node.observed_at else None,
    }  # fmt: skip


def list_server_nodes(control: Control) -> list[dict[str, Any]]:
    """Every server node with its record and what is free on it."""
    with control.store.read() as session:
        nodes = session.scalars(select(ServerNode).order_by(ServerNode.domain_node, ServerNode.name)).all()
        names = sorted({node.domain_node for node in nodes})
    free = {view.name: view for name in names for view in control.reservations.pool.nodes(name)}
    return [
        node_view(node)
        | {"free_vcpus": free[node.name].free_vcpus if node.name in free else 0,
           "free_memory_mib": free[node.name].free_memory_mib if node.name in free else 0}
        for node in nodes
    ]  # fmt: skip


def show_server_node(control: Control, name: str) -> dict[str, Any]:
    """One server node as ``list_server_nodes`` shows it, with its ``starts`` (``admission.node_starts``); NotFound."""
    with control.store.read() as session:
        get_server_node(session, name)
    view = next(view for view in list_server_nodes(control) if view["name"] == name)
    return view | {"starts": admission.node_starts(control, view["domain_node"], name)}


def show_domain_node(control: Control, name: str) -> dict[str, Any]:
    """One domain node as ``list_domain_nodes`` shows it; NotFound."""
    with control.store.read() as session:
        get_domain_node(session, name)
    view = next(view for view in list_domain_nodes(control) if view["name"] == name)
    return view | {"starts": admission.storage_starts(control, name)}


def list_domain_nodes(control: Control) -> list[dict[str, Any]]:
    """Every domain node: its server nodes, pooled capacity, ports and storage."""
    with control.store.read() as session:
        rows = session.scalars(select(DomainNode).order_by(DomainNode.name)).all()
        nodes = session.scalars(select(ServerNode).where(ServerNode.state.in_(IN_POOL))).all()
    return [_domain_node_view(control, row, [n for n in nodes if n.domain_node == row.name]) for row in rows]


def _domain_node_view(control: Control, row: DomainNode, nodes: list[ServerNode]) -> dict[str, Any]:
    views = control.reservations.pool.nodes(row.name)
    used, cooling, free = control.reservations.ports.usage(row.name)
    return {
        "name": row.name, "server_nodes": sorted(n.name for n in nodes), "storage_primary": row.storage_primary,
        "vcpus": sum(n.vcpus for n in nodes), "memory_mib": sum(n.memory_mib for n in nodes),
        "free_vcpus": sum(v.free_vcpus for v in views), "free_memory_mib": sum(v.free_memory_mib for v in views),
        "port_first": row.port_first, "port_last": row.port_last,
        "ports_used": used, "ports_cooling": cooling, "ports_free": free,
        "storage_total_bytes": row.storage_total_bytes, "storage_free_bytes": row.storage_free_bytes,
        "disk_promised_bytes": control.reservations.disks.used(row.name), "rules": row.rules, "draining": row.draining,
    }  # fmt: skip
