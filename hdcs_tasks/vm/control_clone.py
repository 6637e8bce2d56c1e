"""Cloning on the control plane: layer one chooses each new VM's domain node, then one child operation per VM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select

from hdcs_tasks.errors import Cancelled, HdcsError, Invalid, NoCapacity, NotFound
from hdcs_tasks.image.control_copy import bring, is_ready
from hdcs_tasks.image.control_publish import versions
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, plan_steps
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.pool import planning, weighing
from hdcs_tasks.pool import rules as pool_rules
from hdcs_tasks.pool.control import get_domain_node, get_server_node
from hdcs_tasks.pool.policy import VmPolicy, changed, check_tags, read
from hdcs_tasks.pool.profiles import get_profile
from hdcs_tasks.pool.rooms import candidate, disk_limit_bytes
from hdcs_tasks.pool.words import explain
from hdcs_tasks.states import ImageState, VmState
from hdcs_tasks.store.models import DomainNode, Image, Operation, Step, Vm, new_id
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import add_start_step, names_taken, vm_of
from hdcs_tasks.vm.control_delete import forget, forget_new
from hdcs_tasks.vm.control_quota import check_quota
from hdcs_tasks.vm.control_select import check_company, check_node_tags
from hdcs_tasks.vm.control_take import Wish, take
from hdcs_tasks.vm.control_warm_count import check_short
from hdcs_tasks.vm.quota_rules import Amounts
from hdcs_tasks.vm.rules import expand_names

plan_steps("vm.clone", {"vm.clone_on_node": 30, "vm.start_on_node": 70})


@dataclass(frozen=True)
class CloneRequest:
    """What to clone: ``count`` VMs of ``profile`` from ``image`` (name or name:version). ``rules``: fields of
    ``policy.VmPolicy`` that go before the profile's; ``warm``: take ready ones of a warm pool where there are any (they
    are started); ``warm_pool``: they are for this pool."""

    image: str
    name: str
    count: int = 1
    profile: str = "small"
    domain_node: str | None = None
    start: bool = False
    owner: str = ""
    tags: tuple[str, ...] = ()
    rules: Mapping[str, Any] = field(default_factory=dict)
    warm: bool = False
    warm_pool: str | None = None


@dataclass(frozen=True)
class Shape:
    """A profile as this clone needs it; ``rules``: what a VM keeps of ``policy.VmPolicy``."""

    profile: str
    vcpus: int
    memory_mib: int
    disk_bytes: int
    usb: str
    rules: Mapping[str, Any] = field(default_factory=dict)
    disk_key: str = ""

    @property
    def wanted(self) -> pool_rules.Shape:
        """What the scheduler judges by."""
        ruled = read(VmPolicy, self.rules)
        return pool_rules.Shape(
            self.vcpus, self.memory_mib, disk_bytes=self.disk_bytes, memory_overcommit=ruled.memory_overcommit,
            vcpu_overcommit=ruled.vcpu_overcommit,
        )  # fmt: skip

    def amounts(self, count: int, start: bool) -> Amounts:
        """What so many of it take of a quota."""
        running = count if start else 0
        return Amounts(count, running, running * self.vcpus, running * self.memory_mib, count * self.disk_bytes)

    def terms(self, tags: Sequence[str] = ()) -> pool_rules.Terms:
        ruled = read(VmPolicy, self.rules)
        return pool_rules.Terms(
            pin=ruled.pin, node_tags=ruled.node_tags, together=ruled.together, apart=ruled.apart, tags=tuple(tags)
        )


def clone(control: Control, request: CloneRequest, asked: Asked) -> Operation:
    """Open one operation per new VM (with a parent when there are several). Returns at once.

    Raises NotFound, Invalid, Conflict, or NoCapacity when no domain node has a server node that fits.
    """
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "vm.clone", request.name, **vars(request))) is not None:
            return same
        names, shape, images = checked(tx, request)
        if request.warm_pool is None:
            check_quota(tx, request.owner, shape.amounts(len(names), request.start or request.warm))
        if request.warm_pool is not None:
            check_short(tx, request.warm_pool, len(names))
        wish = warm_wish(request, shape, images)
        warm = take(tx, names, wish, owner=request.owner, rules=dict(shape.rules)) if request.warm else []
        cold = names[len(warm) :]
        homes: list[str] = []
        rooms: list[pool_rules.Candidate] = []
        choice = None
        if cold:
            rooms = clone_rooms(tx, request, shape, images)
            homes, choice = choose_homes(control, rooms, shape, request.tags, len(cold))
        parent = None
        if len(names) > 1:
            wanted = {"image": request.image, "count": len(names), "profile": shape.profile, "start": request.start}
            subject = f"{names[0]} … {names[-1]}"
            parent = tx.open("vm.clone_many", asked=asked, subject=subject, request=wanted | {"warm": len(warm)})
        opened = [_open_warm(tx, request, vm, pool, asked, parent) for vm, pool in warm]
        for name, home in zip(cold, homes, strict=True):
            opened.append(_clone_one(tx, request, name, shape, _image_for(images, home), home, asked, parent))
        for operation, (vm, pool) in zip(opened, warm, strict=False):
            if vm.state is VmState.RUNNING:
                # Not before the last child is there: a parent ends with the last of those it has.
                tx.finish(operation, {"node": vm.server_node, "port": vm.port, "ip": vm.ip, "warm_pool": pool})
        found = parent or opened[0]
        if choice is not None:
            found.decision = planning.home_decision(choice, rooms, shape.wanted, control.settings.capacity)
        return found


def warm_wish(request: CloneRequest, shape: Shape, images: Mapping[str, Image]) -> Wish:
    return Wish(images, shape.profile, request.domain_node, request.tags, ruled=bool(request.rules))


def _open_warm(tx: Tx, request: CloneRequest, vm: Vm, pool: str, asked: Asked, parent: Operation | None) -> Operation:
    """The operation of a clone that was taken from a warm pool; saved memory is started, one that runs is done."""
    wanted = {"image": vm.image_id, "start": True, "profile": vm.profile, "domain_node": request.domain_node,
              "warm_pool": pool}  # fmt: skip
    operation = tx.open("vm.clone", asked=asked, vm=vm, parent=parent, request=wanted)
    if vm.state is VmState.SAVED:
        add_start_step(tx, operation, vm)
    return operation


def checked(tx: Tx, request: CloneRequest) -> tuple[list[str], Shape, dict[str, Image]]:
    """Names, shape, and which version of the image each domain node has for them."""
    if not isinstance(request.count, int):
        raise Invalid(f"count {request.count!r} is not a number", next="Ask for 1 VM or more")
    names = expand_names(request.name, request.count, names_taken(tx.session))
    profile = get_profile(tx.session, request.profile)
    images = versions(tx.session, request.image)
    if request.domain_node is not None:
        get_domain_node(tx.session, request.domain_node)
    disk = max(profile.disk_bytes or 0, *(image.virtual_size_bytes or 0 for image in images.values()), 0)
    check_tags(request.tags)
    ruled = changed(VmPolicy, profile.rules, request.rules)
    check_node_tags(tx.session, request.rules.get("node_tags") or ())
    check_company(
        tx.session, request.rules.get("together") or (), request.rules.get("apart") or (), request.tags
    )  # fmt: skip
    if (pin := ruled.get("pin")) is not None:
        _check_pin(tx, request, pin)
    shape = Shape(profile.name, profile.vcpus, profile.memory_mib, disk, profile.usb, ruled, profile.disk_key)
    return names, shape, images


def _check_pin(tx: Tx, request: CloneRequest, pin: str) -> None:
    node = get_server_node(tx.session, pin)
    if request.domain_node not in (None, node.domain_node):
        raise Invalid(
            f"server node {pin} is of domain node {node.domain_node}, not of {request.domain_node}",
            next="See: hdcs node list",
        )


def clone_rooms(tx: Tx, request: CloneRequest, shape: Shape, images: Mapping[str, Image]) -> list[pool_rules.Candidate]:
    """The domain nodes this clone may go to, as they are now: those that have the image, and those it can be brought to
    (which layer one takes only where no other fits). NotFound where no domain node has it."""
    if not images:
        raise NotFound(
            f"image {request.image} is not ready on any domain node",
            next=f"Wait for it, or add it: hdcs image add {request.image.split(':')[0]} FILE",
        )
    query = select(DomainNode).order_by(DomainNode.name)
    if request.domain_node is not None:
        query = query.where(DomainNode.name == request.domain_node)
    rows = tx.session.scalars(query).all()
    return [room for row in rows for room in rooms_of(tx, [row], _image_for(images, row.name))]


def _image_for(images: Mapping[str, Image], home: str) -> Image:
    """The version clones take there: its own, or the newest of the others', which is brought."""
    return images.get(home) or max(images.values(), key=lambda image: image.version)


