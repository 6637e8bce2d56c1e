"""Moves between domain nodes on the control plane: what a live move needs beside its steps in ``control_migrate.py``.

the image is brought there, if it is not (once) → prepare → perform → finish → clean

The promise of storage at the target is made before anything travels, and given back at the source when its files are
gone. The VM's home, its server node, port and IP change in one transaction, when libvirt has handed the guest over.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from hdcs_tasks.errors import NotFound, WrongState
from hdcs_tasks.image.control_copy import bring
from hdcs_tasks.operations.control import Tx
from hdcs_tasks.pool.rooms import vm_terms
from hdcs_tasks.states import IN_POOL, VmState
from hdcs_tasks.store.models import Image, Operation, ServerNode, Step, Vm
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import placing_fields, vm_of, wake_others
from hdcs_tasks.vm.control_clone import promise_disk
from hdcs_tasks.vm.control_left import clean_later
from hdcs_tasks.vm.move_rules import ALIVE

PATIENCE_S = 30.0
"""A VM that cannot move runs on where it is, so a migration does not wait for room as long as a start does."""

PREPARED_WITHIN_S = 60.0
"""An attempt to prepare a target takes seconds; one that hangs (on its storage, say) gives its lease up after this."""


def is_between(operation: Operation) -> bool:
    """Whether the move leads to another domain node."""
    return bool(operation.request["domain_node"] != operation.request["home"])


def target_home(operation: Operation) -> str:
    return str(operation.request["domain_node"])


def state_before(operation: Operation) -> VmState:
    return VmState(operation.request["was"])


def move_spec(operation: Operation, vm: Vm) -> dict[str, Any]:
    """What every step of a live move needs to know. It is given up if its server node is lost."""
    return {
        "vm_id": vm.id, "name": vm.name, "mac": vm.mac, "home": operation.request["home"],
        "disk_key": vm.disk_key,
        "was": operation.request["was"], "options": operation.request["options"],
        "source": {"name": operation.request["source"], "ip": operation.request["source_ip"]},
        "ends_with_its_node": True,
    }  # fmt: skip


def image_of(tx: Tx, vm: Vm) -> Image | None:
    """The image the VM's disk stands on."""
    if vm.image_id is None:
        return None
    image = tx.session.get(Image, vm.image_id)
    if image is None or image.deleted_at is not None:
        raise NotFound(f"the image VM {vm.name} stands on is not recorded any more", next="Add it again")
    return image


# --- how it begins


def begin(tx: Tx, operation: Operation) -> None:
    """A live move: the image first, if the target's storage lacks it."""
    vm = vm_of(tx, operation)
    promise_disk(tx, target_home(operation), vm.id, vm.disk_bytes)
    move(vm, VmState.MIGRATING)
    image = image_of(tx, vm)
    if image is None or bring(tx, operation, image, target_home(operation)) is None:
        prepare(tx, operation, vm)


def prepare(tx: Tx, operation: Operation, vm: Vm) -> None:
    """Add the step that makes room at the target."""
    image = image_of(tx, vm)
    home, pin = target_home(operation), operation.request["pin"]
    terms = vm_terms(vm, pin=pin, pinned=False, start=False)
    spec = move_spec(operation, vm) | placing_fields(tx, vm, terms, home) | {"within_s": PREPARED_WITHIN_S}
    spec["image"] = {"name": image.name, "version": image.version} if image is not None else None
    spec["shown"] = {"vm": vm.name, "from": operation.request["source"], "to": pin or home}
    tx.step(operation, "vm.move_prepare_on_node", home, spec, patience_s=PATIENCE_S)


# --- what changes owner


def change_home(tx: Tx, operation: Operation, vm: Vm) -> None:
    """The VM's files and reservations are in its new domain node now."""
    target = operation.request.get("target", {})
    control, old, vm_id = tx.control, vm.home, vm.id
    vm.home, vm.port = target_home(operation), target.get("port")
    if vm.rules.get("pin"):
        # It names a server node of the old domain node: nothing could start here.
        vm.rules = {rule: value for rule, value in vm.rules.items() if rule != "pin"}
    tx.event("vm.moved", vm.name, f"VM {vm.name} lives in {vm.home} now", was=old)
    tx.after(lambda: control.reservations.marks.forget(old, vm_id))


def give_back_source(tx: Tx, operation: Operation, vm: Vm) -> None:
    """Its files are gone from the old storage: promise and port are free there."""
    control, old, vm_id = tx.control, operation.request["home"], vm.id
    tx.after(lambda: control.reservations.disks.release(old, vm_id))
    tx.after(lambda: control.reservations.ports.cool(old, vm_id, control.settings.port_cooling_s))


def give_back_target(tx: Tx, operation: Operation, vm: Vm) -> None:
    """The move did not happen: so it is with the storage promised at the target."""
    control, new, vm_id = tx.control, target_home(operation), vm.id
    tx.after(lambda: control.reservations.disks.release(new, vm_id))


def give_back_claim(tx: Tx, operation: Operation, home: str, node: str) -> None:
    """What the VM held on a server node that is lost, and on which its guest is not."""
    control, vm_id = tx.control, operation.vm_id or ""
    cooling_s = None if home == vm_of(tx, operation).home else control.settings.port_cooling_s
    lease_s = control.settings.dhcp_lease_s
    tx.after(lambda: control.reservations.pool.release(home, vm_id, node, lease_s, cooling_s))


def discard(tx: Tx, operation: Operation, home: str) -> Step | None:
    """Let any server node of ``home`` remove the VM's files there: it is not there (any more). None where none is up:
    an event tells what stays there, and an operation of its own removes it when one is back."""
    vm = vm_of(tx, operation)
    if home == vm.home:
        raise WrongState(f"VM {vm.name} lives in {home}: its files stay there", next="See: hdcs vm show")
    up = select(ServerNode.name).where(ServerNode.domain_node == home, ServerNode.state.in_(IN_POOL)).limit(1)
    if tx.session.scalar(up) is None:
        tx.event("vm.disk_left", vm.name, f"no server node of {home} is up to remove the files of VM {vm.name} there",
                 home=home)  # fmt: skip
        clean_later(tx, vm, home)
        return None
    spec = {
        "shown": {"vm": vm.name, "pool": home}, "vm_id": vm.id, "name": vm.name, "home": home, "binding": True,
        "ends_with_its_node": True,
    }  # fmt: skip
    return tx.step(operation, "vm.discard_on_node", home, spec, patience_s=PATIENCE_S)


def ends_of(operation: Operation, vm: Vm) -> dict[str, Any]:
    """Where the VM came from and to, as of now: it may go on before its move is cleaned up after."""
    came_from = operation.request["source"] or operation.request["home"]
    return {"from": came_from, "to": vm.server_node or vm.home, "ip": vm.ip, "port": vm.port}


def finish(tx: Tx, operation: Operation, measured: dict[str, Any]) -> None:
    """End the operation as done, with what was measured; what the next backup will be, where that has changed."""
    told: dict[str, Any] = {"moved": True, "way": operation.request["way"]}
    if is_between(operation):
        told |= {
            "domain_node": target_home(operation), "image_bytes": operation.request.get("image_bytes", 0),
            "next_backup": "full",
        }  # fmt: skip
        if (named := operation.request["pin"]) is not None and state_before(operation) not in ALIVE:
            told["why"] = f"it does not run: it starts on any server node of {target_home(operation)}, not just {named}"
    tx.finish(operation, measured | operation.request["ends"] | told)
    for home in {target_home(operation), operation.request["home"]}:
        wake_others(tx, home)
