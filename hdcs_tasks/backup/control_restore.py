"""Restoring on the control plane: as a new VM, or in place of a stopped VM's disk."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select

from hdcs_tasks.backup.control import found_broken, spec_of, usable
from hdcs_tasks.backup.rules import RESTORE_IN_PLACE_IN
from hdcs_tasks.errors import HdcsError, Invalid, NotFound, WrongState
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, plan_steps
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.states import BackupState, ImageState, VmState
from hdcs_tasks.store.models import Backup, Image, ImageCopy, Operation, Step, Vm, new_id, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import add_start_step, forget, get_vm, vm_of
from hdcs_tasks.vm.control_clone import Shape, choose_homes, new_vm, rooms_of
from hdcs_tasks.vm.control_quota import check_quota
from hdcs_tasks.vm.rules import expand_names

plan_steps("backup.restore", {"backup.restore_on_node|backup.restore_in_place_on_node": 90, "vm.start_on_node": 10})


def restore(
    control: Control, backup_id: str, asked: Asked, *, name: str | None = None, in_place: bool = False,
    domain_node: str | None = None, start: bool = True,
) -> Operation:  # fmt: skip
    """Restore a point as a new VM ``name`` of the same shape, or ``in_place`` as the disk of the VM it was taken of.

    Both in the domain node that holds the backup. A VM has one disk, so in place is also how a single disk comes back.
    """
    if in_place == (name is not None):
        raise Invalid("a restore makes a new VM or sets one back", next="Give a name, or ask for it in place")
    with control.transaction() as tx:
        if (same := tx.same_request(asked)) is not None:
            return same
        backup = usable(tx, backup_id)
        if domain_node is not None and domain_node != backup.domain_node:
            raise WrongState(
                f"backup {backup.id} lies in {backup.domain_node}: restoring into {domain_node} is not built yet",
                next=f"Restore it in {backup.domain_node}, then migrate; or copy the repository and adopt it there",
            )
        if name is None:
            return _open_in_place(tx, backup, asked, start)
        taken = set(tx.session.scalars(select(Vm.name).where(Vm.deleted_at.is_(None))))
        return open_as_new(tx, "backup.restore", backup, expand_names(name, 1, taken)[0], asked, {"start": start})


def open_as_new(tx: Tx, kind: str, backup: Backup, name: str, asked: Asked, request: dict[str, Any]) -> Operation:
    """Open an operation whose first step makes a new VM's disk from ``backup``."""
    image, added = _image(tx, backup)
    counted = kind == "backup.restore"  # a drill's throwaway VM is nobody's
    vm = _new_vm(tx, backup, name, image, counted=counted, start=bool(request.get("start")))
    wanted = request | {"backup": backup.id, "added_image": image.id if image and added else None}
    operation = tx.open(kind, asked=asked, vm=vm, request=wanted)
    spec = spec_of(backup) | {"shown": {"vm": name, "point": backup.id[:8]}, "vm_id": vm.id, "name": name}
    spec |= {"disk_key": vm.disk_key}
    spec |= {"image": _shown(image), "compare": bool(request.get("compare"))}
    tx.step(operation, "backup.restore_on_node", backup.domain_node, spec)
    return operation


def _open_in_place(tx: Tx, backup: Backup, asked: Asked, start: bool) -> Operation:
    try:
        vm = get_vm(tx.session, backup.vm_id)
    except NotFound:
        raise NotFound(
            f"VM {backup.vm_name} of backup {backup.id} is gone", next="Restore it as a new VM: --name NAME"
        ) from None
    if vm.state not in RESTORE_IN_PLACE_IN:
        raise WrongState(f"VM {vm.name} is {vm.state}: its disk cannot be set back", next="Stop it first")
    if vm.home != backup.domain_node:
        raise WrongState(
            f"VM {vm.name} lives in {vm.home}, backup {backup.id} lies in {backup.domain_node}",
            next="Restore it as a new VM: --name NAME",
        )
    image, added = _image(tx, backup)
    request = {"backup": backup.id, "start": start, "added_image": image.id if image and added else None}
    operation = tx.open("backup.restore", asked=asked, vm=vm, request=request)
    spec = spec_of(backup) | {"vm_id": vm.id, "name": vm.name, "image": _shown(image), "disk_key": vm.disk_key}
    tx.step(operation, "backup.restore_in_place_on_node", backup.domain_node, spec)
    return operation


def _shown(image: Image | None) -> dict[str, Any] | None:
    return {"name": image.name, "version": image.version} if image else None