def rooms_of(tx: Tx, rows: Sequence[DomainNode], image: Image | None = None) -> list[pool_rules.Candidate]:
    """Candidates for a VM of this image (None: it needs none), without those it is just being deleted from."""
    deleting = {copy.domain_node for copy in image.copies if copy.state is ImageState.DELETING} if image else set()
    return [
        candidate(tx.control, tx.session, row, has_image=image is None or is_ready(image, row.name))
        for row in rows if row.name not in deleting
    ]  # fmt: skip


def choose(
    control: Control, rooms: Sequence[pool_rules.Candidate], shape: Shape, tags: Sequence[str], count: int
) -> pool_rules.Choice:
    request = pool_rules.HomeRequest(shape.wanted, count, exclude=_strangers(rooms, shape), terms=shape.terms(tags))
    return pool_rules.choose_domain_node(rooms, request, control.settings.capacity)


def _strangers(rooms: Sequence[pool_rules.Candidate], shape: Shape) -> tuple[str, ...]:
    """Domain nodes without the company this VM is to be kept together with, where another has it."""
    wanted = read(VmPolicy, shape.rules).together
    with_company = {
        room.domain_node for room in rooms if any(node.members.get(tag) for node in room.nodes for tag in wanted)
    }
    return tuple(room.domain_node for room in rooms if with_company and room.domain_node not in with_company)


