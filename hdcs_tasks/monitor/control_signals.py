"""What alarms are judged by: one function per thing to measure, each reading the record, reservations or samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

from sqlalchemy import func, select

from hdcs_tasks.clock import now_s
from hdcs_tasks.monitor.alarm_rules import Signal, late_sweeps, n_plus_one_gone, share_percent
from hdcs_tasks.operations.control import Control
from hdcs_tasks.reservations.ips import guest_span
from hdcs_tasks.routing import CONTROL, direct_queue, quick_queue
from hdcs_tasks.states import IN_POOL, AlarmState, BackupState, OperationState, ServerNodeState
from hdcs_tasks.store.models import Backup, BackupPolicy, DomainNode, Operation, ServerNode, Vm, now
from hdcs_tasks.store.models_watch import Alarm
from hdcs_tasks.when import last_due

WATCHED_DAYS = 7
"""Failed backups and operations older than this are history."""


def _nodes(control: Control) -> list[ServerNode]:
    with control.store.read() as session:
        return list(session.scalars(select(ServerNode).order_by(ServerNode.name)))


def node_states(control: Control) -> Iterator[Signal]:
    config = control.settings
    for node in _nodes(control):
        if node.state is ServerNodeState.LOST:
            text = f"server node {node.name} of {node.domain_node} is lost since {node.state_at:%Y-%m-%d %H:%M:%S} UTC"
            yield Signal("node_lost", node.name, 1.0, text)
        if node.state in IN_POOL and node.observed_at is not None:
            age_s = (now() - max(node.observed_at, node.joined_at)).total_seconds()
            late = age_s > 3 * config.sample_s + config.alarm.patience_s
            yield Signal("node_silent", node.name, float(late), f"{node.name} gave no sample for {age_s:.0f} s")


def node_load(control: Control) -> Iterator[Signal]:
    names = [node.name for node in _nodes(control) if node.state in IN_POOL]
    hosts, oldest = control.reservations.samples.hosts(names), now_s() - 4 * control.settings.sample_s
    for name in names:
        host = hosts.get(name)
        if host is None or host["at"] < oldest:
            yield from (Signal(kind, name, None, "") for kind in ("node_cpu", "node_memory", "clock_skew"))
            continue
        cpu, skew_s = host.get("cpu_percent"), host.get("clock_skew_s")
        total, free = host.get("memory_total_mib") or 0, host.get("memory_available_mib") or 0
        memory = share_percent(total - free, total)
        yield Signal("node_cpu", name, cpu, f"server node {name}: CPU {cpu or 0:.0f} % busy")
        yield Signal("node_memory", name, memory, f"server node {name}: {memory or 0:.0f} % of its memory is in use")
        skew = None if skew_s is None else abs(skew_s)
        yield Signal("clock_skew", name, skew, f"the clock of server node {name} is {skew_s or 0:+.1f} s off")


def own_clock(control: Control) -> Iterator[Signal]:
    skew_s = control.reservations.samples.clock_skew_s()
    yield Signal("clock_skew", CONTROL, abs(skew_s), f"the control plane's clock is {skew_s:+.1f} s off that of Redis")


def pools(control: Control) -> Iterator[Signal]:
    with control.store.read() as session:
        rows = list(session.scalars(select(DomainNode)))
    for row in rows:
        total, free = row.storage_total_bytes or 0, row.storage_free_bytes or 0
        used = share_percent(total - free, total)
        yield Signal("pool_storage", row.name, used, f"the storage of {row.name} is {used or 0:.0f} % full")
        yield from _pool_room(control, row.name)


def _pool_room(control: Control, name: str) -> Iterator[Signal]:
    views = control.reservations.pool.nodes(name)
    open_ = [view for view in views if view.schedulable]
    if open_:
        shares = [
            share_percent(sum(v.memory_mib - v.free_memory_mib for v in open_), sum(v.memory_mib for v in open_)) or 0,
            share_percent(sum(v.vcpus - v.free_vcpus for v in open_), sum(v.vcpus for v in open_)) or 0,
        ]  # fmt: skip
        text = f"{name} has promised {shares[0]:.0f} % of its memory and {shares[1]:.0f} % of its vCPUs"
        yield Signal("pool_capacity", name, max(shares), text)
        gone = n_plus_one_gone([(v.vcpus, v.memory_mib, v.free_vcpus, v.free_memory_mib) for v in open_])
        yield Signal("pool_n_plus_one", name, float(gone), f"{name} could not take in the VMs of a server node")
    used, cooling, free = control.reservations.ports.usage(name)
    ports = share_percent(used + cooling, used + cooling + free)
    yield Signal("pool_ports", name, ports, f"{name}: {free} console ports are free ({ports or 0:.0f} % in use)")
    for view in views:
        first, last = guest_span(view.subnet)
        ips = share_percent(last - first + 1 - view.free_ips, last - first + 1)
        yield Signal("node_ips", view.name, ips, f"server node {view.name}: {view.free_ips} IPs are free")


def backups(control: Control) -> Iterator[Signal]:
    since = now() - timedelta(days=WATCHED_DAYS)
    with control.store.read() as session:
        newest = select(Backup.vm_id, func.max(Backup.created_at).label("at")).group_by(Backup.vm_id).subquery()
        failed = select(Backup.vm_name, Backup.created_at).join(
            newest, (Backup.vm_id == newest.c.vm_id) & (Backup.created_at == newest.c.at)
        ).join(Vm, Vm.id == Backup.vm_id).where(
            Backup.state == BackupState.FAILED, Backup.created_at > since, Vm.deleted_at.is_(None)
        )  # fmt: skip
        rows = session.execute(failed).all()
        policies = list(session.scalars(select(BackupPolicy).where(BackupPolicy.enabled)))
    for name, at in rows:
        yield Signal("backup_failed", name, 1.0, f"the last backup of VM {name} failed ({at:%Y-%m-%d %H:%M} UTC)")
    for policy in policies:
        due = last_due(policy.schedule, now())
        slot = due if due > policy.slot_at else policy.slot_at
        waiting = due > policy.slot_at or bool(policy.pending)
        late_s = (now() - slot).total_seconds() if waiting else 0.0
        text = f"policy {policy.name}: {len(policy.pending)} VMs of its run of {slot:%Y-%m-%d %H:%M} UTC wait still"
        yield Signal("backup_overdue", policy.name, late_s, text)


def unproven(control: Control) -> Iterator[Signal]:
    days = control.settings.alarm.unproven_days
    if not days:
        return
    with control.store.read() as session:
        per_vm = select(Backup.domain_node, Backup.vm_id).join(Vm, Vm.id == Backup.vm_id).where(
            Backup.state == BackupState.READY, Vm.deleted_at.is_(None)
        ).group_by(Backup.domain_node, Backup.vm_id).having(
            func.max(Backup.proven_at).is_(None) & (func.min(Backup.created_at) < now() - timedelta(days=days))
        ).subquery()  # fmt: skip
        rows = session.execute(select(per_vm.c.domain_node, func.count()).group_by(per_vm.c.domain_node)).all()
    for name, count in rows:
        yield Signal("backups_unproven", name, 1.0, f"{count} VMs of {name}: backups for {days} days, none proven")


def stuck(control: Control) -> Iterator[Signal]:
    """Operations that need an operator, until the VM's next one is done, the VM is gone or somebody acknowledged."""
    since = now() - timedelta(days=WATCHED_DAYS)
    with control.store.read() as session:
        query = select(Operation).where(Operation.needs_operator, Operation.ended_at > since)
        found = list(session.scalars(query.order_by(Operation.ended_at)))
        ended = select(Alarm.subject).where(Alarm.kind == "operation_stuck", Alarm.state == AlarmState.CLEARED)
        over = set(session.scalars(ended.where(Alarm.subject.in_([operation.id for operation in found]))))
        for operation in found:
            if operation.id in over:
                continue
            if operation.vm_id is not None:
                later = select(Operation.id).where(
                    Operation.vm_id == operation.vm_id, Operation.state == OperationState.DONE,
                    Operation.ended_at > operation.ended_at,
                ).limit(1)  # fmt: skip
                vm = session.get(Vm, operation.vm_id)
                if vm is None or vm.deleted_at is not None or session.scalar(later) is not None:
                    continue
            why = (operation.error or {}).get("message", "")
            text = f"{operation.kind} of {operation.subject} needs an operator: {why}"
            yield Signal("operation_stuck", operation.id, 1.0, text)


