"""Cloning on the control plane: layer one chooses each new VM's domain node, then one child operation per VM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import HdcsError, Invalid, NoCapacity, NotFound
from hdcs_tasks.image.control import get_image
from hdcs_tasks.operations.control import Asked, Control, Tx, on_done, on_failed
from hdcs_tasks.pool import rules as pool_rules
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.states import ImageState, VmState
from hdcs_tasks.store.models import DomainNode, Image, Operation, Profile, Step, Vm, new_id
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import add_start_step, forget, vm_of
from hdcs_tasks.vm.rules import expand_names


@dataclass(frozen=True)
class CloneRequest:
    """What to clone: ``count`` VMs of ``profile`` from ``image`` (name or name:version)."""

    image: str
    name: str
    count: int = 1
    profile: str = "small"
    domain_node: str | None = None
    start: bool = False
    owner: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """A profile as this clone needs it."""

    profile: str
    vcpus: int
    memory_mib: int
    disk_bytes: int
    usb: str


def get_profile(session: Session, name: str) -> Profile:
    found = session.get(Profile, name)
    if found is None:
        known = ", ".join(session.scalars(select(Profile.name).order_by(Profile.name)))
        raise NotFound(f"there is no profile {name!r}", next=f"Known: {known or 'none'}; see: hdcs profile list")
    return found


def clone(control: Control, request: CloneRequest, asked: Asked) -> Operation:
    """Open one operation per new VM (with a parent when there are several). Returns at once.

    Raises NotFound, Invalid, Conflict, or NoCapacity when no domain node has a server node that fits.
    """
    with control.transaction() as tx:
        if (same := tx.same_request(asked)) is not None:
            return same
        names, shape, image = _check(tx, request)
        candidates = _candidates(tx, request, image)
        homes = choose_homes(control, candidates, shape, len(names))
        if len(names) == 1:
            return _clone_one(tx, request, names[0], shape, image, homes[0], asked, parent=None)
        wanted = {"image": image.name, "count": len(names), "profile": shape.profile, "start": request.start}
        parent = tx.open("vm.clone_many", asked=asked, subject=f"{names[0]} … {names[-1]}", request=wanted)
        for name, home in zip(names, homes, strict=True):
            _clone_one(tx, request, name, shape, image, home, asked, parent)
        return parent


def plan_clone(control: Control, request: CloneRequest) -> dict[str, Any]:
    """What ``clone`` would do, and why or why not for every server node. Changes nothing."""
    with control.store.read() as session:
        tx = Tx(session, control, [])
        names, shape, image = _check(tx, request)
        candidates = _candidates(tx, request, image)
    try:
        homes = choose_homes(control, candidates, shape, len(names))
    except NoCapacity as error:
        return {"fits": False, "refusal": error.to_dict()}
    return {"fits": True, "vms": [{"name": n, "domain_node": h} for n, h in zip(names, homes, strict=True)]}


def _check(tx: Tx, request: CloneRequest) -> tuple[list[str], Shape, Image]:
    if not isinstance(request.count, int):
        raise Invalid(f"count {request.count!r} is not a number", next="Ask for 1 VM or more")
    taken = set(tx.session.scalars(select(Vm.name).where(Vm.deleted_at.is_(None))))
    names = expand_names(request.name, request.count, taken)
    profile = get_profile(tx.session, request.profile)
    image = get_image(tx.session, request.image)
    if request.domain_node is not None:
        get_domain_node(tx.session, request.domain_node)
    disk = max(profile.disk_bytes or 0, image.virtual_size_bytes or 0)
    return names, Shape(profile.name, profile.vcpus, profile.memory_mib, disk, profile.usb), image


def _candidates(tx: Tx, request: CloneRequest, image: Image) -> list[DomainNode]:
    ready = {copy.domain_node for copy in image.copies if copy.state is ImageState.READY}
    wanted = [request.domain_node] if request.domain_node else sorted(ready)
    missing = [name for name in wanted if name not in ready]
    if missing or not wanted:
        where = ", ".join(sorted(ready)) or "no domain node"
        raise NotFound(
            f"image {image.name} is not ready on {', '.join(missing) or 'any domain node'} (it is on {where})",
            next=f"Bring it there: hdcs image add {image.name} FILE --domain-node {(missing or ['…'])[0]}",
        )
    return list(tx.session.scalars(select(DomainNode).where(DomainNode.name.in_(wanted))))


def choose_homes(control: Control, candidates: Sequence[DomainNode], shape: Shape, count: int) -> list[str]:
    """Layer one for ``count`` equal VMs: each goes where a server node really fits, counting those just placed.

    Raises NoCapacity naming every server node and why it was refused.
    """
    settings = control.settings.capacity
    rooms = [_room(control, row) for row in candidates]
    wanted = pool_rules.Shape(shape.vcpus, shape.memory_mib, disk_bytes=shape.disk_bytes)
    homes: list[str] = []
    while len(homes) < count:
        choice = pool_rules.choose_domain_node(rooms, pool_rules.HomeRequest(wanted), settings)
        if choice.domain_node is None:
            raise _refused(choice, wanted, shape.profile, len(homes), count)
        homes.append(choice.domain_node)
        rooms = [pool_rules.with_one_more(room, wanted, settings) if room.domain_node == choice.domain_node else room
                 for room in rooms]  # fmt: skip
    return homes


def _refused(choice: pool_rules.Choice, wanted: pool_rules.Shape, profile: str, placed: int, count: int) -> NoCapacity:
    some = f" for all of {count} VMs ({placed} would fit)" if placed else ""
    return NoCapacity(
        pool_rules.explain(choice, wanted, profile) + some, next=f"See: hdcs pool capacity {profile}",
        details={"fit": placed, "asked": count, "domain_nodes": {v.domain_node: v.why for v in choice.verdicts}},
    )  # fmt: skip


def _room(control: Control, row: DomainNode) -> pool_rules.Candidate:
    """A domain node as layer one sees it now: what is free on its server nodes, of its ports and its storage."""
    limit = int((row.storage_total_bytes or 0) * control.settings.capacity.disk_overcommit)
    nodes = tuple(
        pool_rules.NodeRoom(
            v.name, pool_rules.Free(v.free_vcpus, v.free_memory_mib, ips=v.free_ips), v.vcpus, v.memory_mib,
            schedulable=v.schedulable, tags=v.tags,
        )
        for v in control.reservations.pool.nodes(row.name)
    )  # fmt: skip
    usage = control.reservations.ports.usage(row.name)
    free_disk = limit - control.reservations.disks.used(row.name)
    return pool_rules.Candidate(row.name, nodes, usage.free + usage.cooling, free_disk, has_image=True)


def _clone_one(
    tx: Tx, request: CloneRequest, name: str, shape: Shape, image: Image, home: str, asked: Asked,
    parent: Operation | None,
) -> Operation:  # fmt: skip
    vm = new_vm(tx, name, shape, home, image_id=image.id, owner=request.owner, tags=request.tags)
    wanted = {"image": image.id, "start": request.start, "profile": shape.profile}
    operation = tx.open("vm.clone", asked=asked, vm=vm, parent=parent, request=wanted)
    spec = {
        "shown": {"vm": name, "image": f"{image.name}:{image.version}", "pool": home}, "vm_id": vm.id, "name": name,
        "image": image.name, "version": image.version, "image_id": image.id, "disk_bytes": vm.disk_bytes,
    }  # fmt: skip
    tx.step(operation, "vm.clone_on_node", home, spec)
    return operation


def new_vm(
    tx: Tx, name: str, shape: Shape, home: str, *, image_id: str | None, owner: str = "", tags: Sequence[str] = ()
) -> Vm:
    """A VM in state CREATING with its MAC and its share of the storage; both given back if the transaction fails."""
    control = tx.control
    vm = Vm(
        name=name, state=VmState.CREATING, home=home, image_id=image_id, profile=shape.profile, vcpus=shape.vcpus,
        memory_mib=shape.memory_mib, disk_bytes=shape.disk_bytes, usb=shape.usb, mac="", owner=owner, tags=list(tags),
    )  # fmt: skip
    vm.id = vm_id = new_id()
    vm.mac = control.reservations.macs.take(vm_id)
    tx.undo(lambda: control.reservations.macs.release(vm_id))
    row = get_domain_node(tx.session, home)
    limit_bytes = int((row.storage_total_bytes or 0) * control.settings.capacity.disk_overcommit)
    control.reservations.disks.claim(home, vm_id, shape.disk_bytes, limit_bytes)
    tx.undo(lambda: control.reservations.disks.release(home, vm_id))
    tx.session.add(vm)
    tx.session.flush()
    return vm


@on_done("vm.clone_on_node")
def _cloned(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    if vm.state is VmState.CREATING:
        move(vm, VmState.STOPPED)
        if operation.request.get("start") and not operation.cancel_asked:
            add_start_step(tx, operation, vm)


@on_failed("vm.clone_on_node")
def _not_cloned(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    forget(tx, vm_of(tx, operation))