def choose_homes(
    control: Control, rooms: Sequence[pool_rules.Candidate], shape: Shape, tags: Sequence[str], count: int
) -> tuple[list[str], pool_rules.Choice]:
    """Layer one for ``count`` equal VMs: each goes where a server node really fits, counting those just placed; and the
    choice made for the first. Raises NoCapacity naming every server node and why it was refused.
    """
    settings, terms = control.settings.capacity, shape.terms(tags)
    first = choice = choose(control, rooms, shape, tags, 1)
    homes: list[str] = []
    while len(homes) < count:
        if homes:
            choice = choose(control, rooms, shape, tags, 1)
        if choice.domain_node is None:
            raise _refused(
                explain(choice, shape.wanted, settings, shape.profile), choice, shape.profile, len(homes), count
            )
        homes.append(choice.domain_node)
        rooms = [
            weighing.with_one_more(room, shape.wanted, settings, terms) if room.domain_node == choice.domain_node
            else room for room in rooms
        ]  # fmt: skip
    return homes, first


def _refused(words: str, choice: pool_rules.Choice, profile: str, placed: int, count: int) -> NoCapacity:
    some = f" for all of {count} VMs ({placed} would fit)" if placed else ""
    return NoCapacity(
        words + some, next=f"See: hdcs pool capacity {profile}",
        details={"fit": placed, "asked": count, "domain_nodes": {v.domain_node: v.why for v in choice.verdicts}},
    )  # fmt: skip


