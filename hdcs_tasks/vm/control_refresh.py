"""Refreshing on the control plane: a stopped VM follows to the published version of its image, with an empty disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select

from hdcs_tasks.errors import HdcsError, NotFound, WrongState
from hdcs_tasks.image.control_publish import versions
from hdcs_tasks.image.rules import DISPOSABLE
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.states import BackupState
from hdcs_tasks.store import metering
from hdcs_tasks.store.models import Backup, Image, Operation, Step, Vm
from hdcs_tasks.vm.control import check_given, get_vm, vm_of
from hdcs_tasks.vm.control_clone import promise_disk

PATIENCE_S = 60.0


def is_disposable(vm: Vm) -> bool:
    """Whether nobody will miss its disk: its profile said so when it was cloned, or its tag does."""
    return bool(vm.rules.get(DISPOSABLE)) or DISPOSABLE in vm.tags


def refresh(control: Control, name: str, asked: Asked, *, discard: bool = False) -> Operation:
    """Give a stopped VM an empty disk on the version of its image that clones take in its home. What it had written is
    gone; its name, MAC, port and backups stay. A VM that is not disposable needs ``discard``. Raises WrongState,
    NotFound, NoCapacity."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "vm.refresh", name, discard=discard)) is not None:
            return same
        vm, was, image = _check(tx, name)
        if not (discard or is_disposable(vm)):
            raise WrongState(
                f"a refresh discards the changes on the disk of VM {vm.name}, which is not disposable",
                next="Back it up or export it first; then say so with --yes (discard=True)",
            )
        disk_bytes = max(vm.disk_bytes, image.virtual_size_bytes or 0)
        request = {"image": image.id, "was": was.id, "disk_bytes": disk_bytes}
        operation = tx.open("vm.refresh", asked=asked, vm=vm, request=request)
        if disk_bytes != vm.disk_bytes:  # a larger image takes a larger share of the storage
            promise_disk(tx, vm.home, vm.id, disk_bytes, before=vm.disk_bytes)
        shown = f"{image.name}:{image.version}"
        spec = {
            "shown": {"vm": vm.name, "image": shown, "pool": vm.home}, "vm_id": vm.id, "name": vm.name,
            "image": image.name, "version": image.version, "disk_bytes": disk_bytes, "disk_key": vm.disk_key,
        }  # fmt: skip
        tx.step(operation, "vm.refresh_on_node", vm.home, spec, patience_s=PATIENCE_S)
        return operation


def plan(control: Control, name: str) -> dict[str, Any]:
    """What ``refresh`` would do: ``{name, domain_node, was, image, disposable, needs_yes}``."""
    with control.store.read() as session:
        vm, was, image = _check(Tx(session, control, []), name)
        return {
            "name": vm.name, "domain_node": vm.home, "was": f"{was.name}:{was.version}",
            "image": f"{image.name}:{image.version}", "disposable": is_disposable(vm),
            "needs_yes": not is_disposable(vm),
        }  # fmt: skip


def _check(tx: Tx, name: str) -> tuple[Vm, Image, Image]:
    """The VM, the image it stands on, and the one it would stand on."""
    vm = get_vm(tx.session, name)
    check_given(tx, vm, "refresh", "be refreshed")
    was = tx.session.get(Image, vm.image_id) if vm.image_id else None
    if was is None:
        raise WrongState(f"VM {vm.name} stands on no image", next="Clone a new one: hdcs vm clone")
    there: Mapping[str, Image] = versions(tx.session, was.name)
    if vm.home not in there:
        raise NotFound(
            f"no version of image {was.name} that clones take is ready on {vm.home}",
            next=f"Publish one there: hdcs image publish {was.name} VERSION --domain-node {vm.home}",
        )
    return vm, was, there[vm.home]


@on_done("vm.refresh_on_node")
def _refreshed(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    vm.image_id, vm.disk_bytes = operation.request["image"], operation.request["disk_bytes"]
    metering.changed(tx.session, vm)
    # The new disk has none of the bitmaps these points left behind: the next backup begins a new chain.
    ready = select(Backup).where(Backup.vm_id == vm.id, Backup.state == BackupState.READY)
    for backup in tx.session.scalars(ready):
        backup.checkpoint = None


@on_failed("vm.refresh_on_node")
def _not_refreshed(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    vm = vm_of(tx, operation)
    control, home, vm_id, disk_bytes = tx.control, vm.home, vm.id, vm.disk_bytes
    if operation.request["disk_bytes"] != disk_bytes:
        tx.after(lambda: control.reservations.disks.claim(home, vm_id, disk_bytes, 1 << 62))
