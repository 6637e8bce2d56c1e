"""Moving VMs on the control plane: what is asked, which way it goes, and the steps of a live move.

prepare (target: claim, DHCP host, between domain nodes an overlay) → perform (source) → finish (target: network,
checkpoints) → the VM is settled, and others may have it → clean (source) → the operation is settled. Each can be
repeated or undone:

    perform failed       → undo (target)                   the VM runs on at its source
    its end is unknown   → look (target, at both ends)     and on from there
    a server node lost   → what was to be done on it is given up, the rest is done

Inside a domain node the steps are ``vm.migrate_…``, between two ``vm.move_…`` (``control_move.py`` adds what they need
more). VMs that do not run are ``control_carry.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hdcs_tasks.errors import Cancelled, HdcsError, OutcomeUnknown, Unreachable, from_dict
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, on_start, plan_steps
from hdcs_tasks.pool.control import get_server_node
from hdcs_tasks.pool.rooms import vm_terms
from hdcs_tasks.routing import direct_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Operation, Step, Vm, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control_carry, control_move
from hdcs_tasks.vm.control import (
    get_vm,
    leave_via,
    placing_fields,
    release_unused,
    vm_of,
    wake_others,
)
from hdcs_tasks.vm.control_destination import check_migrate
from hdcs_tasks.vm.control_left import clean_later, let_go
from hdcs_tasks.vm.control_move import PATIENCE_S as PATIENCE_S
from hdcs_tasks.vm.control_move import PREPARED_WITHIN_S, is_between, move_spec, state_before, target_home
from hdcs_tasks.vm.move_rules import MoveOptions, Way

STAYS = "it starts on any server node of its domain node"

# Of every way; an image that must be brought first comes before the rest begins.
plan_steps("vm.migrate", {
    "vm.migrate_prepare_on_node|vm.move_prepare_on_node|vm.save_on_node|vm.offer_on_node": 8,
    "vm.migrate_on_node|vm.move_on_node|vm.fetch_on_node": 76,
    "vm.migrate_finish_on_node|vm.move_finish_on_node|vm.discard_on_node": 12,
    "vm.migrate_clean_on_node|vm.move_clean_on_node|vm.start_on_node": 4,
})  # fmt: skip


def migrate(
    control: Control, name: str, asked: Asked, *, to: str | None = None, live: bool = True,
    options: MoveOptions | None = None,
) -> Operation:  # fmt: skip
    """Move a VM to a server node or domain node; without ``to``, layer two chooses another server node of its home.

    ``live`` False: a running VM is saved and goes on at the target. Raises what ``open_move`` raises.
    """
    options = options or MoveOptions(live=live)
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "vm.migrate", name, to=to, options=vars(options))) is not None:
            return same
        return open_move(tx, get_vm(tx.session, name), asked, to=to, options=options)


def open_move(
    tx: Tx, vm: Vm, asked: Asked, *, to: str | None, options: MoveOptions, parent: Operation | None = None
) -> Operation:
    """Open the operation that moves ``vm``. Raises WrongState, Conflict (busy), Invalid, NotFound, NoCapacity (the
    other domain node's storage), Unreachable (no server node up to read from)."""
    way, home, pin = check_migrate(tx, vm, to, options)
    request = {
        "to": to, "way": way.value, "home": vm.home, "domain_node": home, "pin": pin, "source": vm.server_node,
        "was": vm.state.value, "options": options.to_dict(),
    }  # fmt: skip
    if vm.server_node is not None:
        request["source_ip"] = get_server_node(tx.session, vm.server_node).ip
    return tx.open("vm.migrate", asked=asked, vm=vm, request=request, parent=parent)


# --- how it begins


@on_start("vm.migrate")
def _begin(tx: Tx, operation: Operation) -> None:
    if "refused" in operation.request:
        # A drain's child that was refused: it is kept, and says why.
        tx.fail(operation, from_dict(operation.request["refused"]))
        return
    begin: dict[Way, Callable[[Tx, Operation], None]] = {
        Way.LIVE: _begin_live, Way.MOVE: control_move.begin, Way.SAVED: control_carry.begin_saved,
        Way.CARRY: control_carry.begin, Way.NOTHING: _nothing_to_do,
    }  # fmt: skip
    begin[Way(operation.request["way"])](tx, operation)


def _nothing_to_do(tx: Tx, operation: Operation) -> None:
    tx.finish(operation, {"moved": False, "why": STAYS})


def _begin_live(tx: Tx, operation: Operation) -> None:
    vm = vm_of(tx, operation)
    source, to = operation.request["source"], operation.request["pin"]
    move(vm, VmState.MIGRATING)
    terms = vm_terms(vm, pin=to, exclude=[source], pinned=False, start=False)
    spec = move_spec(operation, vm) | placing_fields(tx, vm, terms) | {"within_s": PREPARED_WITHIN_S}
    spec["shown"] = {"vm": vm.name, "from": source, "to": to or "?"}
    tx.step(operation, "vm.migrate_prepare_on_node", vm.home, spec, patience_s=PATIENCE_S)


# --- the image first, where the other domain node lacks it


@on_done("vm.migrate:image.copy_on_node")
def _brought(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    operation.request = operation.request | {"image_bytes": result["bytes"]}
    if operation.cancel_asked:
        _not_brought(tx, operation, step, Cancelled("cancelled; the VM is as it was"))
    elif operation.request["way"] == Way.CARRY.value:
        control_carry.offer(tx, operation, vm)
    else:
        control_move.prepare(tx, operation, vm)


@on_failed("vm.migrate:image.copy_on_node")
def _not_brought(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    vm = vm_of(tx, operation)
    operation.error = error.to_dict()
    if operation.request["way"] == Way.CARRY.value:
        control_carry.not_begun(tx, operation, vm, error)
    else:
        _stays(tx, operation, vm)


# --- the steps, one after the other


def _step_name(operation: Operation, what: str) -> str:
    kind = "vm.move" if is_between(operation) else "vm.migrate"
    return f"{kind}_{what}_on_node" if what else f"{kind}_on_node"


def _on(tx: Tx, operation: Operation, what: str, end: str, spec: dict[str, Any]) -> Step:
    """Add the step ``what`` at the operation's "source" or "target". It is done even if a cancel comes."""
    name = operation.request["source"] if end == "source" else operation.request["target"]["node"]
    home = operation.request["home"] if end == "source" else target_home(operation)
    spec = {"shown": {"vm": spec["name"], "at": name}, "binding": True} | spec
    return tx.step(operation, _step_name(operation, what), direct_queue(home, name), spec, node=name)


@on_done("vm.migrate_prepare_on_node", "vm.move_prepare_on_node")
def _prepared(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    operation.decision = result.pop("decision", None)
    operation.request = operation.request | {"target": result | {"domain_node": target_home(operation)}}
    if operation.cancel_asked:
        _undo_target(tx, operation, vm)
        return
    source = operation.request["source"]
    spec = move_spec(operation, vm) | {"target": operation.request["target"]}
    spec["shown"] = {"vm": vm.name, "from": source, "to": result["node"]}
    tx.step(operation, _step_name(operation, ""), operation.request["home"], spec, node=source)


@on_failed("vm.migrate_prepare_on_node", "vm.move_prepare_on_node")
def _not_prepared(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    vm = vm_of(tx, operation)
    operation.error = error.to_dict()
    if is_between(operation) and step.node is not None:
        # It may have left an overlay there.
        operation.request = operation.request | {"target": {"node": step.node, "domain_node": target_home(operation)}}
        _undo_target(tx, operation, vm)
        return
    release_unused(tx, vm, step)
    _stays(tx, operation, vm)


@on_done("vm.migrate_on_node", "vm.move_on_node")
def _performed(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    checkpoints = result.pop("checkpoints", [])
    operation.request = operation.request | {"measured": result}
    _arrived(tx, operation, {"checkpoints": checkpoints, "unseen": result["total_ms"] < 0})


def _arrived(tx: Tx, operation: Operation, known: dict[str, Any]) -> None:
    """The guest is at the target, as far as is known: the record follows, so that whoever asks next asks there."""
    vm = vm_of(tx, operation)
    target = operation.request["target"]
    if is_between(operation):
        control_move.change_home(tx, operation, vm)
    vm.server_node, vm.ip, vm.observed_at = target["node"], target["ip"], now()
    _on(tx, operation, "finish", "target", move_spec(operation, vm) | known)


@on_failed("vm.migrate_on_node", "vm.move_on_node")
def _not_performed(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    vm = vm_of(tx, operation)
    operation.error = error.to_dict()
    if error.code in (OutcomeUnknown.code, Unreachable.code):
        # It is on one of the two, and to undo the target could end it.
        _on(tx, operation, "look", "target", move_spec(operation, vm))
    else:
        _undo_target(tx, operation, vm)


@on_done("vm.migrate_look_on_node", "vm.move_look_on_node")
def _looked(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    if result["held_by"] == "source":
        _undo_target(tx, operation, vm_of(tx, operation))
    else:
        _arrived_unseen(tx, operation)


def _arrived_unseen(tx: Tx, operation: Operation) -> None:
    """It moved after all, though whoever watched it saw no end."""
    operation.error = None
    operation.request = operation.request | {"measured": {"total_ms": -1, "downtime_ms": -1, "bytes": -1}}
    _arrived(tx, operation, {"unseen": True})


@on_failed("vm.migrate_look_on_node", "vm.move_look_on_node")
def _not_looked(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """The target is lost: what the source says counts. Lost both, or they contradict each other: an operator looks."""
    lost = error.code == Unreachable.code
    if lost and step.node != operation.request["source"]:
        _on(tx, operation, "look", "source", move_spec(operation, vm_of(tx, operation)))
        return
    leave_via(vm_of(tx, operation), VmState.MIGRATING, state_before(operation) if lost else VmState.FAILED)
    tx.fail(operation, error, needs_operator=True)


@on_done("vm.migrate_finish_on_node", "vm.move_finish_on_node")
def _finished(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    measured = {key: value for key, value in result.items() if key.endswith(("_ms", "bytes"))}
    kept = {key: value for key, value in result.items() if key not in measured and key != "node"}
    operation.request = operation.request | {
        "measured": operation.request["measured"] | measured, "finish": kept,
    }  # fmt: skip
    _clean(tx, operation, vm_of(tx, operation))


def _clean(tx: Tx, operation: Operation, vm: Vm) -> None:
    """The VM is at the target, whatever becomes of what it left: whoever uses it does not wait for the source."""
    leave_via(vm, VmState.MIGRATING, state_before(operation))
    operation.request = operation.request | {"ends": control_move.ends_of(operation, vm)}
    # Where nobody saw the hand-over, the source may have let the guest go on too, and come back with it.
    unseen = operation.request["measured"]["total_ms"] < 0
    more = {"target": operation.request["target"], "awaits_its_node": unseen}
    _on(tx, operation, "clean", "source", move_spec(operation, vm) | more)
    let_go(tx, operation)


@on_failed("vm.migrate_finish_on_node", "vm.move_finish_on_node")
def _not_finished(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """The guest runs where the record has it; what could not be tidied is an operator's business."""
    vm = vm_of(tx, operation)
    if error.code == Unreachable.code and not step.spec.get("unseen"):
        # libvirt handed it over, then its new server node was lost: what it left at its source is not it any more.
        operation.error = error.to_dict()
        _clean(tx, operation, vm)
        return
    leave_via(vm, VmState.MIGRATING, state_before(operation))
    tx.fail(operation, error, needs_operator=True)


@on_done("vm.migrate_clean_on_node", "vm.move_clean_on_node")
def _cleaned(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    if is_between(operation):
        control_move.give_back_source(tx, operation, vm_of(tx, operation))
    _moved(tx, operation)


@on_failed("vm.migrate_clean_on_node", "vm.move_clean_on_node")
def _not_cleaned(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """The source is lost: nobody runs there, another server node removes the files. Else an operator must look."""
    if error.code != Unreachable.code:
        operation.error = operation.error or error.to_dict()
        _moved(tx, operation)
        return
    control_move.give_back_claim(tx, operation, operation.request["home"], operation.request["source"])
    if is_between(operation) and control_move.discard(tx, operation, operation.request["home"]):
        return
    _moved(tx, operation)


@on_done("vm.migrate:vm.discard_on_node")
def _discarded(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    """Files of the VM where it is not any more, or did not come to, were removed."""
    _go_on(tx, operation)


@on_failed("vm.migrate:vm.discard_on_node")
def _not_discarded(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """The VM is whole elsewhere. Another server node removes them, when one is up; an operator sees if it cannot."""
    vm, home = vm_of(tx, operation), step.spec["home"]
    message = f"the files of VM {vm.name} in {home} were not removed: {error.message}"
    tx.event("vm.disk_left", vm.name, message, home=home)
    clean_later(tx, vm, home)
    _go_on(tx, operation)


def _go_on(tx: Tx, operation: Operation) -> None:
    if operation.request["way"] == Way.CARRY.value:
        control_carry.discarded(tx, operation)
    elif "measured" in operation.request:
        control_move.give_back_source(tx, operation, vm_of(tx, operation))
        _moved(tx, operation)
    else:
        _stays(tx, operation, vm_of(tx, operation))


def _moved(tx: Tx, operation: Operation) -> None:
    """The VM has gone on since ``_clean``; the operation ends, with what was measured."""
    if operation.error:
        tx.fail(operation, from_dict(operation.error), needs_operator=True)
        return
    control_move.finish(tx, operation, operation.request["measured"] | operation.request.get("finish", {}))


# --- back


def _undo_target(tx: Tx, operation: Operation, vm: Vm) -> None:
    """The VM runs on at its source: give back what was prepared on the target, then the operation has ended."""
    _on(tx, operation, "undo", "target", move_spec(operation, vm))


@on_done("vm.migrate_undo_on_node", "vm.move_undo_on_node")
def _undone(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    if result.get("held_by") == "target":
        _arrived_unseen(tx, operation)
        return
    _stays(tx, operation, vm_of(tx, operation))


@on_failed("vm.migrate_undo_on_node", "vm.move_undo_on_node")
def _not_undone(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """The target is lost: nothing came there, another server node removes the overlay. Else an operator must look."""
    vm = vm_of(tx, operation)
    if error.code == Unreachable.code:
        control_move.give_back_claim(tx, operation, target_home(operation), operation.request["target"]["node"])
        if not (is_between(operation) and control_move.discard(tx, operation, target_home(operation))):
            _stays(tx, operation, vm)
        return
    leave_via(vm, VmState.MIGRATING, state_before(operation))
    tx.fail(operation, error, needs_operator=True)


def _stays(tx: Tx, operation: Operation, vm: Vm) -> None:
    """The move did not happen: the VM is as it was, where it was."""
    leave_via(vm, VmState.MIGRATING, state_before(operation))
    if is_between(operation):
        control_move.give_back_target(tx, operation, vm)
    for home in {vm.home, target_home(operation)}:
        wake_others(tx, home)
    tx.fail(operation, from_dict(operation.error or {"code": "cancelled", "message": "cancelled; it runs on"}))
