"""What server nodes see, against the record: samples become observed state, drift becomes an event and is settled.

Statements are few and for many VMs at once: a sample of 500 guests costs as many as one of five.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Update, bindparam, select, update

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor import control_idle
from hdcs_tasks.monitor.control_idle_policy import COLUMNS, desktop, load
from hdcs_tasks.monitor.idle_rules import Limits, policy_of, sample_use
from hdcs_tasks.monitor.rules import Drift, drift_of, has_gone
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.sending import broadcast
from hdcs_tasks.pool.control import quick_queues
from hdcs_tasks.pool.rooms import vm_shape
from hdcs_tasks.pool.rules import need_of
from hdcs_tasks.pool.waiting import wake_waiting
from hdcs_tasks.reservations import PlaceRequest
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store import metering
from hdcs_tasks.store.lookups import by_key
from hdcs_tasks.store.models import DomainNode, Operation, ServerNode, Vm
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control as vm_control
from hdcs_tasks.vm.control_ready import note_ready

log = logger(__name__)

SAMPLE_TASK = "monitor.sample_on_node"
END_LEFT_TASK = "vm.end_left_on_node"
SKEW_S = 1.0
"""Less than this may be the round trip by which it was measured."""

_THESE = update(Vm).where(Vm.id.in_(bindparam("ids", expanding=True)))
_OBSERVED = _THESE.values(observed_state=bindparam("seen"), observed_at=bindparam("seen_at"))
_USED = _THESE.values(active_at=bindparam("seen_at"))
_VMS_OF = select(*COLUMNS, Vm.state_at).where(Vm.server_node == bindparam("node"), Vm.deleted_at.is_(None))


def sample_sweep(control: Control) -> int:
    """Ask every server node of every pool for a sample; the answers come as ``monitor.sampled``."""
    with control.store.read() as session:
        queues = quick_queues(session)
    broadcast(control.celery, SAMPLE_TASK, {}, queues, expires_s=control.settings.sample_s)
    return len(queues)


@dataclass(frozen=True)
class Found:
    """What is to be settled after the sample's transaction."""

    gone: list[tuple[str, datetime | None]]
    """Names of VMs whose guest is not there, and when it last was."""
    drifted: list[tuple[str, Drift]]


def take_sample(control: Control, sample: dict[str, Any]) -> None:
    """Record what a server node saw: ``{node, at}``, the rest lying in Redis, or all of it with ``guests`` and
    ``storage``; one older than the last is dropped."""
    if "guests" not in sample:
        found = control.reservations.samples.node(sample["node"])
        if found is None:
            return  # Redis was emptied meanwhile: the next one comes soon
        sample = found
    at = _moment(sample)
    seen = {guest["vm_id"]: guest for guest in sample["guests"]}
    with control.transaction() as tx:
        node = by_key(tx.session, ServerNode, sample["node"])
        if node is None or (node.observed_at is not None and node.observed_at > at):
            return
        node.observed_at = at
        _record_storage(tx, node, sample.get("storage") or {})
        vms = tx.session.execute(_VMS_OF, {"node": node.name}).all()
        here = {vm.id: vm for vm in vms}
        _record_seen(tx, [(here[vm_id], guest) for vm_id, guest in seen.items() if vm_id in here], at)
        running = seen.keys() & here.keys()
        watched = {vm_id for vm_id in running if seen[vm_id]["console_clients"] > 0}
        metering.sampled(tx.session, node.name, running, watched, at)
        todo = Found([], [])
        for vm in vms:
            _compare(vm, seen.get(vm.id), at, todo)
        _strangers(tx, node, seen, seen.keys() - here.keys(), at)
    for name, last_seen in todo.gone:
        settle_gone(control, name, f"not seen on {sample['node']}", last_seen, at)
    for name, drift in todo.drifted:
        _settle_drift(control, name, drift, at)
    if here:
        control_idle.look_at(control, sample["node"], at)


