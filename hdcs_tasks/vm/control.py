"""VMs on the control plane: looking them up, starting, stopping, the short commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import (
    Conflict,
    HdcsError,
    Invalid,
    NotFound,
    OutcomeUnknown,
    QuotaExceeded,
    Unreachable,
    WrongState,
)
from hdcs_tasks.operations.control import Asked, Control, Tx, busy
from hdcs_tasks.operations.handlers import on_done, on_failed, on_start
from hdcs_tasks.pool import rules as pool_rules
from hdcs_tasks.pool.control import get_domain_node, get_server_node
from hdcs_tasks.pool.rooms import expected_mix, order_of, vm_shape, vm_terms
from hdcs_tasks.pool.waiting import wake_waiting
from hdcs_tasks.pool.words import wanted_words
from hdcs_tasks.routing import direct_queue, quick_queue
from hdcs_tasks.states import IN_POOL, VM_RESTS, VmState
from hdcs_tasks.store.lookups import by_key
from hdcs_tasks.store.models import Image, Operation, Step, Vm, now
from hdcs_tasks.store.naming import unknown
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control_left import check_left, nodes_left
from hdcs_tasks.vm.control_quota import check_quota, starting
from hdcs_tasks.vm.rules import COMMANDS, Command, check_usb, given_in, wrong_state_hint

_BY_NAME = select(Vm).where(
    (Vm.name == bindparam("name")) | (Vm.id == bindparam("name")), Vm.deleted_at.is_(None)
)  # fmt: skip


_NAMES = select(Vm.name).where(Vm.deleted_at.is_(None))


def names_taken(session: Session) -> set[str]:
    """The names of all living VMs."""
    return set(session.scalars(_NAMES))


def get_vm(session: Session, name: str) -> Vm:
    """The living VM of this name or id; else NotFound."""
    vm = session.scalar(_BY_NAME, {"name": name})
    if vm is None:
        raise unknown(session, Vm.name, name, "VM", "hdcs vm list", Vm.deleted_at.is_(None))
    return vm


def vm_of(tx: Tx, operation: Operation) -> Vm:
    vm = by_key(tx.session, Vm, operation.vm_id) if operation.vm_id else None
    if vm is None:
        raise NotFound(f"operation {operation.id} has no VM")
    return vm


def view(vm: Vm) -> dict[str, Any]:
    """The VM as callers see it."""
    moments = ("created_at", "started_at", "active_at", "ready_at", "observed_at")
    keys = (
        "home", "server_node", "image_id", "profile", "vcpus", "memory_mib", "disk_bytes", "usb", "disk_key", "mac",
        "port", "ip", "owner", "tags", "rules", "warm_pool", "idle", "observed_state",
    )  # fmt: skip
    return (
        {"id": vm.id, "name": vm.name, "state": vm.state.value}
        | {key: getattr(vm, key) for key in keys}
        | {key: at.isoformat() if (at := getattr(vm, key)) else None for key in moments}
    )


def show(control: Control, name: str) -> dict[str, Any]:
    """The VM as ``view`` has it, and ``image``: the name and version it stands on."""
    with control.store.read() as session:
        vm = get_vm(session, name)
        image = session.get(Image, vm.image_id) if vm.image_id else None
        return view(vm) | {"image": f"{image.name}:{image.version}" if image else None}


def set_usb(control: Control, name: str, policy: str) -> dict[str, Any]:
    """Record the USB policy (on, off or a SPICE filter); it takes effect at the next start."""
    check_usb(policy)
    with control.transaction() as tx:
        vm = get_vm(tx.session, name)
        vm.usb = policy
        return view(vm)


# --- start


def guest_fields(vm: Vm) -> dict[str, Any]:
    """What every start needs to build the guest, whatever the server node."""
    return {
        "vm_id": vm.id, "name": vm.name, "vcpus": vm.vcpus, "memory_mib": vm.memory_mib, "mac": vm.mac, "usb": vm.usb,
        "disk_key": vm.disk_key,
    }  # fmt: skip


def placing_fields(tx: Tx, vm: Vm, terms: pool_rules.Terms, home: str | None = None) -> dict[str, Any]:
    """What layer two needs to know to place this VM: its claim (vCPUs, MiB with overhead), the terms it may run under,
    the order of its domain node (``home``: of the one it moves to) with the mix packing goes by, and what to call it
    in a refusal."""
    home = home or vm.home
    order = order_of(tx.control, get_domain_node(tx.session, home))
    exclude = [*terms.exclude, *nodes_left(tx.session, vm)]
    need = pool_rules.need_of(vm_shape(vm), tx.control.settings.capacity)
    return {
        "need": need._asdict(), "pin": terms.pin, "exclude": exclude, "node_tags": list(terms.node_tags),
        "marks": list(terms.marks), "shuns": list(terms.shuns), "seeks": list(terms.together),
        "order": order, "mix": expected_mix(tx.control, tx.session, home),
        "label": label_of(tx.control, vm), "hint": f"See: hdcs pool capacity {vm.profile}",
    }  # fmt: skip


def label_of(control: Control, vm: Vm) -> str:
    """What a refusal calls the VM's shape: its profile, and what it claims of a server node."""
    return f"profile {vm.profile} ({wanted_words(vm_shape(vm), control.settings.capacity)})"


