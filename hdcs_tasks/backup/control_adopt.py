"""Reading a repository's manifests back into the record: when SQL has lost them, or the storage came from elsewhere."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import select

from hdcs_tasks.backup.control_copy import record_copy
from hdcs_tasks.errors import Conflict
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.states import OPERATION_LIVE, BackupState
from hdcs_tasks.store.models import Backup, Operation, Step
from hdcs_tasks.store.transitions import move

COUNTS = ("adopted", "known")


def adopt(control: Control, domain_node: str, asked: Asked) -> Operation:
    """Record every point the repository of ``domain_node`` holds and the record does not know.

    The result counts ``adopted`` and ``known`` points, and lists ``damaged`` manifests and ``missing`` points: recorded
    as ready, but not there.
    """
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "backup.adopt", domain_node)) is not None:
            return same
        get_domain_node(tx.session, domain_node)
        running = select(Operation).where(
            Operation.kind == "backup.adopt", Operation.subject == domain_node, Operation.state.in_(OPERATION_LIVE)
        )
        if (other := tx.session.scalar(running)) is not None:
            raise Conflict(f"operation {other.id} reads it already", next=f"Watch it: hdcs op watch {other.id}")
        request = {"adopted": 0, "known": 0, "damaged": [], "missing": []}
        operation = tx.open("backup.adopt", asked=asked, subject=domain_node, request=request)
        _scan(tx, operation, "")
        return operation


def _scan(tx: Tx, operation: Operation, after: str) -> None:
    spec = {"shown": {"pool": operation.subject, "after": after[:8]}, "after": after} | CAN_BE_ASKED_AGAIN
    tx.step(operation, "backup.scan_on_node", operation.subject, spec)


@on_done("backup.scan_on_node")
def _scanned(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    request = dict(operation.request)
    for point in result["points"]:
        request["adopted" if _record(tx, operation.subject, point) else "known"] += 1
    request["damaged"] = [*request["damaged"], *result["damaged"]]
    found = {point["id"] for point in result["points"]}
    request["missing"] = [*request["missing"], *_missing(tx, operation.subject, step, result["next"], found)]
    operation.request = request
    if result["next"] is not None and not operation.cancel_asked:
        _scan(tx, operation, result["next"])
        return
    tx.finish(operation, request)


def _record(tx: Tx, domain_node: str, point: dict[str, Any]) -> bool:
    """Add the point's row; False if there is one. Known from elsewhere, it is a copy."""
    if tx.session.get(Backup, point["id"]) is not None:
        record_copy(tx, point["id"], domain_node, verified=False)
        return False
    backup = Backup(
        id=point["id"], vm_id=point["vm_id"], vm_name=str(point["definition"].get("name", ""))[:63],
        domain_node=domain_node, chain=point["chain"], seq=point["seq"], parent_id=point["parent"],
        kind="full" if point["kind"] == "full" else "increment", state=BackupState.CREATING, manifest=point,
        checkpoint=point["checkpoint"], file_bytes=point["file_bytes"],
        created_at=datetime.fromisoformat(point["created_at"]),
    )  # fmt: skip
    tx.session.add(backup)
    move(backup, BackupState.READY)
    return True


def _missing(tx: Tx, domain_node: str, step: Step, until: str | None, found: set[str]) -> list[str]:
    """Points recorded before the scan among the VMs it has read, and not there."""
    rows = select(Backup.id).where(
        Backup.domain_node == domain_node, Backup.state == BackupState.READY, Backup.vm_id > step.spec["after"],
        Backup.created_at < step.created_at,
    )  # fmt: skip
    if until is not None:
        rows = rows.where(Backup.vm_id <= until)
    return sorted(set(tx.session.scalars(rows)) - found)