def _moment(sample: dict[str, Any]) -> datetime:
    """When it was taken. A server node whose clock is wrong (which is an alarm) tells of another time than the record
    has: by what its sample before was ahead of Redis it is set right."""
    skew_s = (sample.get("host") or {}).get("clock_skew_s") or 0.0
    return datetime.fromtimestamp(sample["at"] - (skew_s if abs(skew_s) >= SKEW_S else 0.0), UTC)


def _record_storage(tx: Tx, node: ServerNode, storage: dict[str, int]) -> None:
    if not storage.get("total_bytes"):
        return
    row = tx.session.get(DomainNode, node.domain_node)
    if row is not None:
        row.storage_total_bytes, row.storage_free_bytes = storage["total_bytes"], storage["free_bytes"]


def _record_seen(tx: Tx, guests: list[tuple[Any, dict[str, Any]]], at: datetime) -> None:
    """State, and who is used: by the limits of the idle policy that is a VM's, or the usual ones."""
    if not guests:
        return
    for state in ("running", "paused"):
        _update(tx, _OBSERVED, (vm.id for vm, guest in guests if guest["state"] == state), seen=state, seen_at=at)
    policies, usual = load(tx.session), Limits()
    used = []
    for vm, guest in guests:
        if vm.state not in (VmState.RUNNING, VmState.SUSPENDED):
            continue  # a guest that shuts down is busy with that
        policy = policy_of(policies, desktop(vm)) if policies else None
        if sample_use(policy.limits if policy else usual, guest):
            used.append(vm.id)
    _update(tx, _USED, used, seen_at=at)


def _update(tx: Tx, change: Update, ids: Iterable[str], **values: Any) -> None:
    chosen = list(ids)
    if chosen:
        tx.session.execute(change, values | {"ids": chosen}, execution_options={"synchronize_session": False})


def _compare(vm: Any, guest: dict[str, Any] | None, at: datetime, todo: Found) -> None:
    after_s = (at - vm.state_at).total_seconds()
    if guest is None:
        if vm.state in (VmState.RUNNING, VmState.SUSPENDED) and has_gone(listed=False, sampled_after_change_s=after_s):
            todo.gone.append((vm.name, vm.observed_at))
    elif (drift := drift_of(vm.state, guest["state"], sampled_after_change_s=after_s)) is not None:
        todo.drifted.append((vm.name, drift))


# --- drift


def settle_gone(
    control: Control, name: str, why: str, last_seen: datetime | None = None, at: datetime | None = None
) -> Operation | None:
    """A guest ended behind our back: give back what it held by an ordinary forced stop, which finds it absent."""
    if at is not None:
        with control.transaction() as tx:
            # First, so that the stop's own end does not count as the guest's.
            metering.gone(tx.session, vm_control.get_vm(tx.session, name), last_seen, at)
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


def _settle_drift(control: Control, name: str, drift: Drift, at: datetime) -> None:
    """A guest was paused or resumed behind our back: the record follows, unless an operation is at work on it."""
    try:
        with control.transaction() as tx:
            vm = vm_control.get_vm(tx.session, name)
            if tx.live_operation(vm) is not None or vm.state is drift.to:
                return
            metering.happened_at(tx.session, at)
            move(vm, drift.to)
            tx.event(drift.event, name, f"VM {name}: {drift.message} on {vm.server_node}", node=vm.server_node)
    except HdcsError as error:
        log.info("drift not settled now", vm=name, error=str(error))


def _strangers(tx: Tx, node: ServerNode, seen: dict[str, Any], ids: Iterable[str], at: datetime) -> None:
    """Guests the record has not here and that no operation is about to record: one that was started behind our back is
    taken back into the record if it still has its place; that of a deleted VM is ended: nobody asks for it any more. Of
    any other an event tells, once an hour."""
    wanted = sorted(ids)
    if not wanted:
        return
    known = {vm.id: vm for vm in tx.session.scalars(select(Vm).where(Vm.id.in_(wanted)))}
    for vm_id in wanted:
        vm = known.get(vm_id)
        if vm is not None:
            settled = not has_gone(listed=False, sampled_after_change_s=(at - vm.state_at).total_seconds())
            if vm.server_node == node.name or settled or tx.live_operation(vm) is not None:
                continue
            if vm.deleted_at is not None:
                _end_left(tx, node, vm, at)
                continue
            if _took_back(tx, node, vm, seen[vm_id], at):
                continue
        subject = vm.name if vm is not None else vm_id
        told = f"a guest of {subject} runs on {node.name}; the record has it not there"
        next_step = "Look at it there (virsh list), then stop it or the VM"
        tx.event_hourly("guest.unrecorded", subject, f"{told}. {next_step}", node=node.name)


