"""Rebuilding the reservations after Redis lost them: from the record, and from what each server node observes.

epoch closed → ask every living server node what runs on it → all answered, or waited long enough
             → write everything anew → epoch open. Until then allocation fails closed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from sqlalchemy import select

from hdcs_tasks.clock import now_s
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.control import Control
from hdcs_tasks.operations.sending import broadcast
from hdcs_tasks.pool.control import pool_node_of
from hdcs_tasks.pool.policy import PoolPolicy, read
from hdcs_tasks.pool.rooms import vm_shape, vm_terms
from hdcs_tasks.pool.rules import need_of
from hdcs_tasks.reservations import Claim, PoolSnapshot, Snapshot
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.states import IN_POOL, StepState
from hdcs_tasks.store.models import DomainNode, Operation, ServerNode, Step, Vm

log = logger(__name__)

WAIT_FOR_REPORTS_S = 20.0
REPORT_TASK = "pool.report_on_node"
_DOMAIN_NODES = select(DomainNode.name)
_UNTOUCHED = select(Step.id).where(Step.state == StepState.PUBLISHED, Step.node.is_(None))
_UP = select(ServerNode).where(ServerNode.state.in_(IN_POOL))


def reservation_sweep(control: Control) -> str:
    """Return cooled ports, or rebuild if Redis is not the one the reservations were written to."""
    reservations = control.reservations
    if reservations.epoch.is_open():
        with control.store.read() as session:
            names = list(session.scalars(_DOMAIN_NODES))
        for name in names:
            reservations.ports.reclaim(name)
        return "open"
    run_id = reservations.epoch.run_id()
    with control.store.read() as session:
        nodes = list(session.scalars(_UP))
    reports, waited_s = _reports(control, run_id, nodes)
    silent = sum(node.name not in reports for node in nodes)  # a lost one may report, too
    if silent and waited_s < WAIT_FOR_REPORTS_S:
        return "waiting"
    token = reservations.epoch.take_rebuild(run_id)
    if token is None:
        return "open"
    _note_executors(control, reports)
    reservations.rebuild(snapshot(control, reports), token=token)
    reservations.notes.drop(f"rebuild:{run_id}")  # another rebuild in this Redis's life asks anew
    for node in nodes:
        # A lease missing after Redis was lost is not a lost node: each gets one term to renew.
        reservations.leases.grant("node", node.name, node.instance, control.settings.lease_ttl_s)
    log.warning("reservations rebuilt", run_id=run_id, reports=len(reports), silent=silent)
    return "rebuilt"


def _reports(control: Control, run_id: str, nodes: list[ServerNode]) -> tuple[dict[str, dict[str, Any]], float]:
    """Reports of this Redis's life so far, asking anew each time, and how long we have waited (s)."""
    kept = control.reservations.notes.read(f"rebuild:{run_id}")
    if "asked_at" not in kept:
        control.reservations.notes.write(f"rebuild:{run_id}", "asked_at", str(now_s()), ttl_s=600)
        kept["asked_at"] = str(now_s())
    reports = {name: json.loads(text) for name, text in kept.items() if name != "asked_at"}
    silent = [quick_queue(node.domain_node, node.name) for node in nodes if node.name not in reports]
    broadcast(control.celery, REPORT_TASK, {"run_id": run_id}, silent, expires_s=5)
    return reports, now_s() - float(kept["asked_at"])


def _note_executors(control: Control, reports: dict[str, dict[str, Any]]) -> None:
    """Who does a step out of a domain node's queue stood in Redis alone. Where a guest tells by which step it was
    started, only that server node tries the step again: it observes first, any other would start a second one."""
    where = {g["step"]: node for node, report in reports.items() for g in report["guests"] if g.get("step")}
    with control.store.read() as session:
        touched = [step for step in session.scalars(_UNTOUCHED) if step in where]
    for step_id in touched:
        with control.transaction() as tx:
            step = tx.lock_step(step_id)
            if step is not None and step.state is StepState.PUBLISHED and step.node is None:
                step.node = where[step_id]


def take_report(control: Control, report: dict[str, Any]) -> None:
    """Keep what a server node observed: ``{run_id, node, guests: [{vm_id, state, step, …}]}``."""
    control.reservations.notes.write(f"rebuild:{report['run_id']}", report["node"], json.dumps(report), ttl_s=600)


def snapshot(control: Control, reports: dict[str, dict[str, Any]]) -> Snapshot:
    """Everything that is owned: the record says who, the reports say which guests really run where."""
    with control.store.read() as session:
        rows = list(session.scalars(select(DomainNode)))
        nodes = list(session.scalars(select(ServerNode)))
        vms = list(session.scalars(select(Vm).where(Vm.deleted_at.is_(None))))
        live = {
            operation.live_vm: operation
            for operation in session.scalars(select(Operation).where(Operation.live_vm.is_not(None)))
        }
    present = control.reservations.dump().pools
    pools = {}
    for row in rows:
        pool = _pool_snapshot(control, row, nodes, vms, reports)
        held = present[row.name].claims if row.name in present else ()
        coming = _coming(control, row.name, vms, live)
        pool = replace(pool, disks=dict(pool.disks) | _promised(row.name, vms, live))
        busy = [*(claim for claim in held if claim.vm in live), *coming]
        pools[row.name] = _one_owner_each(_with_busy(pool, busy))
    subnets = {node.name: node.subnet for node in nodes}
    return Snapshot(macs={vm.id: vm.mac for vm in vms}, subnets=subnets, pools=pools)


