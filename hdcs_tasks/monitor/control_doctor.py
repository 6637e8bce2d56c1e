"""``hdcs doctor``: is the control plane well, and what can be mended of what is not.

Repairing only does now what sweeps do in time (rebuild, recovery, giving back), and settles VMs that failed by what
their server nodes see of them. Nothing is guessed: a VM whose guest nobody can look for is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor.control_signals import known_sweeps
from hdcs_tasks.monitor.rules import Sighting, settled_state
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.pool.rebuild import reservation_sweep
from hdcs_tasks.pool.tidy import tidy_sweep
from hdcs_tasks.pool.waiting import waiting_sweep
from hdcs_tasks.states import IN_POOL, OPERATION_LIVE, VmState
from hdcs_tasks.store.models import Operation, ServerNode, Vm, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control as vm_control

log = logger(__name__)


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``look`` returns what is well, or raises what is not; ``mend`` tells what it did."""

    name: str
    look: Callable[[], str]
    mend: Callable[[], str] | None = None


def doctor(control: Control, *, repair: bool = False) -> list[dict[str, Any]]:
    """Every check, each ``{check, ok, message, next, repaired}``. With ``repair`` what can be mended is mended and
    looked at once more; ``repaired`` says what was done ('' where nothing was)."""
    found = [_checked(check, repair) for check in _ground(control)]
    if not all(check["ok"] for check in found):
        return found
    return found + [_checked(check, repair) for check in _rest(control)]


def _ground(control: Control) -> list[Check]:
    return [
        Check("database", lambda: _database(control)),
        Check("redis", lambda: _redis(control), lambda: f"reservations: {reservation_sweep(control)}"),
    ]


def _rest(control: Control) -> list[Check]:
    with control.store.read() as session:
        nodes = list(session.scalars(select(ServerNode).order_by(ServerNode.name)))
    return [
        Check("sweeps", lambda: _sweeps(control)),
        *(Check(f"server node {node.name}", lambda node=node: _node(node)) for node in nodes),  # type: ignore[misc]
        Check("operations", lambda: _operations(control), lambda: _recover(control)),
        Check("VMs", lambda: _vms(control), lambda: _settle_failed(control)),
        Check("reservations", lambda: _reservations(control), lambda: _give_back(control)),
    ]


def _checked(check: Check, repair: bool) -> dict[str, Any]:
    seen = _look(check)
    if seen["ok"] or not repair or check.mend is None:
        return seen
    try:
        done = check.mend()
    except HdcsError as error:
        return seen | {"repaired": f"not repaired: {error.message}"}
    log.warning("repaired", check=check.name, what=done)
    return _look(check) | {"repaired": done}


def _look(check: Check) -> dict[str, Any]:
    try:
        return {"check": check.name, "ok": True, "message": check.look(), "next": "", "repaired": ""}
    except HdcsError as error:
        return {"check": check.name, "ok": False, "message": error.message, "next": error.next, "repaired": ""}


# --- looking


def _database(control: Control) -> str:
    with control.store.read() as session:
        session.execute(text("SELECT 1"))
    return "answers"


def _redis(control: Control) -> str:
    if not control.reservations.epoch.is_open():
        raise HdcsError("reservations wait for their rebuild", next="It takes a minute: do beat and control run?")
    return "reservations open"


def _sweeps(control: Control) -> str:
    found = [signal for signal in known_sweeps(control) if signal.value]
    if found:
        raise HdcsError(found[0].message, next="Do hdcs-beat and a control worker run?")
    ran = control.reservations.samples.sweeps()
    return f"{len(ran)} ran in time" if ran else "none has run yet"


def _node(node: ServerNode) -> str:
    if node.state not in IN_POOL:
        raise HdcsError(f"{node.name} is {node.state} since {node.state_at.isoformat()}", next="Start its worker")
    seen = "never" if node.observed_at is None else f"{(now() - node.observed_at).total_seconds():.0f} s ago"
    return f"{node.state}, sampled {seen}"