def queue_names(control: Control) -> list[str]:
    """Every queue somebody reads."""
    nodes = _nodes(control)
    names = [CONTROL, *sorted({node.domain_node for node in nodes})]
    for node in nodes:
        names += [direct_queue(node.domain_node, node.name), quick_queue(node.domain_node, node.name)]
    return names


def queues(control: Control) -> Iterator[Signal]:
    for name, length in control.reservations.samples.queue_lengths(queue_names(control)).items():
        yield Signal("queue_backlog", name, float(length), f"{length} messages wait in queue {name}")


def sweeps(control: Control, periods_s: dict[str, float], known_for_s: float) -> Iterable[Signal]:
    """Of every sweep that beat is to run; ``known_for_s``: so long somebody watches."""
    last = {name: told["at"] for name, told in control.reservations.samples.sweeps().items()}
    return late_sweeps(last, periods_s, now_s(), known_for_s, control.settings.alarm.patience_s)


def known_sweeps(control: Control) -> Iterable[Signal]:
    """Of every sweep that ever ran to its end."""
    found = control.reservations.samples.sweeps()
    return sweeps(control, {name: told["period_s"] for name, told in found.items()}, 0.0)


GATHERERS: dict[tuple[str, ...], Callable[[Control], Iterable[Signal]]] = {
    ("node_lost", "node_silent"): node_states,
    ("node_cpu", "node_memory", "clock_skew"): lambda control: [*node_load(control), *own_clock(control)],
    ("pool_storage", "pool_capacity", "pool_n_plus_one", "pool_ports", "node_ips"): pools,
    ("backup_failed", "backup_overdue"): backups,
    ("backups_unproven",): unproven,
    ("operation_stuck",): stuck,
    ("queue_backlog",): queues,
    ("sweep_late",): known_sweeps,
}
