"""Taking back desktops nobody uses, rung by rung.

Whose next rung is due shows as soon as a sample of its server node is taken in (``look_at``); at rest, where nobody
samples, at the next ``idle_sweep``. Who runs is looked into by its server node first (``look_on_node``); the answer is
judged again, and if nobody uses it the rung is taken: an ordinary operation with a ``guard``, by which the server node
looks a last time right before it acts. So a rung is taken within its time and one sweep, and the time its look takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, select

from hdcs_tasks.clock import now_s
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor.control_idle_policy import COLUMNS, MESSAGE, desktop, load
from hdcs_tasks.monitor.idle_rules import (
    Desktop,
    Next,
    Policy,
    exempt,
    next_rung,
    policy_of,
    sample_use,
    shortest_s,
    use_inside,
)
from hdcs_tasks.operations.control import Asked, Control, Tx, busy
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.operations.sending import send
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.states import IN_POOL, VmState
from hdcs_tasks.store.models import Operation, ServerNode, Step, Vm, now
from hdcs_tasks.vm import control as vm_control
from hdcs_tasks.vm.rules import COMMANDS

log = logger(__name__)

LOOK_TASK = "monitor.look_on_node"
LOOK_MAX_S = 60.0
"""A server node that did not begin within this time is asked again by its next sample."""
LOOK_KEPT_S = 3600.0
ON_NODE = (VmState.RUNNING, VmState.SUSPENDED)
AT_REST = (VmState.STOPPED, VmState.SAVED)
DONE = {"warn": "warned", "suspend": "suspended", "save": "saved", "stop": "stopped", "delete": "deleted"}


def idle_sweep(control: Control) -> list[str]:
    """Take the next rung of every desktop at rest whose rung is due. Returns their names."""
    found = _found(control, Vm.state.in_(AT_REST))
    for policy, row, due in found:
        _take(control, policy, row.id, due, _found_when(due, now()))
    return [row.name for _, row, _ in found]


def look_at(control: Control, node: str, at: datetime) -> list[str]:
    """A server node was sampled at ``at``: act on its suspended desktops whose next rung is due, and have it look into
    the running ones. Returns their names, those idle longest first."""
    found = _found(control, Vm.state.in_(ON_NODE) & (Vm.server_node == node))
    wanted = []
    for policy, row, due in found:
        when = _found_when(due, at)
        if row.state is VmState.RUNNING:
            warn = (policy.message or MESSAGE) if due.do == "warn" else ""
            wanted.append({"vm_id": row.id, "inside": policy.inside, "warn": warn, "found": when})
        else:
            _take(control, policy, row.id, due, when)
    if wanted:
        with control.store.read() as session:
            home = session.scalar(select(ServerNode.domain_node).where(
                ServerNode.name == node, ServerNode.state.in_(IN_POOL)))  # fmt: skip
        if home is not None:
            send(control.celery, LOOK_TASK, {"wanted": wanted}, quick_queue(home, node), expires_s=LOOK_MAX_S)
    return [row.name for _, row, _ in found]


def _found(control: Control, where: ColumnElement[bool]) -> list[tuple[Policy, Any, Next]]:
    with control.store.read() as session:
        policies = load(session)
        if not policies:
            return []
        since = now() - timedelta(seconds=shortest_s(policies))
        resting = select(*COLUMNS).where(where, Vm.deleted_at.is_(None), Vm.active_at <= since)
        rows = session.execute(resting.order_by(Vm.active_at)).all()
    found = []
    for row in rows:
        vm = desktop(row)
        policy = policy_of(policies, vm)
        due = _due(policy, vm)
        if policy is not None and due is not None:
            found.append((policy, row, due))
    return found


def _found_when(due: Next, at: datetime) -> dict[str, Any]:
    """When a rung was found to be due, and how long it had been by then."""
    return {"at": at.isoformat(), "late_s": round(due.late_s, 3)}


def _due(policy: Policy | None, vm: Desktop) -> Next | None:
    rung = next_rung(policy.ladder, vm) if policy is not None else None
    return rung if rung is not None and rung.in_s <= 0 else None


def take_looks(control: Control, report: dict[str, Any]) -> None:
    """What a server node saw in its guests: ``{node, looks}``. Who is used begins anew, who is not goes on."""
    looks = {look["vm_id"]: look for look in report["looks"]}
    control.reservations.samples.write_looks(report["looks"], at=now_s(), ttl_s=LOOK_KEPT_S)
    todo: list[tuple[Policy, str, Next]] = []
    with control.transaction() as tx:
        policies = load(tx.session)
        here = select(Vm).where(Vm.id.in_(looks), Vm.server_node == report["node"], Vm.state == VmState.RUNNING)
        for vm in tx.session.scalars(here):
            look = looks[vm.id]
            if use_inside(look):
                vm.active_at = now()
                continue
            seen = desktop(vm)
            policy = policy_of(policies, seen)
            due = _due(policy, seen)
            if policy is None or due is None:
                continue
            if due.do != "warn":
                todo.append((policy, vm.id, due))
            elif "told" in look:
                _remember(vm, "warn", policy)
                how = "in the guest" if look["told"] else f"by this event alone ({look['says'] or 'no way to show it'})"
                tx.event("vm.warned", vm.name, f"VM {vm.name} was warned {how}: nobody used it for "
                         f"{seen.idle_s:.0f} s (policy {policy.name})", policy=policy.name,
                         found=look["found"])  # fmt: skip
    for policy, vm_id, due in todo:
        _take(control, policy, vm_id, due, looks[vm_id]["found"])


def _remember(vm: Vm, did: str, policy: Policy) -> None:
    vm.idle = {"did": did, "at": now().isoformat(), "policy": policy.name}


def _take(control: Control, policy: Policy, vm_id: str, due: Next, found: dict[str, Any]) -> None:
    asked = Asked(by=f"idle policy {policy.name}", reason=f"{due.do}: nobody used it")
    try:
        if due.do == "delete":
            _delete(control, policy, vm_id, asked, found)
            return
        with control.store.read() as session:
            vm = session.get_one(Vm, vm_id)
            suspended, idle_s = vm.state is VmState.SUSPENDED, desktop(vm).idle_s
        guard = {
            "policy": policy.name, "inside": policy.inside, "limits": asdict(policy.limits), "rung": due.do,
            "idle_s": idle_s, "found": found,
        }  # fmt: skip
        force = due.do == "stop" and (policy.force or suspended)
        vm_control.command(control, due.do, vm_id, asked, force=force, guard=guard)
    except HdcsError as error:
        log.info("idle desktop left alone", vm=vm_id, error=str(error))


def _delete(control: Control, policy: Policy, vm_id: str, asked: Asked, found: dict[str, Any]) -> None:
    """Delete a desktop at rest; unlike a delete somebody asks for it supersedes nothing."""
    with control.transaction() as tx:
        vm = tx.session.get(Vm, vm_id, with_for_update=True)
        if vm is None or vm.state not in (VmState.STOPPED, VmState.SAVED) or _due(policy, desktop(vm)) is None:
            return
        if (live := tx.live_operation(vm)) is not None:
            raise busy(live)
        idle_s = desktop(vm).idle_s or 0.0
        tx.open("vm.delete", asked=asked, vm=vm, request={"was": vm.state.value, "force": False})
        _tell(tx, vm, "delete", policy.name, idle_s, found)


def _tell(tx: Tx, vm: Vm, did: str, policy: str, idle_s: float, found: dict[str, Any] | None) -> None:
    tx.event("vm.reclaimed", vm.name, f"VM {vm.name} was {DONE[did]}: nobody used it for {idle_s:.0f} s "
             f"(policy {policy})", idle_s=idle_s, policy=policy, found=found)  # fmt: skip


# --- what became of it


def _settle(verb: str, step_name: str) -> None:
    @on_done(f"vm.{verb}:{step_name}")
    def done(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
        guard = operation.request.get("guard")
        if guard is None:
            return
        vm = vm_control.vm_of(tx, operation)
        vm.idle = {"did": verb, "at": now().isoformat(), "policy": guard["policy"]}
        _tell(tx, vm, verb, guard["policy"], guard.get("idle_s") or 0.0, guard.get("found"))

    @on_failed(f"vm.{verb}:{step_name}")
    def failed(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
        """Used in the last second: its time begins anew. Any other failure is tried again as long after as the rung
        before it was."""
        guard = operation.request.get("guard")
        if guard is None:
            return
        vm = vm_control.vm_of(tx, operation)
        if error.details.get("used"):
            vm.active_at = now()
            tx.event("vm.in_use", vm.name, f"VM {vm.name} was {error.message} (policy {guard['policy']})",
                     policy=guard["policy"])  # fmt: skip
        elif vm.idle:
            vm.idle = vm.idle | {"at": now().isoformat()}


for _verb in ("suspend", "save", "stop"):
    _settle(_verb, COMMANDS[_verb].step)


# --- looking


def preview(control: Control, *, names: Sequence[str] = (), policy: str | None = None) -> list[dict[str, Any]]:
    """What idle policies see of every desktop that is one's, and what would happen when.

    Each ``{name, state, policy, idle_s, used, exempt, next, in_s, signals}``; ``signals``: the newest sample
    (console_clients, cpu_percent, disk_bytes_s, net_bytes_s), the newest look inside (users, processes, agent, says,
    looked_at; a guest is looked into when a rung is due), None where unknown.
    """
    with control.store.read() as session:
        policies = load(session)
        resting = select(*COLUMNS).where(Vm.state.in_((*ON_NODE, *AT_REST)), Vm.deleted_at.is_(None)).order_by(Vm.name)
        rows = session.execute(resting.where(Vm.name.in_(names)) if names else resting).all()
    mine = [(row, vm, chosen) for row in rows if (chosen := policy_of(policies, vm := desktop(row))) is not None
            and policy in (None, chosen.name)]  # fmt: skip
    ids = [row.id for row, _, _ in mine]
    samples, looks = control.reservations.samples.vms(ids), control.reservations.samples.looks(ids)
    return [_shown(row, vm, chosen, samples.get(row.id), looks.get(row.id)) for row, vm, chosen in mine]


def _shown(
    row: Any, vm: Desktop, policy: Policy, sample: dict[str, Any] | None, look: dict[str, Any] | None
) -> dict[str, Any]:
    due = next_rung(policy.ladder, vm)
    runs = vm.state is VmState.RUNNING
    seen, inside = (sample or {}) if runs else {}, (look or {}) if runs else {}
    signals = {key: seen.get(key) for key in ("console_clients", "cpu_percent", "disk_bytes_s", "net_bytes_s")}
    signals |= {key: inside.get(key) for key in ("agent", "users", "processes", "says")}
    signals["looked_at"] = datetime.fromtimestamp(inside["at"], UTC).isoformat() if inside else None
    fresh = inside and row.active_at is not None and inside["at"] >= row.active_at.timestamp()
    used = (sample_use(policy.limits, seen) if seen else "") or (use_inside(inside) if fresh else "")
    return {
        "name": vm.name, "state": vm.state.value, "policy": policy.name, "idle_s": vm.idle_s, "used": used,
        "exempt": exempt(vm), "did": vm.did, "next": due.do if due else None, "in_s": due.in_s if due else None,
        "signals": signals,
    }  # fmt: skip