def _operations(control: Control) -> str:
    """None lives longer than its step may take and wait together."""
    limit_s = control.settings.step_deadline_s + control.settings.park_deadline_s
    with control.store.read() as session:
        live = list(session.scalars(select(Operation).where(Operation.state.in_(OPERATION_LIVE))))
    old = [op for op in live if op.parent_id is None and (now() - op.created_at).total_seconds() > limit_s]
    if old:
        raise HdcsError(
            f"{len(old)} operations live for more than {limit_s / 3600:.1f} h: {_names([op.id for op in old])}",
            next="See: hdcs op show ID, hdcs op cancel ID",
        )
    return f"{len(live)} live"


def _vms(control: Control) -> str:
    failed = _failed(control)
    if failed:
        raise HdcsError(
            f"{len(failed)} VMs failed and wait for an operator: {_names([vm.name for vm in failed])}",
            next="hdcs doctor --repair settles those whose server node can be asked; else: hdcs vm stop NAME --force",
        )
    return "none has failed"


def _failed(control: Control) -> list[Vm]:
    with control.store.read() as session:
        query = select(Vm).where(Vm.state == VmState.FAILED, Vm.deleted_at.is_(None)).order_by(Vm.name)
        return list(session.scalars(query))


def _reservations(control: Control) -> str:
    with control.store.read() as session:
        vms = set(session.scalars(select(Vm.id).where(Vm.deleted_at.is_(None))))
    orphans = control.reservations.orphans(vms)
    count = sum(len(part) for part in orphans)
    if count:
        raise HdcsError(
            f"{count} reservations have no owner: {orphans}", next="A sweep gives them back; at once: doctor --repair"
        )
    return "every one has its owner"


def _names(found: list[str]) -> str:
    return ", ".join(found[:5]) + (" …" if len(found) > 5 else "")


# --- mending


def _recover(control: Control) -> str:
    counts = recovery_sweep(control)
    return f"woken {counts['woken'] + waiting_sweep(control)}, new attempts {counts['new_attempt']}"


def _give_back(control: Control) -> str:
    """Twice, as the sweep takes an owner for gone that it did not know two times running."""
    return f"given back: {tidy_sweep(control) + tidy_sweep(control)}"


def _settle_failed(control: Control) -> str:
    with control.store.read() as session:
        homes = {
            node.name: node.domain_node
            for node in session.scalars(select(ServerNode).where(ServerNode.state.in_(IN_POOL)))
        }
        silent = set(session.scalars(select(ServerNode.domain_node).where(ServerNode.state.not_in(IN_POOL))))
    samples = control.reservations.samples.nodes(list(homes))
    words = [_settle_one(control, vm, homes, samples, silent) for vm in _failed(control)]
    return "; ".join(words) or "nothing"


def _settle_one(
    control: Control, vm: Vm, homes: dict[str, str], samples: dict[str, dict[str, Any]], silent: set[str]
) -> str:
    """Where every server node of its home was sampled after it failed, the VM is what they saw."""
    wanted = [name for name, home in homes.items() if home == vm.home]
    fresh = {name: samples[name] for name in wanted if samples.get(name, {}).get("at", 0) > vm.state_at.timestamp()}
    seen = [
        Sighting(name, guest["state"])
        for name, sample in fresh.items() for guest in sample["guests"] if guest["vm_id"] == vm.id
    ]  # fmt: skip
    state = settled_state(seen, vm.server_node, all_looked=len(fresh) == len(wanted) and vm.home not in silent)
    if state is None:
        return f"{vm.name}: left alone, not every server node of {vm.home} could look"
    if state is VmState.STOPPED and vm.server_node is not None:
        vm_control.command(control, "stop", vm.name, Asked(by="doctor", reason="its guest is nowhere"), force=True)
        return f"{vm.name}: stopping, what it held is given back"
    with control.transaction() as tx:
        record = vm_control.get_vm(tx.session, vm.id)
        if record.state is not VmState.FAILED or tx.live_operation(record) is not None:
            return f"{vm.name}: at work again"
        move(record, state)
        tx.event("vm.settled", vm.name, f"VM {vm.name} had failed; it is {state.value}, as its server node sees it")
    return f"{vm.name}: {state.value}"
