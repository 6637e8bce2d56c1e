"""Pruning on the control plane: what ``Keep`` does not ask for goes, and no kept point loses what it stands on."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import select

from hdcs_tasks.backup.control import is_being_read, lock_backups, of_vm, points_of
from hdcs_tasks.backup.control_drop import drop_copies
from hdcs_tasks.backup.rules import Keep, Prune, plan_prune
from hdcs_tasks.errors import Conflict, HdcsError, NotFound, OutcomeUnknown, Unreachable, from_dict
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.operations.settling import has_live_step
from hdcs_tasks.states import BackupState, StepState
from hdcs_tasks.store.models import Backup, Operation, Step, Vm
from hdcs_tasks.store.transitions import move


def prune(control: Control, vm: str, asked: Asked, keep: Keep, *, merge: bool = False) -> Operation:
    """Prune one VM's points; ``vm`` by name or id, also of a VM that is gone. Nothing to do is done at once."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "backup.prune", vm, keep=vars(keep), merge=merge)) is not None:
            return same
        vm_id, name = _vm_of_backups(tx, vm)
        lock_backups(tx, vm_id)
        if is_being_read(tx, vm_id):
            raise Conflict(f"a backup of VM {name} is being read", next="See: hdcs op list --live")
        living = tx.session.scalar(select(Vm).where(Vm.id == vm_id, Vm.deleted_at.is_(None)))
        request = {"vm_id": vm_id, "keep": vars(keep), "merge": merge}
        operation = tx.open("backup.prune", asked=asked, vm=living, subject=name, request=request)
        if not add_prune_steps(tx, operation, vm_id, keep, merge=merge):
            tx.finish(operation, {"merged": [], "dropped": [], "left": []})
        return operation


def plan(control: Control, vm: str, keep: Keep, *, merge: bool = False) -> dict[str, Any]:
    """What ``prune`` would do: ids to ``keep``, to ``merge`` (and onto what), to ``drop``, and the bytes of those."""
    with control.store.read() as session:
        tx = Tx(session, control, [])
        vm_id, name = _vm_of_backups(tx, vm)
        found = _plan(tx, vm_id, keep, merge=merge)
    return {
        "vm": name, "keep": sorted(found.keep), "merge": [vars(each) for each in found.merges],
        "drop": [p.id for p in found.drop], "drop_bytes": sum(p.file_bytes for p in found.drop),
    }  # fmt: skip


def _vm_of_backups(tx: Tx, vm: str) -> tuple[str, str]:
    """Id and name of the VM these backups are of; the newest of several VMs that had the name."""
    query = select(Backup.vm_id, Backup.vm_name).where(of_vm(vm))
    found = tx.session.execute(query.order_by(Backup.created_at.desc()).limit(1)).first()
    if found is None:
        raise NotFound(f"there is no backup of a VM {vm!r}", next="See: hdcs backup list")
    return str(found[0]), str(found[1])


def _plan(tx: Tx, vm_id: str, keep: Keep, *, merge: bool) -> Prune:
    return plan_prune(points_of(tx.session, vm_id, without=()), keep, merge=merge)


def add_prune_steps(tx: Tx, operation: Operation, vm_id: str, keep: Keep, *, merge: bool) -> bool:
    """Add a step per domain node that holds something to prune; False if there is nothing, or points are being read."""
    lock_backups(tx, vm_id)
    found = _plan(tx, vm_id, keep, merge=merge)
    if not (found.merges or found.drop) or is_being_read(tx, vm_id):
        return False
    rows = {b.id: b for b in tx.session.scalars(select(Backup).where(Backup.vm_id == vm_id))}
    was = {point.id: rows[point.id].state.value for point in found.drop}
    for point in found.drop:
        move(rows[point.id], BackupState.DELETING)
    touched = [*(each.point for each in found.merges), *(point.id for point in found.drop)]
    for home in sorted({rows[each].domain_node for each in touched}):
        spec = {
            "shown": {"vm": operation.subject, "drop": len(found.drop), "merge": len(found.merges)}, "vm_id": vm_id,
            "merge": [vars(each) for each in found.merges if rows[each.point].domain_node == home],
            "drop": [
                {"point": p.id, "chain": p.chain, "seq": p.seq, "was": was[p.id]}
                for p in found.drop if p.domain_node == home
            ], **CAN_BE_ASKED_AGAIN,
        }  # fmt: skip
        tx.step(operation, "backup.prune_on_node", home, spec)
    return True


@on_done("backup.prune_on_node")
def _pruned(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    for manifest in result["merged"]:
        backup = tx.session.get(Backup, manifest["id"])
        if backup is not None:
            backup.manifest, backup.file_bytes, backup.parent_id = manifest, manifest["file_bytes"], manifest["parent"]
            backup.kind = "full" if manifest["kind"] == "full" else "increment"
    for point in result["dropped"]:
        backup = tx.session.get(Backup, point)
        if backup is not None:
            move(backup, BackupState.DELETED)
    _keep_on(tx, step, result["left"])
    failed = [other for other in operation.steps if other.state is StepState.FAILED and other.error]
    if failed and operation.kind == "backup.prune" and not has_live_step(tx, operation):
        # Each domain node has a step of its own: one that failed before this one was done counts.
        tx.fail(operation, from_dict(failed[-1].error or {}))
    policy = operation.request.get("policy") or {}
    drop_copies(tx, step.spec["vm_id"], operation.subject, without=filter(None, [policy.get("copy_to")]))


_UNSURE = frozenset({OutcomeUnknown.code, Unreachable.code})
"""Errors of a prune that may have removed something: its executor, or its server node, was lost with it."""


@on_failed("backup.prune_on_node")
def _not_pruned(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """A merge failed before anything was dropped; or nobody knows, and then none of them is counted on."""
    points = [point["point"] for point in step.spec["drop"]]
    _keep_on(tx, step, points, BackupState.BROKEN if error.code in _UNSURE else None)


def _keep_on(tx: Tx, step: Step, points: Collection[str], state: BackupState | None = None) -> None:
    """Points that stay after all: in ``state``, or else as they were before."""
    was = {point["point"]: BackupState(point["was"]) for point in step.spec["drop"]}
    for point in points:
        backup = tx.session.get(Backup, point)
        if backup is not None and backup.state is BackupState.DELETING:
            move(backup, state or was.get(point, BackupState.READY))