def _promised(domain_node: str, vms: list[Vm], live: dict[str | None, Operation]) -> dict[str, int]:
    """Storage that operations under way were promised beyond what the record says: where a VM goes, and to what it
    grows."""
    found = {}
    for vm in vms:
        request = live[vm.id].request if vm.id in live else {}
        wanted = max(vm.disk_bytes, request.get("disk_bytes") or 0)
        if domain_node == (request.get("domain_node") or vm.home) and (
            domain_node != vm.home or wanted > vm.disk_bytes
        ):
            found[vm.id] = wanted
    return found


def _coming(control: Control, domain_node: str, vms: list[Vm], live: dict[str | None, Operation]) -> list[Claim]:
    """What migrating VMs hold where they go, as their operations have it: Redis may have been emptied."""
    found = []
    for vm in vms:
        target = live[vm.id].request.get("target") if vm.id in live else None
        if target and "ip" in target and target.get("domain_node", vm.home) == domain_node:
            need = need_of(vm_shape(vm), control.settings.capacity)
            found.append(
                Claim(domain_node, vm.id, target["node"], need.vcpus, need.memory_mib, target["port"], target["ip"], "")
            )
    return found


def _with_busy(pool: PoolSnapshot, held: list[Claim]) -> PoolSnapshot:
    """The snapshot with what VMs under way still hold in Redis.

    A report is older than the rebuild: a guest may start or arrive after it, on a claim that outlived the restart.
    """
    claims, ports = list(pool.claims), dict(pool.ports)
    known = {(claim.vm, claim.node) for claim in claims}
    ips = {claim.ip for claim in claims if claim.ip}
    for claim in held:
        owned = ports.get(claim.vm)
        taken = claim.ip in ips or (owned is None and claim.port in ports.values())
        if (claim.vm, claim.node) in known or taken:
            continue
        if claim.port:
            ports.setdefault(claim.vm, claim.port)
        claims.append(claim._replace(port=ports.get(claim.vm, 0)))
        ips |= {claim.ip} - {""}
    return replace(pool, claims=tuple(claims), ports=ports)


def _one_owner_each(pool: PoolSnapshot) -> PoolSnapshot:
    """The snapshot with every port and IP owned once. Two VMs can have been given one while a server node was away that
    could not report (pool/tidy.py tells of it); a rebuild that refused that would keep everything closed for good."""
    running = {claim.vm for claim in pool.claims}
    ports: dict[str, int] = {}
    taken: set[int] = set()
    for vm, port in sorted(pool.ports.items(), key=lambda owned: owned[0] not in running):
        if port in taken:
            log.error("two VMs have one console port; the rebuild gives it to the first", port=port, second=vm)
        else:
            ports[vm] = port
            taken.add(port)
    claims: list[Claim] = []
    ips: set[str] = set()
    for claim in pool.claims:
        if claim.ip in ips:
            log.error("two VMs have one address; the rebuild gives it to the first", ip=claim.ip, second=claim.vm)
        claims.append(claim._replace(port=ports.get(claim.vm, 0), ip="" if claim.ip in ips else claim.ip))
        ips |= {claim.ip} - {""}
    return replace(pool, claims=tuple(claims), ports=ports)


def _pool_snapshot(
    control: Control, row: DomainNode, nodes: list[ServerNode], vms: list[Vm], reports: dict[str, dict[str, Any]]
) -> PoolSnapshot:
    here = [node for node in nodes if node.domain_node == row.name]
    homed = {vm.id: vm for vm in vms if vm.home == row.name}
    claims: list[Claim] = []
    ports: dict[str, int] = {vm.id: vm.port for vm in homed.values() if vm.port is not None}
    for node in here:
        for vm_id, seen in _held(node, homed, reports).items():
            vm = homed[vm_id]
            port = ports.setdefault(vm_id, seen.get("console_port") or 0) or vm.port or 0
            need = need_of(vm_shape(vm), control.settings.capacity)
            ip = seen.get("ip") or (vm.ip if vm.server_node == node.name else None) or ""
            claims.append(Claim(row.name, vm_id, node.name, need.vcpus, need.memory_mib, port, ip, ""))
    pooled = tuple(pool_node_of(control, n) for n in here if n.state in IN_POOL)
    return PoolSnapshot(
        row.port_first, row.port_last, pooled, tuple(claims),
        {vm: port for vm, port in ports.items() if port}, {vm.id: vm.disk_bytes for vm in homed.values()},
        {vm.id: vm_terms(vm).marks for vm in homed.values() if vm.tags or vm.rules},
        read(PoolPolicy, row.rules).max_starts,
    )  # fmt: skip


def _held(node: ServerNode, homed: dict[str, Vm], reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What this server node holds: what it reported, and what the record says: a guest may run since the report, and
    those of a silent node run on, also where its worker left in order. One that has gone is found by the next sample,
    and then gives back what it held."""
    reported = {g["vm_id"]: g for g in reports.get(node.name, {"guests": []})["guests"] if g["vm_id"] in homed}
    recorded = {
        vm.id: {"ip": vm.ip, "console_port": vm.port} for vm in homed.values() if vm.server_node == node.name
    }  # fmt: skip
    return recorded | reported
