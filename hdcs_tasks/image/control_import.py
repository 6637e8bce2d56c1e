"""Images from elsewhere, on the control plane: which domain node takes one, and what the record says of it.

    image.import_on_node          the file becomes an image in one domain node's storage
    image.copy_on_node            … and is copied to the others that were named, one after the other

Named no domain node, layer one ranks them (``rules.judge_pools``). A file's name in ``import/`` is one storage's, and
control does not see files: where the best domain node has no such file, or no room, the next is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Conflict, HdcsError, Invalid, NotFound, Unreachable
from hdcs_tasks.image import control_copy, rules
from hdcs_tasks.image.control import came, missed
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, on_no_room, plan_steps
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.pool import profiles
from hdcs_tasks.pool.control import get_domain_node, get_server_node
from hdcs_tasks.routing import check_name, direct_queue
from hdcs_tasks.states import IN_POOL, ImageState
from hdcs_tasks.store.models import DomainNode, Image, ImageCopy, Operation, Profile, ServerNode, Step, new_id

plan_steps("image.import", {"image.import_on_node": 80, "image.copy_on_node": 20})
PATIENCE_S = 60.0
"""How long an import waits for a storage that is too full."""


@dataclass(frozen=True)
class ImportRequest:
    """What to import as ``name``: ``path`` in the storage's import/ folder, on the server nodes, or a block device of
    ``node``. ``format``: None: by its header. ``disk``: which of an OVA's. ``drivers``: virt-v2v puts in drivers.
    ``profile``: make this profile out of the machine's shape, which an OVA alone tells. ``domain_nodes``: where; none:
    layer one chooses."""

    name: str
    path: str
    format: str | None = None
    disk: int | None = None
    drivers: bool = False
    profile: str | None = None
    domain_nodes: tuple[str, ...] = ()
    node: str | None = None


def import_(control: Control, request: ImportRequest, asked: Asked) -> Operation:
    """Open the import. Raises Invalid, NotFound, Conflict (the profile exists), Unreachable, NoCapacity."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "image.import", request.name, **vars(request))) is not None:
            return same
        homes, copies_to = _check(tx.session, request)
        image = Image(id=new_id(), name=request.name, version=next_version(tx.session, request.name))
        tx.session.add(image)
        tx.session.flush()
        wanted = asdict(request) | {"image": image.id, "domain_nodes": list(request.domain_nodes)}
        operation = tx.open("image.import", asked=asked, subject=f"{image.name}:{image.version}", request=wanted)
        _to_home(tx, operation, image, homes, copies_to)
        return operation


def plan(control: Control, request: ImportRequest) -> dict[str, Any]:
    """What ``import_`` would do, from the record alone: ``{name, version, domain_node, copies_to, domain_nodes}``."""
    with control.store.read() as session:
        homes, copies_to = _check(session, request)
        verdicts = rules.judge_pools(_pools(session))
        return {
            "name": request.name, "version": next_version(session, request.name), "domain_node": homes[0],
            "copies_to": copies_to, "domain_nodes": [asdict(verdict) for verdict in verdicts],
        }  # fmt: skip


