"""Deleting VMs: the guest is stopped at once, the disk removed, and everything the VM held given back."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.errors import Cancelled, HdcsError, OutcomeUnknown, Unreachable
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, on_start, plan_steps
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN, is_binding
from hdcs_tasks.pool.control import get_server_node
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.states import VM_RESTS, VmState
from hdcs_tasks.store.models import Operation, Step, Vm, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import check_reachable, command_spec, cool_port, get_vm, is_same, leave_via, vm_of
from hdcs_tasks.vm.control_left import clean_later


def delete(control: Control, name: str, asked: Asked) -> Operation:
    """Delete a VM: its guest is stopped at once, its disk removed. Its backups stay. Supersedes what is in its way."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "vm.delete", name)) is not None:
            return same
        vm = get_vm(tx.session, name)
        if vm.server_node is not None:
            check_reachable(tx.session, vm)
        live = tx.live_operation(vm)
        same_under_way = live is not None and is_same(live, "vm.delete")
        if live is not None and same_under_way and tx.known_by(live, asked):
            return live
        request = {"was": vm.state.value, "force": True}
        return tx.open("vm.delete", asked=asked, vm=vm, request=request, supersede=True, behind=same_under_way)


plan_steps("vm.delete", {"vm.stop_on_node": 80, "vm.delete_on_node": 20})


@on_start("vm.delete")
def _begin(tx: Tx, operation: Operation) -> None:
    begin_delete(tx, operation)


def begin_delete(tx: Tx, operation: Operation, *, binding: bool = False) -> None:
    """``binding``: whatever is asked meanwhile; what it removes is nobody's."""
    vm = vm_of(tx, operation)
    if vm.state is VmState.DELETED:
        tx.finish(operation)
        return
    if vm.state is not VmState.DELETING:
        operation.request = operation.request | {"was": vm.state.value}
        move(vm, VmState.DELETING)
    if vm.server_node is None:
        add_delete_step(tx, operation, vm, binding=binding)
        return
    node = get_server_node(tx.session, vm.server_node)
    spec = command_spec(vm, operation) | {"binding": binding}
    tx.step(operation, "vm.stop_on_node", quick_queue(node.domain_node, node.name), spec, node=node.name)


def add_delete_step(tx: Tx, operation: Operation, vm: Vm, *, binding: bool = False) -> Step:
    spec = {"shown": {"vm": vm.name, "pool": vm.home}, "vm_id": vm.id, "name": vm.name, "binding": binding}
    spec |= CAN_BE_ASKED_AGAIN
    return tx.step(operation, "vm.delete_on_node", vm.home, spec)


@on_done("vm.delete:vm.stop_on_node")
def then_delete(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    """Its guest has ended: the disk goes."""
    add_delete_step(tx, operation, vm_of(tx, operation), binding=is_binding(step.spec))


@on_failed("vm.delete:vm.stop_on_node", "vm.delete_on_node")
def not_deleted(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    vm = vm_of(tx, operation)
    untouched = error.code == Cancelled.code and step.attempt == 1
    leave_via(vm, VmState.DELETING, _as_before(operation, vm) if untouched else VmState.FAILED)


def _as_before(operation: Operation, vm: Vm) -> VmState:
    """Nothing was touched; but for its guest, where that was stopped before."""
    was = VmState(operation.request["was"])
    if was in (VmState.RUNNING, VmState.SUSPENDED) and vm.server_node is None:
        return VmState.STOPPED
    return was if was in VM_RESTS else VmState.FAILED


@on_done("vm.delete_on_node")
def _deleted(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    forget(tx, vm_of(tx, operation))


def forget_new(tx: Tx, vm: Vm, error: HdcsError) -> None:
    """The VM was never there: the step that was to make its disk failed. Where nobody knows how far that came, what may
    lie there is removed."""
    if error.code in (Unreachable.code, OutcomeUnknown.code):
        clean_later(tx, vm, vm.home)
    forget(tx, vm)


def forget(tx: Tx, vm: Vm) -> None:
    """The VM is gone: its name, MAC, port and disk promise are free."""
    control, vm_id, home = tx.control, vm.id, vm.home
    if vm.state is not VmState.DELETED:
        move(vm, VmState.DELETED)
    vm.deleted_at = now()
    cool_port(tx, vm)
    tx.after(lambda: control.reservations.macs.release(vm_id))
    tx.after(lambda: control.reservations.disks.release(home, vm_id))
    if vm.tags or vm.rules:
        tx.after(lambda: control.reservations.marks.forget(home, vm_id))
