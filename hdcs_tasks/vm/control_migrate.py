"""Migration inside a domain node on the control plane: named steps, each of which can be repeated or undone.

prepare (target: claim, DHCP host) → perform (source) → finish (target: network, checkpoints) → clean (source)
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import HdcsError, Invalid, OutcomeUnknown, Rejected, WrongState, from_dict
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, on_start, plan_steps
from hdcs_tasks.pool.control import IN_POOL, get_server_node
from hdcs_tasks.pool.rooms import vm_terms
from hdcs_tasks.routing import direct_queue
from hdcs_tasks.states import ServerNodeState, VmState
from hdcs_tasks.store.models import DomainNode, Operation, ServerNode, Step, Vm, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import (
    check_given,
    get_vm,
    leave_via,
    placing_fields,
    release_unused,
    vm_of,
    wake_others,
)

PATIENCE_S = 30.0
"""A VM that cannot move runs on where it is, so a migration does not wait for room as long as a start does."""

plan_steps("vm.migrate", {
    "vm.migrate_prepare_on_node": 4, "vm.migrate_on_node": 80, "vm.migrate_finish_on_node": 12,
    "vm.migrate_clean_on_node": 4,
})  # fmt: skip


def migrate(control: Control, name: str, asked: Asked, *, to: str | None = None, live: bool = True) -> Operation:
    """Move a running VM to another server node of its domain node; without ``to``, layer two chooses it."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked)) is not None:
            return same
        vm = get_vm(tx.session, name)
        check_migrate(tx, vm, to)
        return tx.open("vm.migrate", asked=asked, vm=vm, request={"to": to, "live": live, "source": vm.server_node})


def check_migrate(tx: Tx, vm: Vm, to: str | None) -> None:
    """WrongState, Conflict, Rejected or Invalid unless the VM may move to ``to`` (None: anywhere in its home)."""
    check_given(tx, vm, "migrate")
    if to is not None:
        _check_target(tx.session, vm, to)
    else:
        _check_company(tx.session, vm)


def _check_target(session: Session, vm: Vm, to: str) -> None:
    if session.get(DomainNode, to) is not None:
        raise Rejected(
            f"VM {vm.name} cannot move to domain node {to}: only moves inside a domain node are built so far",
            next=f"Name a server node of {vm.home}: hdcs node list",
        )
    node = get_server_node(session, to)
    if node.domain_node != vm.home:
        raise Invalid(f"server node {to} is of {node.domain_node}, VM {vm.name} of {vm.home}", next="hdcs node list")
    if node.name == vm.server_node:
        raise WrongState(f"VM {vm.name} is on {to} already", next="There is nothing to move")
    if node.state not in IN_POOL:
        raise WrongState(f"server node {to} is {node.state}", next="Choose another: hdcs node list")


def _check_company(session: Session, vm: Vm) -> None:
    """There must be another server node at all; whether one has room is layer two's to say."""
    others = select(ServerNode.name).where(
        ServerNode.domain_node == vm.home, ServerNode.state == ServerNodeState.UP, ServerNode.name != vm.server_node
    )
    if session.scalar(others.limit(1)) is None:
        raise WrongState(
            f"VM {vm.name} cannot migrate: {vm.home} has no other server node that is up",
            next=f"Bring another one into {vm.home} (see: hdcs node list)",
        )


@on_start("vm.migrate")
def _begin(tx: Tx, operation: Operation) -> None:
    vm = vm_of(tx, operation)
    source = get_server_node(tx.session, operation.request["source"])
    move(vm, VmState.MIGRATING)
    to = operation.request.get("to")
    terms = vm_terms(vm, pin=to, exclude=[source.name], pinned=False, start=False)
    spec = _spec(vm, source) | placing_fields(tx, vm, terms)
    spec["shown"] = {"vm": vm.name, "from": source.name, "to": to or "?"}
    tx.step(operation, "vm.migrate_prepare_on_node", vm.home, spec, patience_s=PATIENCE_S)


