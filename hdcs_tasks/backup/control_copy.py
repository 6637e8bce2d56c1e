"""Second copies: a point, with all it stands on, in another domain node's storage, read and verified there.

A policy asks for them (``copy_to``), an operator (``hdcs backup copy``), or a restore into a domain node that has none.
A copy is a whole repository of its own: it is restored from, verified and adopted when the first is gone.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from hdcs_tasks.backup.control import usable
from hdcs_tasks.backup.control_drop import forget_copies, gone_at
from hdcs_tasks.backup.rules import lies_in
from hdcs_tasks.errors import BackupBroken, Conflict, HdcsError, Unreachable
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.pool.files import fetch_spec, sources_of
from hdcs_tasks.states import OPERATION_LIVE, BackupState
from hdcs_tasks.store.models import Backup, BackupCopy, Operation, Step, now
from hdcs_tasks.store.transitions import move

FETCH = "backup.fetch_on_node"
PATIENCE_S = 30.0
"""How long a copy waits for a storage that is too full."""


def copy(control: Control, backup_id: str, to: str, asked: Asked, *, bandwidth_mib_s: int | None = None) -> Operation:
    """Copy a point and what it stands on to domain node ``to``; there already: done at once."""
    with control.transaction() as tx:
        words = {"to": to, "bandwidth_mib_s": bandwidth_mib_s}
        if (same := tx.same_request(asked, "backup.copy", backup_id, **words)) is not None:
            return same
        backup = usable(tx, backup_id, BackupState.READY, BackupState.BROKEN)
        get_domain_node(tx.session, to)
        return open_copy(tx, backup, to, asked, bandwidth_mib_s=bandwidth_mib_s)


def open_copy(tx: Tx, backup: Backup, to: str, asked: Asked, *, bandwidth_mib_s: int | None = None) -> Operation:
    """As ``copy``; Conflict while one of the same VM's points is on its way there."""
    subject = f"{backup.vm_name} to {to}"
    running = select(Operation).where(
        Operation.kind == "backup.copy", Operation.subject == subject, Operation.state.in_(OPERATION_LIVE)
    )
    if (other := tx.session.scalar(running)) is not None:
        raise Conflict(f"operation {other.id} copies {subject} already", next=f"Watch it: hdcs op watch {other.id}")
    # First what may fail: who opens it for a policy goes on without it.
    there = lies_in(places_of(backup), to)
    spec = {} if there else fetch_step_spec(tx, backup, to, bandwidth_mib_s=bandwidth_mib_s)
    request = {"backup": backup.id, "to": to}
    operation = tx.open("backup.copy", asked=asked, subject=subject, request=request)
    if there:
        tx.finish(operation, {"bytes": 0, "domain_node": to})
    else:
        tx.step(operation, FETCH, to, spec, patience_s=PATIENCE_S)
    return operation


def places_of(backup: Backup) -> dict[str, BackupState]:
    """Domain nodes that hold a point, the first one first, and how it is there."""
    return {backup.domain_node: backup.state} | {c.domain_node: c.state for c in backup.copies}


def add_fetch_step(tx: Tx, operation: Operation, backup: Backup, to: str) -> Step:
    """The step that brings the point to ``to``; raises as ``fetch_step_spec``."""
    return tx.step(operation, FETCH, to, fetch_step_spec(tx, backup, to), patience_s=PATIENCE_S)


def fetch_step_spec(tx: Tx, backup: Backup, to: str, *, bandwidth_mib_s: int | None = None) -> dict[str, Any]:
    """What that step needs to know. Raises Unreachable (no storage that has the point whole can be read), BackupBroken
    (what it stands on is not there)."""
    links = links_of(tx, backup)
    source = _source(tx, links, backup)
    spec = fetch_spec(
        tx.session, source, [], bandwidth_mib_s=bandwidth_mib_s,
        shown={"vm": backup.vm_name, "point": backup.id[:8], "from": source, "pool": to},
    )  # fmt: skip
    spec |= {
        "source_vm_id": backup.vm_id, "points": [link.manifest for link in links],
        "replace": [link.id for link in links if places_of(link).get(to) is BackupState.BROKEN],
        "drop": gone_at(tx, backup.vm_id, to),
    }  # fmt: skip
    return spec


def links_of(tx: Tx, backup: Backup) -> list[Backup]:
    """The records of all a point is made of, the full one first; BackupBroken where one is missing."""
    links = [backup]
    while (parent := links[-1].parent_id) is not None:
        below = tx.session.get(Backup, parent)
        if below is None or below.manifest is None:
            raise BackupBroken(
                f"backup {backup.id} stands on {parent}, which the record does not know",
                next=f"Read the repository anew: hdcs backup adopt {backup.domain_node}",
            )
        links.append(below)
    return links[::-1]


def _source(tx: Tx, links: list[Backup], backup: Backup) -> str:
    """A domain node that holds every link and can be read now."""
    error: HdcsError | None = None
    for place in places_of(backup):
        if not all(lies_in(places_of(link), place) for link in links):
            continue
        try:
            sources_of(tx.session, place)
        except HdcsError as unreachable:
            error = unreachable
            continue
        return place
    raise error or Unreachable(f"no storage holds backup {backup.id} whole", next="See: hdcs backup verify")


@on_done(FETCH)
def _fetched(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    for point in step.spec["points"]:
        record_copy(tx, point["id"], step.queue, verified=True)
    forget_copies(tx, result["dropped"], step.queue)


def record_copy(tx: Tx, point_id: str, domain_node: str, *, verified: bool) -> None:
    """The point was found there; ``verified``: and read whole, so that it is good whatever it was before. Where its
    first home is, that is no copy."""
    backup = tx.session.get(Backup, point_id)
    if backup is None:
        return
    if backup.domain_node == domain_node:
        if verified and backup.state is BackupState.BROKEN:
            move(backup, BackupState.READY)  # brought back from a copy
        return
    row = tx.session.get(BackupCopy, (point_id, domain_node))
    known = row is not None
    if row is None:
        row = BackupCopy(backup_id=point_id, domain_node=domain_node, state=BackupState.CREATING)
        tx.session.add(row)
        tx.session.flush()
    if verified:
        row.verified_at = now()
    if row.state is not BackupState.READY and (verified or not known):
        move(row, BackupState.READY)


@on_failed(FETCH)
def _not_fetched(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    backup_id = operation.request["backup"]
    tx.event("backup.not_copied", backup_id, f"backup {backup_id}: not copied to {step.queue}: {error.message}")
