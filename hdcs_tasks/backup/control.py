"""Backups on the control plane: plan the next point of a chain, verify, list, delete."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from hdcs_tasks.backup.control_drop import drop_copies
from hdcs_tasks.backup.rules import FullRule, Point, next_point
from hdcs_tasks.errors import Cancelled, Conflict, HdcsError, Invalid, NotFound, Unreachable, WrongState
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, on_start
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.states import IN_POOL, OPERATION_LIVE, STEP_LIVE, BackupState
from hdcs_tasks.store.locks import decide_alone
from hdcs_tasks.store.models import Backup, BackupCopy, Image, Operation, ServerNode, Step, Vm, new_id, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import check_given, check_reachable, get_vm, guest_fields, vm_of

DEAD = (BackupState.FAILED, BackupState.DELETED)


def create(
    control: Control, name: str, asked: Asked, *, full: bool = False, bandwidth_mib_s: int | None = None,
    policy: dict[str, Any] | None = None,
) -> Operation:  # fmt: skip
    """Back up a VM: its own layer only; after the first, only what changed since the newest point.

    ``policy``: the policy's name and rules (``control_policy.terms``) when it is one that asks.
    """
    with control.transaction() as tx:
        words = {"full": full, "bandwidth_mib_s": bandwidth_mib_s}
        if (same := tx.same_request(asked, "backup.create", name, **words)) is not None:
            return same
        vm = get_vm(tx.session, name)
        check_given(tx, vm, "backup", "be backed up")
        _check_somebody_is_there(tx.session, vm)
        request = {"full": full, "vm_id": vm.id, "bandwidth_mib_s": bandwidth_mib_s, "policy": policy}
        return tx.open("backup.create", asked=asked, vm=vm, request=request)


def _check_somebody_is_there(session: Session, vm: Vm) -> None:
    """Unreachable unless a server node can do it now: the guest's own, or for a stopped VM any of its home."""
    if vm.server_node is not None:
        check_reachable(session, vm)
        return
    up = select(ServerNode.name).where(ServerNode.domain_node == vm.home, ServerNode.state.in_(IN_POOL)).limit(1)
    if session.scalar(up) is None:
        raise Unreachable(
            f"no server node of domain node {vm.home} is up: nobody can read the disk of VM {vm.name}",
            next="Bring one back: hdcs node list",
        )


@on_start("backup.create")
def _begin(tx: Tx, operation: Operation) -> None:
    vm = vm_of(tx, operation)
    _plan_step(tx, operation, vm, full=bool(operation.request.get("full")))


def _plan_step(tx: Tx, operation: Operation, vm: Vm, *, full: bool) -> None:
    policy = operation.request.get("policy") or {}
    lock_backups(tx, vm.id)
    points = points_of(tx.session, vm.id)
    rule = FullRule(policy["full_every"], policy["full_percent"]) if policy else None
    plan = next_point(points, home=vm.home, full=full, rule=rule, disk_bytes=vm.disk_bytes)
    backup = Backup(
        id=new_id(), vm_id=vm.id, vm_name=vm.name, domain_node=vm.home, seq=plan.seq, kind=plan.kind,
        chain=plan.parent.chain if plan.parent else new_id(), parent_id=plan.parent.id if plan.parent else None,
        state=BackupState.CREATING,
    )  # fmt: skip
    tx.session.add(backup)
    tx.session.flush()
    operation.request = operation.request | {"backup": backup.id, "why": plan.why}
    image = tx.session.get(Image, vm.image_id) if vm.image_id else None
    spec = {
        "shown": {"vm": vm.name, "kind": plan.kind, "seq": plan.seq}, "vm_id": vm.id, "name": vm.name,
        "server_node": vm.server_node, "point": backup.id, "chain": backup.chain, "seq": backup.seq, "kind": plan.kind,
        "parent": backup.parent_id, "parent_checkpoint": plan.parent.checkpoint if plan.parent else None,
        "bandwidth_mib_s": operation.request.get("bandwidth_mib_s"),
        "image": {"name": image.name, "version": image.version, "sha256": image.sha256} if image else None,
        "definition": guest_fields(vm) | {
            "profile": vm.profile, "disk_bytes": vm.disk_bytes, "owner": vm.owner, "tags": vm.tags,
        },
    }  # fmt: skip
    if vm.server_node is None:
        spec |= CAN_BE_ASKED_AGAIN  # a job of a guest that runs is seen to its end where that is
    tx.step(operation, "backup.create_on_node", vm.home, spec)