def start(control: Control, name: str, asked: Asked, *, pin: str | None = None) -> Operation:
    """Ask for a VM's start. Layer two picks the server node when the step runs."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "vm.start", name, pin=pin)) is not None:
            return same
        vm = get_vm(tx.session, name)
        check_given(tx, vm, "start")
        if pin is not None:
            check_pin(tx.session, vm, pin)
        check_left(tx.session, vm, node=pin)
        check_quota(tx, vm.owner, starting(vm))
        operation = tx.open("vm.start", asked=asked, vm=vm, request={"was": vm.state.value, "pin": pin})
        add_start_step(tx, operation, vm, pin=pin)
        return operation


def check_pin(session: Session, vm: Vm, pin: str) -> None:
    """WrongState unless server node ``pin`` is of the VM's home."""
    if get_server_node(session, pin).domain_node != vm.home:
        raise WrongState(
            f"server node {pin} is not of {vm.home}, where VM {vm.name} lives",
            next=f"Migrate it first: hdcs vm migrate {vm.name} …",
        )


def start_many(
    control: Control, names: Sequence[str], asked: Asked, *, chosen_by: Mapping[str, Any] | None = None
) -> Operation:
    """One parent operation that starts every named VM; a VM in a wrong state or busy fails alone.

    ``chosen_by``: the selector the names were found by. It is the request then, not the names: asked again, fewer rest.
    """
    words = {"chosen_by": chosen_by} if chosen_by is not None else {"vms": sorted(set(names))}
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "vm.start_many", "VMs", **words)) is not None:
            return same
        vms = [get_vm(tx.session, name) for name in dict.fromkeys(names)]
        if not vms:
            raise Invalid("no VM was named", next="See: hdcs vm list")
        parent = tx.open("vm.start_many", asked=asked, subject=f"{len(vms)} VMs", request={"vms": list(names)})
        refused = [found for vm in vms if (found := _start_child(tx, vm, asked, parent)) is not None]
        for child, error in refused:
            # Not before the last child is there: a parent ends with the last of those it has.
            tx.fail(child, error)
        return parent


def _start_child(tx: Tx, vm: Vm, asked: Asked, parent: Operation) -> tuple[Operation, HdcsError] | None:
    """One VM of a bulk start; where it cannot start, the child that is to fail, and why."""
    request = {"was": vm.state.value}
    try:
        check_given(tx, vm, "start")
        check_left(tx.session, vm)
        check_quota(tx, vm.owner, starting(vm))
        child = tx.open("vm.start", asked=asked, vm=vm, parent=parent, request=request)
    except (WrongState, Conflict, QuotaExceeded) as error:
        return tx.open("vm.start", asked=asked, subject=vm.name, parent=parent, request=request), error
    add_start_step(tx, child, vm)
    return None