def _took_back(tx: Tx, node: ServerNode, vm: Vm, guest: dict[str, Any], at: datetime) -> bool:
    """Whether a stopped VM that runs again is the record's again: it claims what a start there would have."""
    if vm.state is not VmState.STOPPED or vm.home != node.domain_node or guest["state"] != "running":
        return False
    pool, need = tx.control.reservations.pool, need_of(vm_shape(vm), tx.control.settings.capacity)
    request = PlaceRequest(vm.home, vm.id, f"seen:{vm.id}", need.vcpus, need.memory_mib, pin=node.name, start_s=0)
    try:
        placed = pool.place(request)
    except HdcsError as error:
        log.warning("a guest started behind our back has no place", vm=vm.name, error=str(error))
        return False
    if guest.get("console_port") not in (None, placed.port):
        # Its own port was given to another VM meanwhile: two guests claim one address.
        pool.release(vm.home, vm.id, node.name, 0.0, step=request.step)
        return False
    tx.undo(lambda: pool.release(vm.home, vm.id, node.name, 0.0, step=request.step))
    vm.server_node, vm.port, vm.ip = node.name, placed.port, placed.ip
    vm.started_at = vm.active_at = at
    vm.observed_state, vm.observed_at = guest["state"], at
    metering.happened_at(tx.session, at)
    move(vm, VmState.RUNNING)
    tx.event("vm.started", vm.name, f"VM {vm.name}: its guest was started behind our back on {node.name}; it holds "
             "its place there again", node=node.name)  # fmt: skip
    return True


def _end_left(tx: Tx, node: ServerNode, vm: Vm, at: datetime) -> None:
    """A start that Redis lost sight of may end after its VM was deleted."""
    control, message = tx.control, {"vm_id": vm.id, "mac": vm.mac}
    queue = quick_queue(node.domain_node, node.name)
    tx.after(lambda: broadcast(control.celery, END_LEFT_TASK, message, [queue], expires_s=control.settings.sample_s))
    told = f"a guest of the deleted VM {vm.name} runs on {node.name}: it is ended"
    tx.event_hourly("guest.left", vm.name, told, node=node.name)


# --- what a guest tells by itself


def take_event(control: Control, event: dict[str, Any]) -> None:
    """A guest told something by itself: ``{node, vm_id, kind: agent_up | ended, at, heard: false where found so}``."""
    gone = None
    (host,) = control.reservations.samples.hosts([event["node"]]).values() or ({},)
    at = _moment({"at": event["at"], "host": host})
    with control.transaction() as tx:
        vm = tx.session.get(Vm, event["vm_id"])
        if vm is None or vm.deleted_at is not None:
            return
        if event["kind"] == "agent_up":
            note_ready(tx, vm, at, heard=event.get("heard", True))
            _booted(tx, vm, event["node"])
        elif vm.server_node == event["node"] and tx.live_operation(vm) is None and vm.state is VmState.RUNNING:
            gone = vm.name
    if gone is not None:
        settle_gone(control, gone, f"ended by itself on {event['node']}", None, at)


def _booted(tx: Tx, vm: Vm, node: str) -> None:
    """It no longer counts as a start under way: the next in line may begin."""
    control, vm_id, home = tx.control, vm.id, vm.home

    def free_its_slot() -> None:
        if control.reservations.pool.started(home, node, vm_id):
            wake_waiting(control, home)

    tx.after(free_its_slot)