def _clone_one(
    tx: Tx, request: CloneRequest, name: str, shape: Shape, image: Image, home: str, asked: Asked,
    parent: Operation | None,
) -> Operation:  # fmt: skip
    vm = new_vm(tx, name, shape, home, image_id=image.id, owner=request.owner, tags=request.tags)
    vm.warm_pool = request.warm_pool
    wanted = {
        "image": image.id,
        "start": request.start or request.warm,
        "profile": shape.profile,
        "domain_node": request.domain_node,
    }
    operation = tx.open("vm.clone", asked=asked, vm=vm, parent=parent, request=wanted)
    add_clone_step(tx, operation, vm, image)
    return operation


def add_clone_step(tx: Tx, operation: Operation, vm: Vm, image: Image) -> Step:
    """The clone at its home; an image that is not there is brought first (``_brought`` goes on)."""
    first = bring(tx, operation, image, vm.home)
    return first if first is not None else _add_clone_step(tx, operation, vm, image)


@on_done("vm.clone:image.copy_on_node")
def _brought(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    image = tx.session.get(Image, vm.image_id)
    if vm.state is not VmState.CREATING or image is None:
        return
    if operation.cancel_asked:
        forget(tx, vm)
        tx.fail(operation, Cancelled("cancelled before it was cloned"))
        return
    _add_clone_step(tx, operation, vm, image)


def _add_clone_step(tx: Tx, operation: Operation, vm: Vm, image: Image) -> Step:
    spec = {
        "shown": {"vm": vm.name, "image": f"{image.name}:{image.version}", "pool": vm.home}, "vm_id": vm.id,
        "name": vm.name, "image": image.name, "version": image.version, "image_id": image.id,
        "disk_bytes": vm.disk_bytes, "disk_key": vm.disk_key, **CAN_BE_ASKED_AGAIN,
    }  # fmt: skip
    return tx.step(operation, "vm.clone_on_node", vm.home, spec)


def new_vm(
    tx: Tx, name: str, shape: Shape, home: str, *, image_id: str | None, owner: str = "", tags: Sequence[str] = ()
) -> Vm:
    """A VM in state CREATING with its MAC and its share of the storage; both given back if the transaction fails."""
    control = tx.control
    vm = Vm(
        name=name, state=VmState.CREATING, home=home, image_id=image_id, profile=shape.profile, vcpus=shape.vcpus,
        memory_mib=shape.memory_mib, disk_bytes=shape.disk_bytes, usb=shape.usb, disk_key=shape.disk_key, mac="",
        owner=owner, tags=list(tags),
        rules=dict(shape.rules),
    )  # fmt: skip
    vm.id = vm_id = new_id()
    vm.mac = control.reservations.macs.take(vm_id)
    tx.undo(lambda: control.reservations.macs.release(vm_id))
    promise_disk(tx, home, vm_id, shape.disk_bytes)
    tx.session.add(vm)
    tx.session.flush()
    return vm


def promise_disk(tx: Tx, home: str, vm_id: str, disk_bytes: int, *, before: int = 0) -> None:
    """The VM's share of a domain node's storage; what it was ``before`` if the transaction fails. Raises NoCapacity."""
    disks = tx.control.reservations.disks
    disks.claim(home, vm_id, disk_bytes, disk_limit_bytes(tx.control, get_domain_node(tx.session, home)))
    tx.undo(lambda: disks.claim(home, vm_id, before, 1 << 62) if before else disks.release(home, vm_id))


@on_done("vm.clone_on_node")
def _cloned(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    vm = vm_of(tx, operation)
    if vm.state is VmState.CREATING:
        move(vm, VmState.STOPPED)
        if operation.request.get("start") and not operation.cancel_asked:
            add_start_step(tx, operation, vm)


@on_failed("vm.clone_on_node")
def _not_cloned(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    forget_new(tx, vm_of(tx, operation), error)


@on_failed("vm.clone:image.copy_on_node")
def _not_brought(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    forget(tx, vm_of(tx, operation))