def probe(control: Control, request: ImportRequest, asked: Asked) -> Operation:
    """Have a server node look at what is to be imported; its result tells format, sizes and shape. Changes nothing."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "image.probe", request.path, **vars(request))) is not None:
            return same
        homes, _ = _check(tx.session, request)
        operation = tx.open(
            "image.probe", asked=asked, subject=request.path, request=asdict(request) | {"rest": homes[1:]}
        )
        _probe_at(tx, operation, homes[0])
        return operation


def next_version(session: Session, name: str) -> int:
    """A version that never became ready is free again; one that did is named by backups for ever."""
    used = (Image.name == name) & (Image.deleted_at.is_(None) | Image.sha256.is_not(None))
    return 1 + (session.scalar(select(func.max(Image.version)).where(used)) or 0)


def _check(session: Session, request: ImportRequest) -> tuple[list[str], list[str]]:
    """Domain nodes to try in order, and those it is copied to afterwards."""
    check_name("image", request.name)
    fmt = rules.source_format(request.format, request.path)
    if request.disk is not None and request.disk < 1:
        raise Invalid(f"disk {request.disk} is not counted from 1", next="As in --disk 1")
    if request.profile is not None:
        check_name("profile", request.profile)
        if fmt != "ova":
            raise Invalid(
                f"profile {request.profile} cannot be made of {request.path}: a disk does not say what machine it was "
                "part of, only an OVA does",
                next=f"Leave --profile out, then: hdcs profile create {request.profile} --vcpus N --memory SIZE",
            )
        if session.get(Profile, request.profile) is not None:
            raise Conflict(f"there is a profile {request.profile} already", next="See: hdcs profile list")
    for name in request.domain_nodes:
        get_domain_node(session, name)
    place = rules.place_of(request.path)
    if request.node is not None:
        return _of_node(session, request, request.node)
    if place is rules.Place.DEVICE:
        raise Invalid(f"{request.path} is a device: of which server node?", next="Name the one it is at: --node NODE")
    if request.domain_nodes:
        first, *others = dict.fromkeys(request.domain_nodes)
        return [first], others
    return rules.homes(rules.judge_pools(_pools(session))), []


def _of_node(session: Session, request: ImportRequest, name: str) -> tuple[list[str], list[str]]:
    home = living_node(session, name).domain_node
    if request.domain_nodes and home not in request.domain_nodes:
        raise Invalid(
            f"server node {name} is of domain node {home}, which is not named",
            next=f"Add --domain-node {home}: the image lies there first",
        )
    return [home], [other for other in dict.fromkeys(request.domain_nodes) if other != home]


def living_node(session: Session, name: str) -> ServerNode:
    """The server node of this name; Unreachable where it is not up."""
    node = get_server_node(session, name)
    if node.state not in IN_POOL:
        raise Unreachable(f"server node {name} is {node.state}", next="Bring it back, or name another: hdcs node list")
    return node


def _pools(session: Session) -> list[rules.Pool]:
    query = select(ServerNode.domain_node, func.count()).where(ServerNode.state.in_(IN_POOL))
    living: dict[str, int] = {name: count for name, count in session.execute(query.group_by(ServerNode.domain_node))}
    rows = session.scalars(select(DomainNode).order_by(DomainNode.name))
    return [rules.Pool(row.name, row.storage_free_bytes, living.get(row.name, 0)) for row in rows]


def _to_home(tx: Tx, operation: Operation, image: Image, homes: Sequence[str], copies_to: Sequence[str]) -> None:
    home = homes[0]
    tx.session.add(ImageCopy(image_id=image.id, domain_node=home, state=ImageState.ADDING))
    tx.session.flush()
    operation.request = operation.request | {
        "domain_node": home, "rest": list(homes[1:]), "copies_to": list(copies_to)
    }  # fmt: skip
    spec = _spec(operation.request, home) | {"image": image.name, "version": image.version, "image_id": image.id}
    spec["shown"] = {"image": f"{image.name}:{image.version}", "from": operation.request["path"], "pool": home}
    tx.step(operation, "image.import_on_node", _queue(operation.request, home), spec, patience_s=PATIENCE_S)


def _probe_at(tx: Tx, operation: Operation, home: str) -> None:
    spec = _spec(operation.request, home)
    tx.step(operation, "image.probe_on_node", _queue(operation.request, home), spec, patience_s=PATIENCE_S)


def _spec(request: dict[str, Any], home: str) -> dict[str, Any]:
    return {
        "shown": {"from": request["path"], "pool": home}, "path": request["path"], "disk": request["disk"],
        "format": rules.source_format(request["format"], request["path"]), "drivers": request["drivers"],
        "domain_node": home, **CAN_BE_ASKED_AGAIN,
    }  # fmt: skip


def _queue(request: dict[str, Any], home: str) -> str:
    return direct_queue(home, request["node"]) if request["node"] else home


# --- how it ends


def _row(tx: Tx, step: Step) -> ImageCopy | None:
    return tx.session.get(ImageCopy, (step.spec["image_id"], step.spec["domain_node"]))


@on_done("image.import_on_node")
def _imported(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    row = _row(tx, step)
    if row is None:
        tx.fail(operation, NotFound(f"operation {operation.id} has no image copy"))
        return
    if not came(tx, operation, row, result):
        return
    image = row.image
    image.shape = result["shape"]
    result["profile"] = _profile(tx, operation, image)
    operation.request = operation.request | {"imported": result}
    _copy_on(tx, operation, image)


def _profile(tx: Tx, operation: Operation, image: Image) -> dict[str, Any] | None:
    """The profile the machine's shape makes; recorded where one was asked for."""
    if not image.shape:
        return None
    offered = {
        "name": operation.request["profile"], "vcpus": image.shape["vcpus"],
        "memory_mib": max(profiles.MEMORY_MIN_MIB, image.shape["memory_mib"]),
        "disk_bytes": image.virtual_size_bytes,
    }  # fmt: skip
    if offered["name"] and tx.session.get(Profile, offered["name"]) is None:
        tx.session.add(Profile(**offered))
    return offered


def _copy_on(tx: Tx, operation: Operation, image: Image) -> None:
    """The next domain node that was named gets its copy; after the last the operation ends with the import's result."""
    waiting = list(operation.request["copies_to"])
    while waiting and not operation.cancel_asked:
        to = waiting.pop(0)
        operation.request = operation.request | {"copies_to": waiting}
        try:
            if control_copy.bring(tx, operation, image, to) is not None:
                return
        except HdcsError as error:
            tx.fail(operation, error)
            return
    tx.finish(operation, operation.request["imported"])


@on_done("image.import:image.copy_on_node")
def _copied(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    _copy_on(tx, operation, tx.session.get_one(Image, step.spec["image_id"]))


@on_failed("image.import_on_node")
def _not_imported(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    if isinstance(error, NotFound) and _elsewhere(tx, operation, step, error):
        return
    _give_up(tx, step)


@on_no_room("image.import_on_node")
def _elsewhere(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> bool:
    rest = operation.request["rest"]
    if not rest or operation.cancel_asked:
        return False
    image = _give_up(tx, step)
    if image is None:
        return False
    image.deleted_at = None
    row = _row(tx, step)
    if row is not None:
        tx.session.delete(row)  # nothing of it is there, nor was it asked for there
    _to_home(tx, operation, image, rest, operation.request["copies_to"])
    return True


def _give_up(tx: Tx, step: Step) -> Image | None:
    row = _row(tx, step)
    if row is None or row.state is not ImageState.ADDING:
        return None
    missed(row)
    return row.image


@on_failed("image.probe_on_node")
def _not_probed(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    rest = list(operation.request["rest"])
    if isinstance(error, NotFound) and rest and not operation.cancel_asked:
        operation.request = operation.request | {"rest": rest[1:]}
        _probe_at(tx, operation, rest[0])