def _spec(vm: Vm, source: ServerNode) -> dict[str, Any]:
    return {
        "vm_id": vm.id, "name": vm.name, "mac": vm.mac, "home": vm.home, "disk_key": vm.disk_key,
        "source": {"name": source.name, "ip": source.ip},
    }  # fmt: skip


@on_done("vm.migrate_prepare_on_node")
def _prepared(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    operation.decision = result.get("decision")
    target = {key: result[key] for key in ("node", "address", "ip", "port")}
    operation.request = operation.request | {"target": target}
    if operation.cancel_asked:
        _undo_target(tx, operation, vm)
        return
    source = get_server_node(tx.session, operation.request["source"])
    spec = _spec(vm, source) | {"target": target, "live": operation.request.get("live", True)}
    spec["shown"] = {"vm": vm.name, "from": source.name, "to": target["node"]}
    tx.step(operation, "vm.migrate_on_node", vm.home, spec)


@on_done("vm.migrate_on_node")
def _performed(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    target = operation.request["target"]
    operation.request = operation.request | {"measured": result}
    vm.server_node, vm.ip, vm.observed_at = target["node"], target["ip"], now()
    spec = _spec(vm, get_server_node(tx.session, operation.request["source"])) | {
        "target": target, "checkpoints": result.get("checkpoints", []),
    }  # fmt: skip
    spec["shown"] = {"vm": vm.name, "at": target["node"]}
    tx.step(operation, "vm.migrate_finish_on_node", direct_queue(vm.home, target["node"]), spec, node=target["node"])


@on_done("vm.migrate_finish_on_node")
def _finished(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    source = get_server_node(tx.session, operation.request["source"])
    spec = _spec(vm, source)
    spec["shown"] = {"vm": vm.name, "at": source.name}
    operation.request = operation.request | {"finish": result}
    tx.step(operation, "vm.migrate_clean_on_node", direct_queue(vm.home, source.name), spec, node=source.name)


@on_done("vm.migrate_clean_on_node")
def _cleaned(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    leave_via(vm, VmState.MIGRATING, VmState.RUNNING)
    wake_others(tx, vm.home)
    measured = {key: value for key, value in operation.request["measured"].items() if key != "checkpoints"}
    tx.finish(operation, measured | operation.request.get("finish", {}) | {
        "from": operation.request["source"], "to": operation.request["target"]["node"], "ip": vm.ip,
    })  # fmt: skip


@on_failed("vm.migrate_prepare_on_node")
def _not_prepared(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    vm = vm_of(tx, operation)
    leave_via(vm, VmState.MIGRATING, VmState.RUNNING)
    release_unused(tx, vm, step)


@on_failed("vm.migrate_on_node")
def _not_performed(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    if error.code == OutcomeUnknown.code:
        # It runs on one of the two: undoing the target could end it.
        leave_via(vm_of(tx, operation), VmState.MIGRATING, VmState.FAILED)
        tx.fail(operation, error, needs_operator=True)
        return
    operation.error = error.to_dict()
    _undo_target(tx, operation, vm_of(tx, operation))


def _undo_target(tx: Tx, operation: Operation, vm: Vm) -> None:
    """The VM runs on at its source: give back what was prepared on the target, then the operation has ended."""
    target = operation.request["target"]
    spec = {"vm_id": vm.id, "name": vm.name, "mac": vm.mac, "shown": {"vm": vm.name, "at": target["node"]}}
    tx.step(operation, "vm.migrate_undo_on_node", direct_queue(vm.home, target["node"]), spec, node=target["node"])


@on_done("vm.migrate_undo_on_node")
def _undone(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    leave_via(vm, VmState.MIGRATING, VmState.RUNNING)
    wake_others(tx, vm.home)
    tx.fail(operation, from_dict(operation.error or {"code": "cancelled", "message": "cancelled; it runs on"}))


@on_failed("vm.migrate_undo_on_node", "vm.migrate_finish_on_node", "vm.migrate_clean_on_node")
def _left_half(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """The guest runs; what could not be tidied is an operator's business."""
    leave_via(vm_of(tx, operation), VmState.MIGRATING, VmState.RUNNING)
    tx.fail(operation, error, needs_operator=True)
