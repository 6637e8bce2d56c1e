"""Restoring on the control plane: as a new VM, or in place of a stopped VM's disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select

from hdcs_tasks.backup.control import found_broken, spec_of, usable
from hdcs_tasks.backup.control_copy import add_fetch_step, places_of
from hdcs_tasks.backup.rules import RESTORE_IN_PLACE_IN, lies_in, restore_in
from hdcs_tasks.errors import HdcsError, Invalid, NotFound, Unreachable, WrongState
from hdcs_tasks.image.control import missed, ready
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, plan_steps
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.pool import planning
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.routing import check_name
from hdcs_tasks.states import IN_POOL, BackupState, ImageState, VmState
from hdcs_tasks.store import metering
from hdcs_tasks.store.models import Backup, Image, ImageCopy, Operation, ServerNode, Step, Vm, new_id
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import add_start_step, get_vm, names_taken, vm_of
from hdcs_tasks.vm.control_clone import Shape, choose, choose_homes, new_vm, rooms_of
from hdcs_tasks.vm.control_delete import forget, forget_new
from hdcs_tasks.vm.control_quota import check_quota
from hdcs_tasks.vm.rules import expand_names

plan_steps("backup.restore", {"backup.restore_on_node|backup.restore_in_place_on_node": 90, "vm.start_on_node": 10})


def restore(
    control: Control, backup_id: str, asked: Asked, *, name: str | None = None, in_place: bool = False,
    domain_node: str | None = None, start: bool = True,
) -> Operation:  # fmt: skip
    """Restore a point as a new VM ``name`` of the same shape, or ``in_place`` as the disk of the VM it was taken of.

    ``domain_node``: where; what is not there is copied there first. By default layer one chooses: where the backup lies
    if a server node there fits, else where a good second copy does, else where it has to be copied to.
    """
    if in_place == (name is not None):
        raise Invalid("a restore makes a new VM or sets one back", next="Give a name, or ask for it in place")
    with control.transaction() as tx:
        words = {"name": name, "in_place": in_place, "domain_node": domain_node, "start": start}
        if (same := tx.same_request(asked, "backup.restore", backup_id, **words)) is not None:
            return same
        backup = usable(tx, backup_id, BackupState.READY, BackupState.BROKEN)
        if name is None:
            return _open_in_place(tx, backup, asked, start)
        at, decision = _place(tx, backup, domain_node), None
        if domain_node is None:
            at, decision = _where_it_fits(tx, backup, at)
        name = expand_names(name, 1, names_taken(tx.session))[0]
        operation = open_as_new(tx, "backup.restore", backup, name, asked, {"start": start}, *at)
        operation.decision = decision
        return operation


def _where_it_fits(tx: Tx, backup: Backup, first: tuple[str, bool]) -> tuple[tuple[str, bool], dict[str, Any] | None]:
    """Layer one for a restore, as ``_place`` tells it, and its decision; ``first`` where nothing fits, whose refusal
    tells why."""
    control, (shape, _, tags) = tx.control, _shape_of(backup)
    up = _up(tx)
    good = [place for place, state in places_of(backup).items() if state is BackupState.READY and place in up]
    for names, fetch in (good[:1], False), (good[1:], False), (sorted(up - set(good)), True):
        rooms = rooms_of(tx, [get_domain_node(tx.session, name) for name in names])
        choice = choose(control, rooms, shape, tags, 1)
        if choice.domain_node is not None:
            decision = planning.home_decision(choice, rooms, shape.wanted, control.settings.capacity)
            return (choice.domain_node, fetch), decision
    return first, None


def _up(tx: Tx) -> set[str]:
    """Domain nodes with a server node in its pool."""
    return set(tx.session.scalars(select(ServerNode.domain_node).where(ServerNode.state.in_(IN_POOL))))


def _place(tx: Tx, backup: Backup, wanted: str | None) -> tuple[str, bool]:
    """Where to restore, and whether the point must be copied there first."""
    if wanted is not None:
        get_domain_node(tx.session, wanted)
    places = places_of(backup)
    found = restore_in(places, _up(tx), wanted)
    if found is not None:
        return found
    if BackupState.READY not in places.values():
        raise WrongState(f"backup {backup.id} is {backup.state}", next="Choose another: hdcs backup list")
    if wanted is None and backup.domain_node in places and places[backup.domain_node] is BackupState.READY:
        return backup.domain_node, False  # it waits there for a server node
    raise Unreachable(
        f"no server node is up of {', '.join({*places, *([wanted] if wanted else [])})}", next="See: hdcs node list"
    )


def open_as_new(
    tx: Tx, kind: str, backup: Backup, name: str, asked: Asked, request: dict[str, Any], at: str | None = None,
    fetch: bool = False,
) -> Operation:  # fmt: skip
    """Open an operation whose first step makes a new VM's disk from ``backup`` in domain node ``at``; ``fetch``: after
    one that copies the point there."""
    at = at or backup.domain_node
    image, added = _image(tx, backup, at)
    counted = kind == "backup.restore"  # a drill's throwaway VM is nobody's
    vm = _new_vm(tx, backup, name, image, at, counted=counted, start=bool(request.get("start")))
    wanted = request | {"backup": backup.id, "at": at, "added_image": image.id if image and added else None}
    operation = tx.open(kind, asked=asked, vm=vm, request=wanted)
    spec = spec_of(backup) | {"shown": {"vm": name, "point": backup.id[:8]}, "vm_id": vm.id, "name": name}
    spec |= {"image": _shown(image), "compare": bool(request.get("compare")), "disk_key": vm.disk_key}
    spec |= CAN_BE_ASKED_AGAIN
    if fetch:
        operation.request = wanted | {"then": spec}
        add_fetch_step(tx, operation, backup, at)
    else:
        tx.step(operation, "backup.restore_on_node", at, spec)
    return operation


@on_done("backup.restore:backup.fetch_on_node")
def _brought(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    tx.step(operation, "backup.restore_on_node", operation.request["at"], operation.request["then"])


@on_failed("backup.restore:backup.fetch_on_node")
def _not_brought(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    _unsettle_image(tx, operation)
    forget(tx, vm_of(tx, operation))


def extract(control: Control, backup_id: str, name: str, asked: Asked, *, domain_node: str | None = None) -> Operation:
    """A point's disk alone, as the plain file ``import/<name>.qcow2`` of ``domain_node`` (by default where it lies): to
    be looked into, added as an image, or given to another VM."""
    check_name("file", name)
    with control.transaction() as tx:
        words = {"name": name, "domain_node": domain_node}
        if (same := tx.same_request(asked, "backup.extract", backup_id, **words)) is not None:
            return same
        backup = usable(tx, backup_id, BackupState.READY, BackupState.BROKEN)
        at, fetch = _place(tx, backup, domain_node)
        if fetch:
            raise WrongState(
                f"{at} has no copy of backup {backup.id}", next=f"Make one: hdcs backup copy {backup.id[:8]} --to {at}"
            )
        request = {"backup": backup.id, "at": at, "name": name}
        operation = tx.open("backup.extract", asked=asked, subject=backup.id, request=request)
        tx.step(operation, "backup.extract_on_node", at, spec_of(backup) | {"name": name} | CAN_BE_ASKED_AGAIN)
        return operation


@on_failed("backup.extract_on_node")
def _not_extracted(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    found_broken(tx, operation, error)


def _open_in_place(tx: Tx, backup: Backup, asked: Asked, start: bool) -> Operation:
    try:
        vm = get_vm(tx.session, backup.vm_id)
    except NotFound:
        raise NotFound(
            f"VM {backup.vm_name} of backup {backup.id} is gone", next="Restore it as a new VM: --name NAME"
        ) from None
    if vm.state not in RESTORE_IN_PLACE_IN:
        raise WrongState(f"VM {vm.name} is {vm.state}: its disk cannot be set back", next="Stop it first")
    if not lies_in(places_of(backup), vm.home):
        raise WrongState(
            f"VM {vm.name} lives in {vm.home}, and no good copy of backup {backup.id} lies there",
            next=f"Copy it there: hdcs backup copy {backup.id[:8]} --to {vm.home}; or make a new VM of it: --name NAME",
        )
    image, added = _image(tx, backup, vm.home)
    request = {
        "backup": backup.id, "at": vm.home, "start": start, "added_image": image.id if image and added else None,
        "image": image.id if image else None,
    }  # fmt: skip
    operation = tx.open("backup.restore", asked=asked, vm=vm, request=request)
    spec = spec_of(backup) | {"vm_id": vm.id, "name": vm.name, "image": _shown(image), "disk_key": vm.disk_key}
    tx.step(operation, "backup.restore_in_place_on_node", vm.home, spec)
    return operation


def _shown(image: Image | None) -> dict[str, Any] | None:
    return {"name": image.name, "version": image.version} if image else None


def _new_vm(tx: Tx, backup: Backup, name: str, image: Image | None, at: str, *, counted: bool, start: bool) -> Vm:
    shape, owner, tags = _shape_of(backup)
    if counted:
        check_quota(tx, owner, shape.amounts(1, start))
    row = get_domain_node(tx.session, at)
    home = choose_homes(tx.control, rooms_of(tx, [row]), shape, tags, 1)[0][0]
    return new_vm(tx, name, shape, home, image_id=image.id if image else None, owner=owner, tags=tags)


def _shape_of(backup: Backup) -> tuple[Shape, str, Sequence[str]]:
    """What the VM it was taken of was: shape, owner, tags."""
    manifest = backup.manifest or {}
    definition = manifest["definition"]
    disk_bytes = max(definition["disk_bytes"], manifest["disk_bytes"])
    shape = Shape(
        definition["profile"], definition["vcpus"], definition["memory_mib"], disk_bytes, definition.get("usb", "off"),
        disk_key=definition.get("disk_key", ""),
    )  # fmt: skip
    return shape, definition.get("owner", ""), definition.get("tags", ())


# --- the image below: by its hash


def _image(tx: Tx, backup: Backup, at: str) -> tuple[Image | None, bool]:
    """The image a point stands on, by hash, and whether its copy in the domain node is yet to be brought back."""
    base = (backup.manifest or {}).get("base")
    if base is None:
        return None, False
    image = _image_of_hash(tx, base)
    copy = tx.session.get(ImageCopy, (image.id, at))
    if copy is not None and copy.state is ImageState.READY:
        return image, False
    if copy is None:
        tx.session.add(ImageCopy(image_id=image.id, domain_node=at, state=ImageState.ADDING))
    elif copy.state in (ImageState.ADDING, ImageState.DELETING):
        raise WrongState(f"image {image.name}:{image.version} in {at} is {copy.state}", next="Ask again in a moment")
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
    return None if image_id is None else tx.session.get(ImageCopy, (image_id, operation.request["at"]))


def _settle_image(tx: Tx, operation: Operation, result: dict[str, Any]) -> None:
    copy = _added_copy(tx, operation)
    if copy is None:
        return
    copy.image.virtual_size_bytes = result["image"]["virtual_size_bytes"]
    ready(copy, result["image"]["file_bytes"])


def _unsettle_image(tx: Tx, operation: Operation) -> None:
    if (copy := _added_copy(tx, operation)) is not None:
        missed(copy)


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
    forget_new(tx, vm_of(tx, operation), error)


@on_done("backup.restore_in_place_on_node")
def _set_back(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    _settle_image(tx, operation, result)
    vm = vm_of(tx, operation)
    # It stands on what it stood on when the point was taken: the VM may have been refreshed since.
    vm.image_id, vm.disk_bytes = operation.request["image"], result["disk_bytes"]
    metering.changed(tx.session, vm)
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
