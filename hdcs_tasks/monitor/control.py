"""Monitoring on the control plane: samples become observed state, drift is settled, idle desktops are taken back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor.rules import Activity, has_gone, is_active, is_idle
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.sending import broadcast
from hdcs_tasks.pool.control import IN_POOL
from hdcs_tasks.pool.waiting import wake_waiting
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import DomainNode, Event, Operation, ServerNode, Vm, now
from hdcs_tasks.vm import control as vm_control

log = logger(__name__)

SAMPLE_TASK = "monitor.sample_on_node"


def sample_sweep(control: Control) -> int:
    """Ask every server node of every pool for a sample; the answers come as ``monitor.sampled``."""
    with control.store.read() as session:
        nodes = session.scalars(select(ServerNode).where(ServerNode.state.in_(IN_POOL))).all()
    queues = [quick_queue(node.domain_node, node.name) for node in nodes]
    broadcast(control.celery, SAMPLE_TASK, {}, queues, expires_s=control.settings.sample_s)
    return len(queues)


def take_sample(control: Control, sample: dict[str, Any]) -> None:
    """Record what a server node saw: ``{node, at, guests: [...], storage}``; one older than the last is dropped."""
    at = datetime.fromtimestamp(sample["at"], UTC)
    seen = {guest["vm_id"]: guest for guest in sample["guests"]}
    gone: list[str] = []
    with control.transaction() as tx:
        node = tx.session.get(ServerNode, sample["node"])
        if node is None or (node.observed_at is not None and node.observed_at > at):
            return
        node.observed_at = at
        _record_storage(tx, node, sample.get("storage") or {})
        _tell_unrecorded(tx, node, set(seen), at)
        vms = tx.session.scalars(select(Vm).where(Vm.server_node == node.name, Vm.deleted_at.is_(None))).all()
        for vm in vms:
            if vm.id in seen:
                _record_guest(tx, vm, seen[vm.id], at)
            elif vm.state in (VmState.RUNNING, VmState.SUSPENDED) and has_gone(
                listed=False, sampled_after_change_s=(at - vm.state_at).total_seconds()
            ):
                gone.append(vm.name)
    for name in gone:
        settle_gone(control, name, f"not seen on {sample['node']}")


def _tell_unrecorded(tx: Tx, node: ServerNode, seen: set[str], at: datetime) -> None:
    """An event, once, for each guest that the record has not here and that no operation is about to record."""
    if not seen:
        return
    known = {vm.id: vm for vm in tx.session.scalars(select(Vm).where(Vm.id.in_(seen)))}
    for vm_id in sorted(seen):
        vm = known.get(vm_id)
        if vm is not None:
            settled = not has_gone(listed=False, sampled_after_change_s=(at - vm.state_at).total_seconds())
            if vm.server_node == node.name or settled or tx.live_operation(vm) is not None:
                continue
        subject = vm.name if vm is not None else vm_id
        told = select(Event.id).where(
            Event.kind == "guest.unrecorded", Event.subject == subject, Event.at > at - timedelta(hours=1)
        )  # fmt: skip
        if tx.session.scalar(told.limit(1)) is None:
            tx.event("guest.unrecorded", subject, f"a guest of {subject} runs on {node.name}; the record has it not "
                     "there. Look at it there (virsh list), then stop it or the VM", node=node.name)  # fmt: skip


def _record_storage(tx: Tx, node: ServerNode, storage: dict[str, int]) -> None:
    row = tx.session.get(DomainNode, node.domain_node)
    if row is not None and storage.get("total_bytes"):
        row.storage_total_bytes, row.storage_free_bytes = storage["total_bytes"], storage["free_bytes"]


def _record_guest(tx: Tx, vm: Vm, guest: dict[str, Any], at: datetime) -> None:
    vm.observed_state, vm.observed_at = guest["state"], at
    activity = Activity(guest["cpu_percent"], guest["console_clients"])
    if is_active(activity, cpu_limit_percent=tx.control.settings.idle_cpu_percent):
        vm.active_at = at


def take_event(control: Control, event: dict[str, Any]) -> None:
    """A guest told something by itself: ``{node, vm_id, kind: agent_up | ended, at}``."""
    gone = None
    with control.transaction() as tx:
        vm = tx.session.get(Vm, event["vm_id"])
        if vm is None or vm.deleted_at is not None:
            return
        if event["kind"] == "agent_up":
            vm.ready_at = datetime.fromtimestamp(event["at"], UTC)
            _booted(tx, vm, event["node"])
        elif vm.server_node == event["node"] and tx.live_operation(vm) is None and vm.state is VmState.RUNNING:
            gone = vm.name
    if gone is not None:
        settle_gone(control, gone, f"ended by itself on {event['node']}")


def _booted(tx: Tx, vm: Vm, node: str) -> None:
    """It no longer counts as a start under way: the next in line may begin."""
    control, vm_id, home = tx.control, vm.id, vm.home

    def free_its_slot() -> None:
        if control.reservations.pool.started(home, node, vm_id):
            wake_waiting(control, home)

    tx.after(free_its_slot)


def settle_gone(control: Control, name: str, why: str) -> Operation | None:
    """A guest ended behind our back: give back what it held by an ordinary forced stop, which finds it absent."""
    try:
        operation = vm_control.command(
            control, "stop", name, Asked(by="monitor", reason=f"guest {why}"), force=False, timeout_s=10
        )
    except HdcsError as error:
        log.info("not settled now", vm=name, error=str(error))
        return None
    with control.transaction() as tx:
        tx.event("vm.gone", name, f"VM {name}: its guest {why}")
    return operation


def idle_sweep(control: Control) -> list[str]:
    """Stop every running desktop that nobody used for its idle time; returns their names."""
    default_s = control.settings.idle_after_s
    with control.store.read() as session:
        idle = [
            (vm.name, seconds)
            for vm in session.scalars(select(Vm).where(Vm.state == VmState.RUNNING))
            if is_idle(seconds := _idle_s(vm), idle_after_s=_limit_s(vm, default_s), tags=vm.tags)
        ]
    return [name for name, seconds in idle if _reclaim(control, name, seconds)]


def _limit_s(vm: Vm, default_s: float) -> float:
    return default_s if vm.idle_after_s is None else vm.idle_after_s


def _idle_s(vm: Vm) -> float:
    """Seconds since somebody used it; 0 unless it was sampled meanwhile (what is not observed is not idle)."""
    if vm.active_at is None or vm.observed_at is None or vm.observed_at <= vm.active_at:
        return 0.0
    return (vm.observed_at - vm.active_at).total_seconds()


def _reclaim(control: Control, name: str, idle_s: float) -> bool:
    asked = Asked(by="idle sweep", reason=f"idle for {idle_s:.0f} s")
    try:
        vm_control.command(control, "stop", name, asked)
    except HdcsError as error:
        log.info("idle desktop left alone", vm=name, error=str(error))
        return False
    with control.transaction() as tx:
        tx.event("vm.reclaimed", name, f"VM {name} was stopped: {asked.reason}", idle_s=idle_s)
    return True


# --- looking


def list_events(control: Control, limit: int) -> list[dict[str, Any]]:
    """The newest events first."""
    with control.store.read() as session:
        rows = session.scalars(select(Event).order_by(Event.id.desc()).limit(limit)).all()
    return [
        {"at": e.at.isoformat(), "kind": e.kind, "subject": e.subject, "message": e.message, "data": e.data}
        for e in rows
    ]


def doctor(control: Control) -> list[dict[str, Any]]:
    """Checks of the control plane; each ``{check, ok, message, next}``."""
    checks = [_check("database", lambda: _database(control)), _check("redis", lambda: _redis(control))]
    if not all(check["ok"] for check in checks):
        return checks
    return [*checks, *(_check(f"server node {node.name}", lambda node=node: _node(node)) for node in _nodes(control)),
            _check("reservations", lambda: _reservations(control))]  # fmt: skip


def _check(name: str, look: Any) -> dict[str, Any]:
    try:
        return {"check": name, "ok": True, "message": look(), "next": ""}
    except HdcsError as error:
        return {"check": name, "ok": False, "message": error.message, "next": error.next}


def _database(control: Control) -> str:
    with control.store.read() as session:
        session.execute(text("SELECT 1"))
    return "answers"


def _redis(control: Control) -> str:
    return "reservations open" if control.reservations.epoch.is_open() else "waiting for the rebuild of reservations"


def _nodes(control: Control) -> list[ServerNode]:
    with control.store.read() as session:
        return list(session.scalars(select(ServerNode).order_by(ServerNode.name)))


def _node(node: ServerNode) -> str:
    if node.state not in IN_POOL:
        raise HdcsError(f"{node.name} is {node.state} since {node.state_at.isoformat()}", next="Start its worker")
    seen = "never" if node.observed_at is None else f"{(now() - node.observed_at).total_seconds():.0f} s ago"
    return f"{node.state}, sampled {seen}"


def _reservations(control: Control) -> str:
    with control.store.read() as session:
        vms = _living(session)
    orphans = control.reservations.orphans(vms)
    count = sum(len(part) for part in orphans)
    if count:
        raise HdcsError(f"{count} reservations have no owner: {orphans}", next="They are dropped by the next rebuild")
    return "every one has its owner"


def _living(session: Session) -> set[str]:
    return set(session.scalars(select(Vm.id).where(Vm.deleted_at.is_(None))))