def points_of(session: Session, vm_id: str, *, without: Iterable[BackupState] = (BackupState.DELETING,)) -> list[Point]:
    """A VM's points as the rules take them, oldest first; of a VM that is gone, too."""
    query = select(Backup).where(Backup.vm_id == vm_id, Backup.state.not_in((*DEAD, *without)))
    query = query.order_by(Backup.created_at, Backup.seq).execution_options(populate_existing=True)
    return [as_point(b) for b in session.scalars(query)]


def as_point(b: Backup) -> Point:
    return Point(
        b.id, b.chain, b.seq, b.state, b.domain_node, b.checkpoint, b.parent_id, b.created_at, b.file_bytes or 0,
        b.proven_at, (b.manifest or {}).get("disk_bytes", 0),
    )  # fmt: skip


def lock_backups(tx: Tx, vm_id: str) -> None:
    """Whoever reads a VM's points, or changes which there are, decides alone until its transaction ends: of a prune and
    a restore at once, the second sees what the first has begun."""
    decide_alone(tx.session, f"backups of {vm_id}")


def get_backup(session: Session, backup_id: str) -> Backup:
    """The backup of this id or unique id prefix (6 characters or more); else NotFound."""
    found = session.get(Backup, backup_id)
    if found is None and len(backup_id) >= 6:
        rows = session.scalars(select(Backup).where(Backup.id.startswith(backup_id, autoescape=True))).all()
        found = rows[0] if len(rows) == 1 else None
    if found is None or found.state in DEAD:
        raise NotFound(f"there is no backup {backup_id!r}", next="See: hdcs backup list")
    return found


def usable(tx: Tx, backup_id: str, *states: BackupState) -> Backup:
    """The backup if something may be done with its files now: else NotFound, WrongState or Conflict."""
    backup = get_backup(tx.session, backup_id)
    lock_backups(tx, backup.vm_id)
    tx.session.refresh(backup)
    if backup.state not in (states or (BackupState.READY,)):
        raise WrongState(f"backup {backup.id} is {backup.state}", next="Choose another: hdcs backup list")
    for step in _live_steps(tx, "backup.prune_on_node"):
        if step.spec["vm_id"] == backup.vm_id:
            raise Conflict(
                f"the backups of VM {backup.vm_name} are being pruned (operation {step.operation_id})",
                next=f"Ask again when it has ended: hdcs op watch {step.operation_id}",
            )
    return backup


def _live_steps(tx: Tx, *names: str) -> Iterable[Step]:
    query = select(Step).join(Operation).where(Step.name.in_(names), Step.state.in_(STEP_LIVE))
    return tx.session.scalars(query.where(Operation.state.in_(OPERATION_LIVE)))


READERS = (
    "backup.fetch_on_node", "backup.extract_on_node", "backup.restore_on_node", "backup.restore_in_place_on_node",
    "backup.verify_on_node", "backup.delete_on_node",
)  # fmt: skip


def is_being_read(tx: Tx, vm_id: str) -> bool:
    """Whether a restore, verification or deletion of one of the VM's points is under way."""
    return any(step.spec["source_vm_id"] == vm_id for step in _live_steps(tx, *READERS))