def _new_vm(tx: Tx, backup: Backup, name: str, image: Image | None, *, counted: bool, start: bool) -> Vm:
    manifest = backup.manifest or {}
    definition = manifest["definition"]
    disk_bytes = max(definition["disk_bytes"], manifest["disk_bytes"])
    shape = Shape(
        definition["profile"],
        definition["vcpus"],
        definition["memory_mib"],
        disk_bytes,
        definition.get("usb", "off"),
        disk_key=definition.get("disk_key", ""),
    )
    owner = definition.get("owner", "")
    if counted:
        check_quota(tx, owner, shape.amounts(1, start))
    row = get_domain_node(tx.session, backup.domain_node)
    tags = definition.get("tags", ())
    home = choose_homes(tx.control, rooms_of(tx, [row]), shape, tags, 1)[0][0]
    return new_vm(tx, name, shape, home, image_id=image.id if image else None, owner=owner, tags=tags)


# --- the image below: by its hash


def _image(tx: Tx, backup: Backup) -> tuple[Image | None, bool]:
    """The image a point stands on, by hash, and whether its copy in the domain node is yet to be brought back."""
    base = (backup.manifest or {}).get("base")
    if base is None:
        return None, False
    image = _image_of_hash(tx, base)
    copy = tx.session.get(ImageCopy, (image.id, backup.domain_node))
    if copy is not None and copy.state is ImageState.READY:
        return image, False
    if copy is None:
        tx.session.add(ImageCopy(image_id=image.id, domain_node=backup.domain_node, state=ImageState.ADDING))
    elif copy.state in (ImageState.ADDING, ImageState.DELETING):
        raise WrongState(
            f"image {image.name}:{image.version} in {backup.domain_node} is {copy.state}", next="Ask again in a moment"
        )
    else:
        move(copy, ImageState.ADDING)
    tx.session.flush()
    return image, True


def _image_of_hash(tx: Tx, base: dict[str, Any]) -> Image:
    """The living image with this hash; recorded anew if it is gone, with the next version if its own was taken."""
    living = select(Image).where(Image.deleted_at.is_(None))
    found = tx.session.scalars(living.where(Image.sha256 == base["sha256"]).order_by(Image.created_at)).first()
    if found is not None:
        return found
    version = int(base["version"])
    if tx.session.scalar(living.where(Image.name == base["name"], Image.version == version)) is not None:
        newest = select(func.max(Image.version)).where(Image.name == base["name"])
        version = (tx.session.scalar(newest) or 0) + 1
    made = Image(id=new_id(), name=base["name"], version=version, sha256=base["sha256"])
    tx.session.add(made)
    tx.session.flush()
    return made


def _added_copy(tx: Tx, operation: Operation) -> ImageCopy | None:
    image_id = operation.request.get("added_image")
    backup = tx.session.get(Backup, operation.request["backup"])
    if image_id is None or backup is None:
        return None
    return tx.session.get(ImageCopy, (image_id, backup.domain_node))


def _settle_image(tx: Tx, operation: Operation, result: dict[str, Any]) -> None:
    copy = _added_copy(tx, operation)
    if copy is None or copy.state is not ImageState.ADDING:
        return
    copy.image.virtual_size_bytes = result["image"]["virtual_size_bytes"]
    copy.file_bytes = result["image"]["file_bytes"]
    move(copy, ImageState.READY)


def _unsettle_image(tx: Tx, operation: Operation) -> None:
    copy = _added_copy(tx, operation)
    if copy is None or copy.state is not ImageState.ADDING:
        return
    move(copy, ImageState.FAILED)
    if all(c.state is ImageState.FAILED for c in copy.image.copies):
        copy.image.deleted_at = now()


# --- how it ends


@on_done("backup.restore_on_node")
def _restored(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    _settle_image(tx, operation, result)
    move(vm_of(tx, operation), VmState.STOPPED)


@on_done("backup.restore:backup.restore_on_node")
def _start_restored(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    if operation.request.get("start") and not operation.cancel_asked:
        add_start_step(tx, operation, vm_of(tx, operation))


@on_failed("backup.restore_on_node")
def _not_restored(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    _unsettle_image(tx, operation)
    found_broken(tx, operation, error)
    forget(tx, vm_of(tx, operation))


@on_done("backup.restore_in_place_on_node")
def _set_back(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    _settle_image(tx, operation, result)
    vm = vm_of(tx, operation)
    vm.disk_bytes = result["disk_bytes"]
    # The disk has none of the bitmaps these points left behind: the next backup begins a new chain.
    ready = select(Backup).where(Backup.vm_id == vm.id, Backup.state == BackupState.READY)
    for backup in tx.session.scalars(ready):
        backup.checkpoint = None
    if operation.request.get("start") and not operation.cancel_asked:
        add_start_step(tx, operation, vm)


@on_failed("backup.restore_in_place_on_node")
def _not_set_back(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    _unsettle_image(tx, operation)
    found_broken(tx, operation, error)
