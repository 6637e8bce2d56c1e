"""The drill: a point is restored into a throwaway VM without network, whose guest must come up. Then it is proven.

restore (and compare) → start, isolated → wait for the agent → stop → delete

The throwaway is a VM like any other (drill-<point>): it takes capacity by the same rules, and shows in every list.
"""

from __future__ import annotations

from typing import Any

from hdcs_tasks.backup.control import usable
from hdcs_tasks.backup.control_restore import open_as_new
from hdcs_tasks.errors import HdcsError, from_dict
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, plan_steps
from hdcs_tasks.routing import direct_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Backup, Operation, Step, now
from hdcs_tasks.vm.control import add_start_step, vm_of
from hdcs_tasks.vm.control_delete import begin_delete, not_deleted, then_delete

plan_steps("backup.drill", {
    "backup.restore_on_node": 50, "vm.start_on_node": 5, "backup.prove_on_node": 40, "vm.stop_on_node": 3,
    "vm.delete_on_node": 2,
})  # fmt: skip

TAG = "drill"
AGENT_TIMEOUT_S = 600.0


def drill(control: Control, backup_id: str, asked: Asked, *, timeout_s: float = AGENT_TIMEOUT_S) -> Operation:
    """Prove a point. ``timeout_s``: how long the guest's agent may take to answer."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "backup.drill", backup_id, timeout_s=timeout_s)) is not None:
            return same
        backup = usable(tx, backup_id)
        # ``force`` and ``timeout_s`` are what the stop of the throwaway is given.
        request = {"compare": True, "agent_timeout_s": timeout_s, "force": True, "timeout_s": 10.0}
        operation = open_as_new(tx, "backup.drill", backup, f"drill-{backup.id[:13]}", asked, request)
        vm = vm_of(tx, operation)
        vm.tags = [TAG]
        operation.subject = backup.id
        return operation


@on_done("backup.drill:backup.restore_on_node")
def _restored(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    if operation.cancel_asked:
        _give_up(tx, operation, None)
        return
    add_start_step(tx, operation, vm_of(tx, operation), isolated=True)


@on_done("backup.drill:vm.start_on_node")
def _started(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    spec = {
        "shown": {"vm": vm.name, "node": result["node"]}, "vm_id": vm.id, "point": operation.request["backup"],
        "timeout_s": operation.request["agent_timeout_s"],
    }  # fmt: skip
    tx.step(operation, "backup.prove_on_node", direct_queue(vm.home, result["node"]), spec, node=result["node"])


@on_done("backup.prove_on_node")
def _proven(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    backup = tx.session.get(Backup, operation.request["backup"])
    if backup is not None:
        backup.proven_at = now()
    operation.request = operation.request | {"proof": result}
    begin_delete(tx, operation, binding=True)


@on_failed("backup.drill:vm.start_on_node", "backup.prove_on_node")
def _give_up_after(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    if vm_of(tx, operation).state is not VmState.FAILED:  # that guest may run somewhere: an operator's business
        _give_up(tx, operation, error)


def _give_up(tx: Tx, operation: Operation, error: HdcsError | None) -> None:
    """Remove the throwaway, though it was a cancel that stopped the drill; then the operation fails with what did."""
    told = error.to_dict() if error else {"code": "cancelled", "message": "cancelled by request"}
    operation.request = operation.request | {"gave_up": told}
    begin_delete(tx, operation, binding=True)


on_done("backup.drill:vm.stop_on_node")(then_delete)
on_failed("backup.drill:vm.stop_on_node")(not_deleted)


@on_done("backup.drill:vm.delete_on_node")
def _deleted(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    if (told := operation.request.get("gave_up")) is not None:
        tx.event("backup.not_proven", operation.subject, f"backup {operation.subject}: {told['message']}")
        tx.fail(operation, from_dict(told))
        return
    tx.finish(operation, operation.request["proof"])
