"""Backups on the control plane: plan the next point of a chain, restore a point, list and delete."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.backup.rules import Point, next_point
from hdcs_tasks.errors import HdcsError, NotFound, WrongState
from hdcs_tasks.image.control import get_image
from hdcs_tasks.operations.control import Asked, Control, Tx, on_done, on_failed, on_start
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.states import BackupState, ImageState, VmState
from hdcs_tasks.store.models import Backup, Image, Operation, Step, Vm, new_id
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import add_start_step, check_given, forget, get_vm, guest_fields, vm_of
from hdcs_tasks.vm.control_clone import Shape, choose_homes, new_vm, rooms_of
from hdcs_tasks.vm.rules import expand_names


def create(control: Control, name: str, asked: Asked, *, full: bool = False) -> Operation:
    """Back up a VM: its own layer only; after the first, only what changed since the newest point."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked)) is not None:
            return same
        vm = get_vm(tx.session, name)
        check_given(tx, vm, "backup", "be backed up")
        return tx.open("backup.create", asked=asked, vm=vm, request={"full": full})


@on_start("backup.create")
def _begin(tx: Tx, operation: Operation) -> None:
    vm = vm_of(tx, operation)
    _plan_step(tx, operation, vm, full=bool(operation.request.get("full")))


def _plan_step(tx: Tx, operation: Operation, vm: Vm, *, full: bool) -> None:
    rows = _points(tx.session, vm.id)
    points = [Point(b.id, b.chain, b.seq, b.state, b.domain_node, b.checkpoint) for b in rows]
    plan = next_point(points, home=vm.home, full=full)
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
        "older_checkpoints": [b.checkpoint for b in rows if b.chain == backup.chain and b.checkpoint],
        "image": {"name": image.name, "version": image.version, "sha256": image.sha256} if image else None,
        "definition": guest_fields(vm) | {"profile": vm.profile, "disk_bytes": vm.disk_bytes, "owner": vm.owner},
    }  # fmt: skip
    tx.step(operation, "backup.create_on_node", vm.home, spec)


def _points(session: Session, vm_id: str) -> list[Backup]:
    dead = (BackupState.FAILED, BackupState.DELETED, BackupState.DELETING)
    query = select(Backup).where(Backup.vm_id == vm_id, Backup.state.not_in(dead)).order_by(Backup.created_at)
    return list(session.scalars(query))


def get_backup(session: Session, backup_id: str) -> Backup:
    """The backup of this id or unique id prefix (6 characters or more); else NotFound."""
    found = session.get(Backup, backup_id)
    if found is None and len(backup_id) >= 6:
        rows = session.scalars(select(Backup).where(Backup.id.startswith(backup_id, autoescape=True))).all()
        found = rows[0] if len(rows) == 1 else None
    if found is None or found.state in (BackupState.FAILED, BackupState.DELETED):
        raise NotFound(f"there is no backup {backup_id!r}", next="See: hdcs backup list")
    return found


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


