"""Second copies kept in step: what is pruned or deleted at its first place goes from the other domain nodes, too.

An operation of its own, so that a domain node that is away holds nobody up. What it could not drop (a kept point
stands on it there, the node was away) the next one finds again, and so does the next copy to that domain node.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import select

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.operations.control import Asked, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.states import OPERATION_LIVE, BackupState
from hdcs_tasks.store.models import Backup, BackupCopy, Operation, Step

DROP = "backup.drop_copies_on_node"
KIND = "backup.drop_copies"


def drop_copies(tx: Tx, vm_id: str, vm_name: str, *, without: Iterable[str] = ()) -> None:
    """Begin to drop the VM's points that are deleted from every domain node that has copies of them, but ``without``
    those that are about to get a copy, which drops them. Where that is under way it goes on afterwards."""
    tx.session.flush()
    query = select(BackupCopy.domain_node).join(Backup).where(Backup.vm_id == vm_id)
    query = query.where(Backup.state == BackupState.DELETED).distinct()
    for place in sorted(set(tx.session.scalars(query)) - set(without)):
        _open(tx, vm_id, vm_name, place)


def _open(tx: Tx, vm_id: str, vm_name: str, place: str) -> None:
    subject = f"{vm_name} at {place}"
    running = select(Operation.id).where(
        Operation.kind == KIND, Operation.subject == subject, Operation.state.in_(OPERATION_LIVE)
    )
    if tx.session.scalar(running) is not None:
        return
    asked = Asked(by="backups", reason="second copies follow what is kept")
    operation = tx.open(KIND, asked=asked, subject=subject, request={"vm_id": vm_id, "vm_name": vm_name})
    gone = gone_at(tx, vm_id, place)
    spec = {"shown": {"vm": vm_name, "pool": place, "drop": len(gone)}, "source_vm_id": vm_id, "drop": gone}
    tx.step(operation, DROP, place, spec | CAN_BE_ASKED_AGAIN)


def gone_at(tx: Tx, vm_id: str, domain_node: str) -> list[str]:
    """Copies there of points that were dropped meanwhile."""
    query = select(BackupCopy).join(Backup).where(
        Backup.vm_id == vm_id, BackupCopy.domain_node == domain_node, Backup.state == BackupState.DELETED
    )  # fmt: skip
    return [found.backup_id for found in tx.session.scalars(query)]


def forget_copies(tx: Tx, points: Iterable[str], domain_node: str) -> None:
    for point_id in points:
        row = tx.session.get(BackupCopy, (point_id, domain_node))
        if row is not None:
            tx.session.delete(row)


@on_done(DROP)
def _dropped(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    forget_copies(tx, result["dropped"], step.queue)
    tx.finish(operation, result)
    tx.session.flush()
    vm_id, vm_name = operation.request["vm_id"], operation.request["vm_name"]
    if set(gone_at(tx, vm_id, step.queue)) - set(step.spec["drop"]):
        _open(tx, vm_id, vm_name, step.queue)  # others were deleted meanwhile


@on_failed(DROP)
def _not_dropped(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    tx.event("backup.not_dropped", operation.subject, f"copies of {operation.subject}: not dropped: {error.message}")
