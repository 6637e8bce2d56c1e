"""Moves of VMs that do not run, on the control plane; a running one is saved before and goes on where it came to.

inside a domain node:   save → start elsewhere
between two:            [save] → image brought → offer (source: hash) → fetch (target) → [start] → discard (source)

Until its files have arrived whole the VM lives at its source: whatever fails before leaves it there, startable, and a
running one is started there again. Once they have, nobody waits for what is left at the source (``control_left.py``).
"""

from __future__ import annotations

from typing import Any

from hdcs_tasks.errors import Cancelled, HdcsError, OutcomeUnknown, Unreachable, from_dict
from hdcs_tasks.image.control_copy import bring
from hdcs_tasks.operations.control import Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.pool.control import get_server_node
from hdcs_tasks.pool.files import fetch_spec, offer_spec
from hdcs_tasks.routing import direct_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Operation, Step, Vm, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import add_start_step, command_spec, leave_via, vm_of
from hdcs_tasks.vm.control_clone import promise_disk
from hdcs_tasks.vm.control_left import let_go
from hdcs_tasks.vm.control_move import (
    PATIENCE_S,
    change_home,
    discard,
    ends_of,
    finish,
    give_back_source,
    give_back_target,
    image_of,
    is_between,
    state_before,
    target_home,
)
from hdcs_tasks.vm.move_rules import ALIVE


def begin_saved(tx: Tx, operation: Operation) -> None:
    """Memory into the domain node's storage; the guest goes on from there on another server node."""
    _save(tx, operation, vm_of(tx, operation))


def begin(tx: Tx, operation: Operation) -> None:
    """To another domain node: what does not run is carried at once, what runs is saved first."""
    vm = vm_of(tx, operation)
    promise_disk(tx, target_home(operation), vm.id, vm.disk_bytes)
    if vm.state in ALIVE:
        _save(tx, operation, vm)
    else:
        _carry(tx, operation, vm)


def _save(tx: Tx, operation: Operation, vm: Vm) -> None:
    node = get_server_node(tx.session, operation.request["source"])
    move(vm, VmState.SAVING)
    operation.request = operation.request | {"stood_still_at": now().timestamp()}
    spec = command_spec(vm, operation)
    tx.step(operation, "vm.save_on_node", direct_queue(node.domain_node, node.name), spec, node=node.name)