@on_done("backup.create_on_node")
def _created(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    backup = get_backup(tx.session, operation.request["backup"])
    backup.checkpoint = result["checkpoint"]
    backup.manifest = result["manifest"]
    backup.file_bytes = result["file_bytes"]
    move(backup, BackupState.READY)


@on_failed("backup.create_on_node")
def _not_created(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    backup = tx.session.get(Backup, operation.request["backup"])
    if backup is None:
        return
    move(backup, BackupState.FAILED)
    if error.code == "backup_broken" and backup.kind == "increment" and not operation.cancel_asked:
        # A broken chain starts over with a full one by itself.
        _plan_step(tx, operation, vm_of(tx, operation), full=True)


def verify(control: Control, backup_id: str, asked: Asked, *, domain_node: str | None = None) -> Operation:
    """Check a point and every link below it against the hashes of their manifests; ``domain_node``: the copy there."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "backup.verify", backup_id, domain_node=domain_node)) is not None:
            return same
        backup = usable(tx, backup_id, BackupState.READY, BackupState.BROKEN)
        at = domain_node or backup.domain_node
        if at not in (backup.domain_node, *(copy.domain_node for copy in backup.copies)):
            raise NotFound(
                f"{at} has no copy of backup {backup.id}", next=f"hdcs backup copy {backup.id[:8]} --to {at}"
            )
        request = {"backup": backup.id, "at": at}
        operation = tx.open("backup.verify", asked=asked, subject=backup.id, request=request)
        tx.step(operation, "backup.verify_on_node", at, spec_of(backup) | CAN_BE_ASKED_AGAIN)
        return operation


def spec_of(backup: Backup) -> dict[str, Any]:
    """What a step needs to find a point."""
    return {
        "shown": {"vm": backup.vm_name, "point": backup.id[:8]}, "source_vm_id": backup.vm_id,
        "chain": backup.chain, "seq": backup.seq, "point": backup.id,
    }  # fmt: skip


@on_done("backup.verify_on_node")
def _verified(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    backup = tx.session.get(Backup, operation.request["backup"])
    if backup is None:
        return
    held = _held_at(backup, operation.request.get("at"))
    if isinstance(held, BackupCopy):
        held.verified_at = now()
    if held.state is BackupState.BROKEN:
        move(held, BackupState.READY)  # its storage was mended


@on_failed("backup.verify_on_node")
def _not_verified(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    found_broken(tx, operation, error)


def found_broken(tx: Tx, operation: Operation, error: HdcsError) -> None:
    """If that is what ended the operation, its point is recorded as broken."""
    backup = tx.session.get(Backup, operation.request["backup"])
    if backup is None or error.code != "backup_broken":
        return
    held = _held_at(backup, operation.request.get("at"))
    if held.state is BackupState.READY:
        move(held, BackupState.BROKEN)


def _held_at(backup: Backup, at: str | None) -> Backup | BackupCopy:
    """The record of the point as domain node ``at`` holds it; None: the first one."""
    return next((copy for copy in backup.copies if copy.domain_node == at), backup)


def delete(control: Control, backup_ids: str | Sequence[str], asked: Asked) -> Operation:
    """Delete points of one VM, in whatever order they are named: later ones first, or none of them.

    Raises WrongState (a later point that is not named builds on one), Conflict, NotFound, Invalid.
    """
    with control.transaction() as tx:
        wanted = [backup_ids] if isinstance(backup_ids, str) else backup_ids
        if (same := tx.same_request(asked, "backup.delete", " ".join(wanted))) is not None:
            return same
        rows = {(b := usable(tx, each, BackupState.READY, BackupState.BROKEN)).id: b for each in wanted}
        if len({b.vm_id for b in rows.values()}) != 1:
            raise Invalid("these are backups of several VMs, or none", next="Delete those of one VM at once")
        going = sorted(rows.values(), key=lambda b: (b.chain, -b.seq))
        for backup in going:
            _check_nothing_stays_on(tx, backup, rows)
        if is_being_read(tx, going[0].vm_id):
            raise Conflict(
                f"a backup of VM {going[0].vm_name} is being read right now",
                next="Ask again when it has ended: hdcs op list --live",
            )
        request = {"backup": going[0].id, "backups": [b.id for b in going], "was": {b.id: b.state.value for b in going}}
        for backup in going:
            move(backup, BackupState.DELETING)
        operation = tx.open("backup.delete", asked=asked, subject=going[0].id, request=request)
        _add_delete_step(tx, operation, going[0])
        return operation


def _add_delete_step(tx: Tx, operation: Operation, backup: Backup) -> None:
    tx.step(operation, "backup.delete_on_node", backup.domain_node, spec_of(backup) | CAN_BE_ASKED_AGAIN)


def _check_nothing_stays_on(tx: Tx, backup: Backup, going: Collection[str]) -> None:
    living = (BackupState.READY, BackupState.BROKEN, BackupState.CREATING)
    later = tx.session.scalar(
        select(Backup.id).where(Backup.parent_id == backup.id, Backup.state.in_(living), Backup.id.not_in(going))
    )
    if later:
        raise WrongState(f"backup {backup.id} is the base of {later}", next="Delete that, too: name both")


@on_done("backup.delete_on_node")
def _deleted(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    backup = tx.session.get_one(Backup, step.spec["point"])
    move(backup, BackupState.DELETED)
    left = _still_going(tx, operation)
    if left and not operation.cancel_asked:
        _add_delete_step(tx, operation, left[0])
        return
    _keep(operation, left)
    drop_copies(tx, backup.vm_id, backup.vm_name)


@on_failed("backup.delete_on_node")
def _not_deleted(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    left = _still_going(tx, operation)
    if left and error.code not in UNTOUCHED:
        move(left.pop(0), BackupState.BROKEN)  # its file may be gone, or half of the two
    _keep(operation, left)


UNTOUCHED = frozenset({Cancelled.code, Conflict.code})
"""Errors a deletion ends with before it has removed anything."""


def _still_going(tx: Tx, operation: Operation) -> list[Backup]:
    """Points of the operation that are not deleted yet, the one its step is about first."""
    rows = [tx.session.get_one(Backup, each) for each in operation.request["backups"]]
    return [b for b in rows if b.state is BackupState.DELETING]


def _keep(operation: Operation, points: Iterable[Backup]) -> None:
    for backup in points:
        move(backup, BackupState(operation.request["was"][backup.id]))


def list_backups(control: Control, vm: str | None = None, *, unproven: bool = False) -> list[dict[str, Any]]:
    """Views of every kept point, oldest first; of one VM by name or id (also of a VM that is gone).

    ``unproven``: only those no drill has brought up yet.
    """
    with control.store.read() as session:
        query = select(Backup).where(Backup.state.not_in(DEAD))
        if unproven:
            query = query.where(Backup.proven_at.is_(None))
        if vm is not None:
            query = query.where(of_vm(vm))
        return [view(backup) for backup in session.scalars(query.order_by(Backup.created_at))]


def of_vm(vm: str) -> ColumnElement[bool]:
    """Backups of the VM of this name or id; a VM that was renamed is known by its present name, too."""
    renamed = select(Vm.id).where(Vm.name == vm, Vm.deleted_at.is_(None))
    return (Backup.vm_name == vm) | (Backup.vm_id == vm) | Backup.vm_id.in_(renamed)


def show(control: Control, backup_id: str) -> dict[str, Any]:
    with control.store.read() as session:
        return view(get_backup(session, backup_id))


def view(backup: Backup) -> dict[str, Any]:
    keys = ("id", "vm_id", "vm_name", "domain_node", "chain", "seq", "kind", "parent_id", "file_bytes", "manifest")
    return {key: getattr(backup, key) for key in keys} | {
        "state": backup.state.value, "created_at": backup.created_at.isoformat(),
        "proven_at": backup.proven_at.isoformat() if backup.proven_at else None,
        "copies": [
            {"domain_node": c.domain_node, "state": c.state.value,
             "verified_at": c.verified_at.isoformat() if c.verified_at else None}
            for c in sorted(backup.copies, key=lambda c: c.domain_node)
        ],
    }  # fmt: skip