def add_start_step(
    tx: Tx, operation: Operation, vm: Vm, *, pin: str | None = None, isolated: bool = False,
    exclude: Sequence[str] = (), patience_s: float | None = None,
) -> Step:  # fmt: skip
    """Move the VM to STARTING; ``isolated``: this time without a network card; ``exclude``: on none of these."""
    saved = vm.state is VmState.SAVED
    move(vm, VmState.STARTING)
    # Not when it has started: a fast guest's agent may be heard of first.
    vm.ready_at = None
    spec = {
        "shown": {"vm": vm.name, "pool": vm.home}, "guest": guest_fields(vm), "saved": saved, "isolated": isolated,
        **placing_fields(tx, vm, vm_terms(vm, pin=pin, exclude=exclude, pinned=not exclude)),
    }  # fmt: skip
    return tx.step(operation, "vm.start_on_node", vm.home, spec, patience_s=patience_s)


@on_done("vm.start_on_node")
def _started(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    operation.decision = result.pop("decision", None)
    vm.server_node, vm.port, vm.ip = result["node"], result["port"], result["ip"]
    vm.started_at = vm.active_at = now()
    vm.observed_state, vm.observed_at = "running", now()
    leave_via(vm, VmState.STARTING, VmState.RUNNING)


@on_failed("vm.start_on_node")
def _not_started(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    vm = vm_of(tx, operation)
    if error.code == OutcomeUnknown.code:
        # It may run there: neither start it elsewhere nor give its port away. A stop goes there and finds out.
        vm.server_node = step.node
        leave_via(vm, VmState.STARTING, VmState.FAILED)
        return
    saved = bool(step.spec.get("saved"))
    leave_via(vm, VmState.STARTING, VmState.SAVED if saved else VmState.STOPPED)
    cool_port(tx, vm)
    release_unused(tx, vm, step)
    wake_others(tx, vm.home)


def leave_via(vm: Vm, via: VmState, to: VmState) -> None:
    """Move on from an ``-ing`` state, unless a superseding operation has moved the VM meanwhile."""
    if vm.state is via:
        move(vm, to)


def cool_port(tx: Tx, vm: Vm) -> None:
    """Give the console port back: it can be given again after its cooling time."""
    vm.port = None
    control, vm_id, home = tx.control, vm.id, vm.home
    tx.after(lambda: control.reservations.ports.cool(home, vm_id, control.settings.port_cooling_s))


def release_unused(tx: Tx, vm: Vm, step: Step) -> None:
    """What this step claimed and never used: an attempt handed to another server node, and then called off."""
    control, vm_id, home, step_id = tx.control, vm.id, vm.home, step.id

    def release() -> None:
        for claim in control.reservations.pool.claim_of(vm_id):
            if claim.step == step_id:
                # In another domain node it was to live in, the port is not its own any more either.
                port_cooling_s = None if claim.domain_node == home else control.settings.port_cooling_s
                control.reservations.pool.release(
                    claim.domain_node, vm_id, claim.node, control.settings.dhcp_lease_s, port_cooling_s, step=step_id
                )  # fmt: skip

    tx.after(release)


# --- the short commands


def command(
    control: Control, verb: str, name: str, asked: Asked, *, force: bool = False, timeout_s: float = 60.0,
    guard: Mapping[str, Any] | None = None,
) -> Operation:  # fmt: skip
    """suspend, resume, reboot, save or stop a VM on the server node that holds it.

    A forced stop supersedes what is in its way. ``guard``: an idle policy asks; the server node looks by it whether
    somebody uses the VM right before it acts (monitor/node_idle.py), and nothing is superseded.
    """
    with control.transaction() as tx:
        words = {"force": force, "timeout_s": timeout_s, "guard": guard}
        if (same := tx.same_request(asked, f"vm.{verb}", name, **words)) is not None:
            return same
        vm = get_vm(tx.session, name)
        check_given(tx, vm, verb)
        if vm.server_node is not None:
            check_reachable(tx.session, vm)
        supersede = verb == "stop" and force and guard is None
        live = tx.live_operation(vm) if supersede else None
        same_under_way = live is not None and is_same(live, "vm.stop")
        if live is not None and same_under_way and tx.known_by(live, asked):
            return live
        request: dict[str, Any] = {"was": vm.state.value, "force": force, "timeout_s": timeout_s}
        if guard is not None:
            request["guard"] = dict(guard)
        return tx.open(
            f"vm.{verb}", asked=asked, vm=vm, request=request, supersede=supersede, behind=same_under_way
        )  # fmt: skip


def is_same(live: Operation, kind: str) -> bool:
    """Whether what is asked for is under way already: it must not supersede itself."""
    return live.kind == kind and bool(live.request.get("force")) and not live.cancel_asked


def check_given(tx: Tx, vm: Vm, verb: str, said: str = "") -> None:
    """Raise WrongState unless ``verb`` may be given to the VM as it is; Conflict where an operation moves it right now.

    The state alone would not tell the caller what to wait for. ``said``: the verb in a sentence.
    """
    if vm.state in given_in(verb):
        return
    live = tx.live_operation(vm)
    if live is not None and vm.state not in VM_RESTS:
        raise busy(live)
    raise WrongState(
        f"VM {vm.name} is {vm.state}: it cannot {said or verb}", next=wrong_state_hint(verb, vm.state, vm.name)
    )


def check_reachable(session: Session, vm: Vm) -> None:
    """Unreachable unless the server node that holds the VM's guest is in its pool."""
    node = get_server_node(session, vm.server_node or "")
    if node.state not in IN_POOL:
        raise Unreachable(
            f"VM {vm.name} is on server node {node.name}, which is {node.state}",
            next=f"Bring {node.name} back (see: hdcs node list); its guests may still run there",
        )


def _begin_command(verb: str, what: Command) -> None:
    @on_start(f"vm.{verb}")
    def begin(tx: Tx, operation: Operation) -> None:
        vm = vm_of(tx, operation)
        if vm.server_node is None:
            # What was superseded has ended without a guest.
            tx.finish(operation)
            return
        if vm.state is not what.via:
            move(vm, what.via)
        node = get_server_node(tx.session, vm.server_node)
        queue = direct_queue if verb == "save" else quick_queue
        tx.step(operation, what.step, queue(node.domain_node, node.name), command_spec(vm, operation), node=node.name)

    @on_done(what.step)
    def done(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
        vm = vm_of(tx, operation)
        if what.to in (VmState.STOPPED, VmState.SAVED):
            released(tx, vm)
        vm.observed_state, vm.observed_at = what.to.value, now()
        if "guard" not in operation.request:
            vm.active_at = now()  # somebody asked for it
        leave_via(vm, what.via, what.to)

    @on_failed(what.step)
    def failed(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
        vm = vm_of(tx, operation)
        was = VmState(operation.request.get("was", VmState.RUNNING))
        known = error.code != OutcomeUnknown.code and was in (VmState.RUNNING, VmState.SUSPENDED)
        leave_via(vm, what.via, was if known else VmState.FAILED)


def command_spec(vm: Vm, operation: Operation) -> dict[str, Any]:
    """What a short command needs to know."""
    spec = {
        "shown": {"vm": vm.name, "node": vm.server_node}, "vm_id": vm.id, "name": vm.name, "mac": vm.mac,
        "force": bool(operation.request.get("force")), "timeout_s": operation.request.get("timeout_s", 60.0),
    }  # fmt: skip
    return spec | {key: operation.request[key] for key in ("guard",) if key in operation.request}


for _verb, _what in COMMANDS.items():
    _begin_command(_verb, _what)


def released(tx: Tx, vm: Vm) -> None:
    """The guest was observed gone: record it, cool the port, and wake who waits for room."""
    vm.server_node = vm.ip = vm.ready_at = None
    cool_port(tx, vm)
    wake_others(tx, vm.home)


def wake_others(tx: Tx, domain_node: str) -> None:
    """Room was freed there: whoever waits for it and fits goes on, the oldest first."""
    control = tx.control
    tx.after(lambda: wake_waiting(control, domain_node))