def restore(
    control: Control, backup_id: str, asked: Asked, *, name: str, domain_node: str | None = None, start: bool = True
) -> Operation:
    """Restore a point as a new VM of the same shape, in the domain node that holds the backup."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked)) is not None:
            return same
        backup = get_backup(tx.session, backup_id)
        if backup.state is not BackupState.READY:
            raise WrongState(f"backup {backup.id} is {backup.state}", next="Choose another: hdcs backup list")
        if domain_node is not None and domain_node != backup.domain_node:
            raise WrongState(
                f"backup {backup.id} lies in {backup.domain_node}: restoring into {domain_node} is not built yet",
                next=f"Restore it in {backup.domain_node}",
            )
        taken = set(tx.session.scalars(select(Vm.name).where(Vm.deleted_at.is_(None))))
        vm = _vm_for(tx, backup, expand_names(name, 1, taken)[0])
        operation = tx.open("backup.restore", asked=asked, vm=vm, request={"backup": backup.id, "start": start})
        _restore_step(tx, operation, vm, backup)
        return operation


def _vm_for(tx: Tx, backup: Backup, name: str) -> Vm:
    manifest = backup.manifest or {}
    definition = manifest.get("definition") or {}
    image_id = _image_id(tx, backup, manifest)
    shape = Shape(
        definition["profile"], definition["vcpus"], definition["memory_mib"], definition["disk_bytes"],
        definition.get("usb", "off"),
    )  # fmt: skip
    row = get_domain_node(tx.session, backup.domain_node)
    home = choose_homes(tx.control, rooms_of(tx, [row]), shape, (), 1)[0][0]
    return new_vm(tx, name, shape, home, image_id=image_id, owner=definition.get("owner", ""))


def _image_id(tx: Tx, backup: Backup, manifest: dict[str, Any]) -> str | None:
    base = manifest.get("image")
    if not base:
        return None
    image = get_image(tx.session, f"{base['name']}:{base['version']}")
    if not any(c.domain_node == backup.domain_node and c.state is ImageState.READY for c in image.copies):
        raise NotFound(
            f"base image {base['name']}:{base['version']} is not in {backup.domain_node}",
            next=f"Bring it back first: hdcs image add {base['name']} FILE --domain-node {backup.domain_node}",
        )
    return image.id


def _restore_step(tx: Tx, operation: Operation, vm: Vm, backup: Backup) -> None:
    spec = {
        "shown": {"vm": vm.name, "point": backup.id[:8]}, "vm_id": vm.id, "name": vm.name, "point": backup.id,
        "source_vm_id": backup.vm_id, "chain": backup.chain, "seq": backup.seq,
    }  # fmt: skip
    tx.step(operation, "backup.restore_on_node", backup.domain_node, spec)


@on_done("backup.restore_on_node")
def _restored(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    move(vm, VmState.STOPPED)
    if operation.request.get("start") and not operation.cancel_asked:
        add_start_step(tx, operation, vm)


@on_failed("backup.restore_on_node")
def _not_restored(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    forget(tx, vm_of(tx, operation))


def verify(control: Control, backup_id: str, asked: Asked) -> Operation:
    """Check a point and every link below it against the hashes of their manifests."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked)) is not None:
            return same
        backup = get_backup(tx.session, backup_id)
        operation = tx.open("backup.verify", asked=asked, subject=backup.id, request={"backup": backup.id})
        spec = {
            "shown": {"vm": backup.vm_name, "point": backup.id[:8]}, "source_vm_id": backup.vm_id,
            "chain": backup.chain, "seq": backup.seq, "point": backup.id,
        }  # fmt: skip
        tx.step(operation, "backup.verify_on_node", backup.domain_node, spec)
        return operation


@on_failed("backup.verify_on_node")
def _not_verified(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    backup = tx.session.get(Backup, operation.request["backup"])
    if backup is not None and error.code == "backup_broken" and backup.state is BackupState.READY:
        move(backup, BackupState.BROKEN)


def delete(control: Control, backup_id: str, asked: Asked) -> Operation:
    """Delete a point that no later point builds on."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked)) is not None:
            return same
        backup = get_backup(tx.session, backup_id)
        living = (BackupState.READY, BackupState.BROKEN, BackupState.CREATING)
        later = tx.session.scalar(select(Backup.id).where(Backup.parent_id == backup.id, Backup.state.in_(living)))
        if later:
            raise WrongState(f"backup {backup.id} is the base of {later}", next="Delete the later points first")
        move(backup, BackupState.DELETING)
        operation = tx.open("backup.delete", asked=asked, subject=backup.id, request={"backup": backup.id})
        spec = {
            "shown": {"vm": backup.vm_name, "point": backup.id[:8]}, "source_vm_id": backup.vm_id,
            "chain": backup.chain, "seq": backup.seq, "point": backup.id,
        }  # fmt: skip
        tx.step(operation, "backup.delete_on_node", backup.domain_node, spec)
        return operation


@on_done("backup.delete_on_node")
def _deleted(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    backup = tx.session.get(Backup, operation.request["backup"])
    if backup is not None:
        move(backup, BackupState.DELETED)


@on_failed("backup.delete_on_node")
def _not_deleted(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    backup = tx.session.get(Backup, operation.request["backup"])
    if backup is not None:
        move(backup, BackupState.BROKEN)


def list_backups(control: Control, vm: str | None = None) -> list[dict[str, Any]]:
    """Views of every kept point, oldest first; of one VM by name or id (also of a VM that is gone)."""
    with control.store.read() as session:
        query = select(Backup).where(Backup.state.not_in((BackupState.FAILED, BackupState.DELETED)))
        if vm is not None:
            query = query.where((Backup.vm_name == vm) | (Backup.vm_id == vm))
        return [view(backup) for backup in session.scalars(query.order_by(Backup.created_at))]


def show(control: Control, backup_id: str) -> dict[str, Any]:
    with control.store.read() as session:
        return view(get_backup(session, backup_id))


def view(backup: Backup) -> dict[str, Any]:
    keys = ("id", "vm_id", "vm_name", "domain_node", "chain", "seq", "kind", "parent_id", "file_bytes", "manifest")
    return {key: getattr(backup, key) for key in keys} | {
        "state": backup.state.value, "created_at": backup.created_at.isoformat(),
        "proven_at": backup.proven_at.isoformat() if backup.proven_at else None,
    }  # fmt: skip
