"""A clone that layer two refuses is planned anew on the next domain node, within the same operation.

refused at home → the VM's home changes → what its old home's storage holds of it is removed → clone there
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from hdcs_tasks.errors import Cancelled, HdcsError, NoCapacity
from hdcs_tasks.operations.control import Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, on_no_room
from hdcs_tasks.pool import planning
from hdcs_tasks.pool import rules as pool_rules
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import DomainNode, Image, Operation, Step, Vm
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import vm_of
from hdcs_tasks.vm.control_clone import Shape, add_clone_step, choose_homes, promise_disk, rooms_of
from hdcs_tasks.vm.control_delete import forget
from hdcs_tasks.vm.control_left import clean_later

REPLANS = 3
"""Domain nodes a clone tries beside its first home before it waits."""

PATIENCE_S = 30.0
"""How long it waits for a domain node of which no server node is up."""


@on_no_room("vm.start_on_node", "vm.clone_on_node")
def _elsewhere(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> bool:
    """Whether the clone goes on in another domain node; a pinned one, and any other start, waits where it is."""
    refused = [*operation.request.get("refused", [])]
    if operation.kind != "vm.clone" or operation.request.get("domain_node") or len(refused) >= REPLANS:
        return False
    vm = vm_of(tx, operation)
    if operation.cancel_asked or vm.state not in (VmState.CREATING, VmState.STARTING):
        return False
    old = vm.home
    found = _next_home(tx, vm, [*refused, old])
    if found is None or (choice := found[0]).domain_node is None:
        return False
    try:
        promise_disk(tx, choice.domain_node, vm.id, vm.disk_bytes)
    except NoCapacity:
        return False
    vm.home = choice.domain_node
    if vm.state is VmState.STARTING:
        move(vm, VmState.CREATING)
    operation.request = operation.request | {"refused": [*refused, old]}
    operation.decision = found[1]
    tx.event("vm.replanned", vm.name, f"VM {vm.name} goes to {vm.home}: {error.message}", was=old)
    # Also when a cancel comes: nobody would remove that disk later.
    spec = {
        "shown": {"vm": vm.name, "pool": old}, "vm_id": vm.id, "name": vm.name, "home": old, "binding": True,
        "ends_with_its_node": True,
    }  # fmt: skip
    tx.step(operation, "vm.discard_on_node", old, spec, patience_s=PATIENCE_S)
    return True


def _next_home(tx: Tx, vm: Vm, refused: list[str]) -> tuple[pool_rules.Choice, dict[str, Any]] | None:
    """The choice, and how it was made."""
    image = tx.session.get(Image, vm.image_id)
    if image is None:
        return None
    rows = tx.session.scalars(select(DomainNode).where(DomainNode.name.not_in(refused))).all()
    shape = Shape(vm.profile, vm.vcpus, vm.memory_mib, vm.disk_bytes, vm.usb, vm.rules)
    rooms = rooms_of(tx, rows, image)
    try:
        choice = choose_homes(tx.control, rooms, shape, vm.tags, 1)[1]
    except NoCapacity:
        return None
    return choice, planning.home_decision(choice, rooms, shape.wanted, tx.control.settings.capacity)


@on_done("vm.clone:vm.discard_on_node")
def _discarded(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    control, old, vm = tx.control, step.spec["home"], vm_of(tx, operation)
    vm_id = vm.id
    tx.after(lambda: control.reservations.disks.release(old, vm_id))
    _go_on(tx, operation, vm)


@on_failed("vm.clone:vm.discard_on_node")
def _not_discarded(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """The disk that stays there keeps its promise of storage until another server node has removed it; an operator sees
    if none can."""
    vm, old = vm_of(tx, operation), step.spec["home"]
    clean_later(tx, vm, old)
    tx.event("vm.disk_left", vm.name, f"the disk VM {vm.name} had in {old} was not removed: {error.message}", home=old)
    _go_on(tx, operation, vm)


def _go_on(tx: Tx, operation: Operation, vm: Vm) -> None:
    if operation.cancel_asked:
        forget(tx, vm)
        tx.fail(operation, Cancelled("cancelled before it was cloned elsewhere"))
        return
    image = tx.session.get(Image, vm.image_id)
    if vm.state is not VmState.CREATING or image is None:
        return
    try:
        add_clone_step(tx, operation, vm, image)
    except HdcsError as error:  # the image cannot be read any more where it is
        forget(tx, vm)
        tx.fail(operation, error)
