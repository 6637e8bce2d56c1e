"""What of a VM may change after its clone, on the control plane: its name, and its disk, which can only grow."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from hdcs_tasks.errors import Conflict, Invalid, OutcomeUnknown, Unreachable, WrongState
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.pool.control import get_server_node
from hdcs_tasks.routing import check_name, direct_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store import metering
from hdcs_tasks.store.models import Operation, Step, Vm
from hdcs_tasks.vm.control import check_given, get_vm, view, vm_of
from hdcs_tasks.vm.control_clone import promise_disk

DISK_MAX_BYTES = 1 << 50


def rename(control: Control, name: str, new: str) -> dict[str, Any]:
    """Give a stopped VM another name; it keeps its id, MAC, disk and backup chain. Raises WrongState, Conflict."""
    check_name("VM", new)
    with control.transaction() as tx:
        vm = get_vm(tx.session, name)
        if vm.state is not VmState.STOPPED:
            raise WrongState(f"VM {vm.name} is {vm.state}: its guest has the name", next="Stop it first: hdcs vm stop")
        if (live := tx.live_operation(vm)) is not None:
            raise Conflict(f"VM {vm.name} is busy: {live.kind} {live.id}", next=f"Wait for it: hdcs op watch {live.id}")
        if tx.session.scalar(select(Vm.id).where(Vm.name == new, Vm.deleted_at.is_(None), Vm.id != vm.id)):
            raise Conflict(f"there is a VM named {new!r} already", next="Choose another name, or see: hdcs vm list")
        vm.name = new
        tx.session.flush()
        metering.changed(tx.session, vm)
        return view(vm)


def grow(control: Control, name: str, disk_bytes: int, asked: Asked) -> Operation:
    """Make a VM's disk ``disk_bytes`` large, running or stopped. The guest grows its own file system.

    Raises Invalid (it would shrink), NoCapacity (the storage cannot promise it), WrongState, Conflict.
    """
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "vm.grow", name, disk_bytes=disk_bytes)) is not None:
            return same
        vm = get_vm(tx.session, name)
        check_given(tx, vm, "grow", "grow its disk")
        if not vm.disk_bytes <= disk_bytes <= DISK_MAX_BYTES or disk_bytes % 512:
            raise Invalid(
                f"VM {vm.name} has a disk of {vm.disk_bytes} bytes: it cannot become {disk_bytes}",
                next="Only growing is possible, in steps of 512 bytes",
            )
        request = {"disk_bytes": disk_bytes, "was": vm.disk_bytes}
        operation = tx.open("vm.grow", asked=asked, vm=vm, request=request)
        promise_disk(tx, vm.home, vm.id, disk_bytes, before=vm.disk_bytes)
        _add_step(tx, operation, vm, disk_bytes)
        return operation


def _add_step(tx: Tx, operation: Operation, vm: Vm, disk_bytes: int) -> None:
    spec = {
        "shown": {"vm": vm.name, "disk_bytes": disk_bytes}, "vm_id": vm.id, "name": vm.name, "disk_bytes": disk_bytes,
        "disk_key": vm.disk_key,
    }  # fmt: skip
    if vm.server_node is None:
        tx.step(operation, "vm.grow_on_node", vm.home, spec | CAN_BE_ASKED_AGAIN)
        return
    node = get_server_node(tx.session, vm.server_node)
    tx.step(operation, "vm.grow_on_node", direct_queue(node.domain_node, node.name), spec, node=node.name)


@on_done("vm.grow_on_node")
def _grown(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    vm.disk_bytes = result["disk_bytes"]
    metering.changed(tx.session, vm)


@on_failed("vm.grow_on_node")
def _not_grown(tx: Tx, operation: Operation, step: Step, error: Any) -> None:
    """What was promised is taken back, unless the disk may have grown all the same."""
    vm = vm_of(tx, operation)
    if error.code not in (OutcomeUnknown.code, Unreachable.code) and vm.deleted_at is None:
        control, home, vm_id, was = tx.control, vm.home, vm.id, operation.request["was"]
        tx.after(lambda: control.reservations.disks.claim(home, vm_id, was, 1 << 62))