@on_done("vm.migrate:vm.save_on_node")
def _saved(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    operation.request = operation.request | {"memory_bytes": result["bytes"]}
    if vm.state is not VmState.SAVED:
        return
    if operation.cancel_asked:
        if is_between(operation):
            give_back_target(tx, operation, vm)
        back(tx, operation, vm, Cancelled("cancelled; the VM goes on from its saved memory"))
    elif is_between(operation):
        try:
            _carry(tx, operation, vm)
        except HdcsError as error:  # since it was asked for, its image cannot be read any more
            not_begun(tx, operation, vm, error)
    else:
        _start(tx, operation, vm)


@on_failed("vm.migrate:vm.save_on_node")
def _not_saved(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    if is_between(operation):
        give_back_target(tx, operation, vm_of(tx, operation))


# --- the files


def _carry(tx: Tx, operation: Operation, vm: Vm) -> None:
    """Raises as ``bring``, before anything has changed."""
    image = image_of(tx, vm)
    first = None if image is None else bring(tx, operation, image, target_home(operation))
    operation.request = operation.request | {"carried_as": vm.state.value}
    move(vm, VmState.MIGRATING)
    if state_before(operation) in ALIVE:
        _keep_port(tx, vm)
    if first is None:
        offer(tx, operation, vm)


def _keep_port(tx: Tx, vm: Vm) -> None:
    """The console port cools since the guest was saved; until its files have arrived the VM may come back to it."""
    control, home, vm_id = tx.control, vm.home, vm.id
    tx.after(lambda: control.reservations.ports.keep(home, vm_id))


def offer(tx: Tx, operation: Operation, vm: Vm) -> None:
    """Any server node of the old domain node hashes the files: its storage is shared, and nobody writes to them."""
    memory = [f"state/{vm.id}.memory"] if operation.request["carried_as"] == VmState.SAVED.value else []
    shown = {"vm": vm.name, "from": vm.home, "to": target_home(operation)}
    spec = offer_spec([f"vms/{vm.id}/disk0.qcow2", *memory], shown=shown) | {"vm_id": vm.id, "ends_with_its_node": True}
    tx.step(operation, "vm.offer_on_node", vm.home, spec, patience_s=PATIENCE_S)


@on_done("vm.offer_on_node")
def _offered(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    if operation.cancel_asked:
        not_begun(tx, operation, vm, Cancelled("cancelled; the VM is as it was"))
        return
    limit = operation.request["options"]["bandwidth_mib_s"]
    try:
        spec = fetch_spec(
            tx.session, vm.home, result["files"], first=result["node"], bandwidth_mib_s=limit,
            shown={"vm": vm.name, "from": vm.home, "to": target_home(operation)},
        ) | {"vm_id": vm.id, "root": result["root"]}  # fmt: skip
    except Unreachable as error:  # whoever hashed them has left
        not_begun(tx, operation, vm, error)
        return
    operation.request = operation.request | {"overlay_bytes": result["files"][0]["allocated_bytes"]}
    tx.step(operation, "vm.fetch_on_node", target_home(operation), spec, patience_s=PATIENCE_S)


@on_failed("vm.offer_on_node")
def _not_offered(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    not_begun(tx, operation, vm_of(tx, operation), error)


@on_done("vm.fetch_on_node")
def _fetched(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    """Every file has the hash it had at the source: from this transaction on the VM lives here."""
    vm = vm_of(tx, operation)
    operation.request = operation.request | {"measured": {"bytes": result["bytes"], "resumed": result["resumed"]}}
    change_home(tx, operation, vm)
    leave_via(vm, VmState.MIGRATING, VmState(operation.request["carried_as"]))
    if state_before(operation) in ALIVE and vm.state is VmState.SAVED:
        _start(tx, operation, vm)
    else:
        _leave(tx, operation, vm)


@on_failed("vm.fetch_on_node")
def _not_fetched(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    operation.error = error.to_dict()
    if discard(tx, operation, target_home(operation)) is None:
        discarded(tx, operation)


def _leave(tx: Tx, operation: Operation, vm: Vm) -> None:
    """The VM is as it should be; what it was copied from goes, whenever a server node there can remove it."""
    _measure(operation)
    operation.request = operation.request | {"ends": ends_of(operation, vm)}
    if not is_between(operation):
        _end(tx, operation)
        return
    step = discard(tx, operation, operation.request["home"])
    if step is None:
        discarded(tx, operation)
    else:
        let_go(tx, operation)


def discarded(tx: Tx, operation: Operation) -> None:
    """What is not the VM any more is gone (or, on a storage nobody reaches, left and told of): the end, or back."""
    vm = vm_of(tx, operation)
    if "measured" in operation.request:
        give_back_source(tx, operation, vm)
        _end(tx, operation)
        return
    give_back_target(tx, operation, vm)
    back(tx, operation, vm, from_dict(operation.error or {"code": "cancelled", "message": "cancelled"}))


def not_begun(tx: Tx, operation: Operation, vm: Vm, error: HdcsError) -> None:
    """Nothing has come to the target: the VM stays."""
    give_back_target(tx, operation, vm)
    back(tx, operation, vm, error)


# --- on at the target, or back at the source


def _start(tx: Tx, operation: Operation, vm: Vm) -> None:
    """Where it should go on; not where it came from."""
    source = operation.request["source"]
    exclude = [] if is_between(operation) or source is None else [source]
    step = add_start_step(tx, operation, vm, pin=operation.request["pin"], exclude=exclude, patience_s=PATIENCE_S)
    step.spec = step.spec | _as_before(operation)


def back(tx: Tx, operation: Operation, vm: Vm, error: HdcsError) -> None:
    """The move did not happen: a VM that ran is started again, on the server node it was on if that has room, else
    wherever in its domain node there is."""
    operation.error = error.to_dict()
    leave_via(vm, VmState.MIGRATING, VmState(operation.request.get("carried_as", vm.state.value)))
    if state_before(operation) in ALIVE and vm.state is VmState.SAVED:
        operation.request = operation.request | {"back": True}
        step = add_start_step(tx, operation, vm)
        step.spec = step.spec | _as_before(operation) | {"binding": True}
        if vm.home == operation.request["home"]:
            step.spec = step.spec | {"prefer": operation.request["source"]}
        return
    tx.fail(operation, error)


def _as_before(operation: Operation) -> dict[str, Any]:
    """Of a start: a suspended VM comes back suspended."""
    return {"paused": state_before(operation) is VmState.SUSPENDED}


@on_done("vm.migrate:vm.start_on_node")
def _started(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    """At the target, where its files have come; back at the source, there is nothing to leave."""
    vm = vm_of(tx, operation)
    if step.spec.get("paused") and vm.state is VmState.RUNNING:
        move(vm, VmState.SUSPENDED)
        vm.observed_state = "paused"
    if "network" in result:
        operation.request = operation.request | {"finish": {"network": result["network"]}}
    if "measured" in operation.request or not is_between(operation):
        _leave(tx, operation, vm)
    else:
        _end(tx, operation)


@on_failed("vm.migrate:vm.start_on_node")
def _not_started(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """It is saved and startable; once more, wherever there is room."""
    vm = vm_of(tx, operation)
    if not operation.request.get("back") and vm.state is VmState.SAVED:
        back(tx, operation, vm, error)
    elif "measured" in operation.request:
        operation.error = operation.error or error.to_dict()
        operation.request = operation.request | {"unsure": error.code == OutcomeUnknown.code}
        _leave(tx, operation, vm)


def _end(tx: Tx, operation: Operation) -> None:
    if operation.error or operation.request.get("back"):
        error = from_dict(operation.error or {"code": "cancelled", "message": "cancelled"})
        tx.fail(operation, error, needs_operator=bool(operation.request.get("unsure")))
    else:
        finish(tx, operation, operation.request["measured"] | operation.request.get("finish", {}))


def _measure(operation: Operation) -> None:
    request = operation.request
    measured = dict(request.get("measured", {}))
    if "stood_still_at" in request:
        measured["downtime_ms"] = round((now().timestamp() - request["stood_still_at"]) * 1000)
        measured["memory_bytes"] = request["memory_bytes"]
        measured.setdefault("bytes", request["memory_bytes"])
    begun = operation.started_at or operation.created_at
    measured["total_ms"] = round((now() - begun).total_seconds() * 1000)
    operation.request = request | {"measured": measured}
