"""Images on the control plane: adding a golden image to the storage of domain nodes, listing, deleting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import delete as sql_delete
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Cancelled, Conflict, HdcsError, Invalid, NotFound, WrongState
from hdcs_tasks.image.control_use import uses
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.routing import check_name
from hdcs_tasks.states import ImageState
from hdcs_tasks.store.models import DomainNode, Image, ImageCopy, ImagePublished, Operation, Step, new_id, now
from hdcs_tasks.store.naming import unknown
from hdcs_tasks.store.transitions import move


def get_image(session: Session, name: str) -> Image:
    """The image of ``name`` (newest version) or ``name:version``; else NotFound."""
    bare, _, version = name.partition(":")
    query = select(Image).where(Image.name == bare, Image.deleted_at.is_(None)).order_by(Image.version.desc())
    if version:
        if not version.isdigit():
            raise Invalid(f"{version!r} is not a version number", next=f"As in {bare}:1")
        query = query.where(Image.version == int(version))
    found = session.scalars(query.limit(1)).first()
    if found is None:
        living = Image.deleted_at.is_(None)
        if version and session.scalar(select(Image.id).where(Image.name == bare, living).limit(1)) is not None:
            raise NotFound(f"image {bare} has no version {version}", next="See: hdcs image list")
        raise unknown(session, Image.name, bare, "image", "hdcs image list", living)
    return found


def add(control: Control, name: str, path: str, asked: Asked, *, domain_nodes: Sequence[str] = ()) -> Operation:
    """Add a disk file as an image to each domain node's storage (all of them by default).

    ``path`` is read by the server nodes. A name that exists becomes its next version, unless a domain node lacks the
    newest version's copy: then that copy is made. One child operation per domain node.
    """
    check_name("image", name)
    if not PurePosixPath(path).is_absolute():
        raise Invalid(f"{path!r} is not an absolute path", next="The server nodes read it: give its full path there")
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "image.add", name, path=path, domain_nodes=domain_nodes)) is not None:
            return same
        wanted = list(domain_nodes) or list(tx.session.scalars(select(DomainNode.name).order_by(DomainNode.name)))
        if not wanted:
            raise NotFound("there is no domain node yet", next="Create one: hdcs domain create NAME")
        for domain_node in wanted:
            get_domain_node(tx.session, domain_node)
        image = _image_for(tx, name, wanted)
        request = {"image": image.id, "path": path, "domain_nodes": wanted}
        parent = tx.open("image.add", asked=asked, subject=f"{name}:{image.version}", request=request)
        for domain_node in wanted:
            _add_copy(tx, image, domain_node, path, asked, parent)
        return parent


def _image_for(tx: Tx, name: str, wanted: Sequence[str]) -> Image:
    # A version that never became ready is free again; one that did is named by backups for ever.
    used = (Image.name == name) & (Image.deleted_at.is_(None) | Image.sha256.is_not(None))
    newest = tx.session.scalar(select(func.max(Image.version)).where(used))
    if newest is not None:
        image = tx.session.scalar(
            select(Image).where(Image.name == name, Image.version == newest, Image.deleted_at.is_(None))
        )
        has = {copy.domain_node for copy in image.copies if copy.state is not ImageState.FAILED} if image else set()
        if image is not None and not has & set(wanted):
            return image
    image = Image(id=new_id(), name=name, version=(newest or 0) + 1)
    tx.session.add(image)
    tx.session.flush()
    return image


def _add_copy(tx: Tx, image: Image, domain_node: str, path: str, asked: Asked, parent: Operation) -> None:
    copy = tx.session.get(ImageCopy, (image.id, domain_node))
    if copy is None:
        copy = ImageCopy(image_id=image.id, domain_node=domain_node, state=ImageState.ADDING)
        tx.session.add(copy)
    else:
        move(copy, ImageState.ADDING)
    subject = f"{image.name}:{image.version} on {domain_node}"
    request = {"image": image.id, "domain_node": domain_node}
    child = tx.open("image.add_copy", asked=asked, subject=subject, request=request, parent=parent)
    spec = {
        "shown": {"image": f"{image.name}:{image.version}", "pool": domain_node}, "image": image.name,
        "version": image.version, "path": path, "sha256": image.sha256,
    }  # fmt: skip
    tx.step(child, "image.add_on_node", domain_node, spec | CAN_BE_ASKED_AGAIN)


def _copy_of(tx: Tx, operation: Operation) -> ImageCopy:
    copy = tx.session.get(ImageCopy, (operation.request["image"], operation.request["domain_node"]))
    if copy is None:
        raise NotFound(f"operation {operation.id} has no image copy")
    return copy


def came(tx: Tx, operation: Operation, copy: ImageCopy, result: dict[str, Any]) -> bool:
    """A file was taken in as this copy: record it. False, and the operation has failed, where the image's other copies
    are another file."""
    image = copy.image
    if image.sha256 not in (None, result["sha256"]):
        missed(copy)
        tx.fail(operation, Conflict(
            f"the file read on {copy.domain_node} differs from the copies of {image.name}:{image.version} elsewhere",
            next="The same path must lead to the same file on every server node",
        ))  # fmt: skip
        return False
    image.sha256, image.virtual_size_bytes = result["sha256"], result["virtual_size_bytes"]
    ready(copy, result["file_bytes"])
    return True


def ready(copy: ImageCopy, file_bytes: int) -> None:
    """The image is there. Several may have brought it at once (an add, a copy, a restore): who comes second finds it
    recorded, or recorded as failed by one that did."""
    copy.file_bytes = file_bytes
    if copy.state is ImageState.FAILED:
        move(copy, ImageState.ADDING)
    if copy.state is ImageState.ADDING:
        move(copy, ImageState.READY)


def missed(copy: ImageCopy) -> None:
    """It did not come by this way; with no copy anywhere the name is free again, and nothing half-made is left."""
    if copy.state is ImageState.ADDING:
        move(copy, ImageState.FAILED)
    if all(c.state is ImageState.FAILED for c in copy.image.copies):
        copy.image.deleted_at = copy.image.deleted_at or now()


@on_done("image.add_on_node")
def _added(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    came(tx, operation, _copy_of(tx, operation), result)


@on_failed("image.add_on_node")
def _not_added(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    missed(_copy_of(tx, operation))


def delete(control: Control, name: str, asked: Asked, *, force: bool = False) -> Operation:
    """Delete an image version that nobody uses; WrongState says by whom it is used.

    ``force``: also one that only backups refer to (they keep their own copy of it) or that is published.
    """
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "image.delete", name, force=force)) is not None:
            return same
        image = get_image(tx.session, name)
        _refuse_used(tx, image, force)
        parent = tx.open("image.delete", asked=asked, subject=f"{image.name}:{image.version}")
        image.deleted_at = now()
        tx.session.execute(sql_delete(ImagePublished).where(ImagePublished.image_id == image.id))
        # Also what an earlier deletion could not remove.
        here = [
            c for c in image.copies if c.state is ImageState.READY or (c.state is ImageState.FAILED and c.file_bytes)
        ]
        for copy in here:
            move(copy, ImageState.DELETING)
            request = {"image": image.id, "domain_node": copy.domain_node}
            child = tx.open("image.delete_copy", asked=asked, subject=image.name, request=request, parent=parent)
            spec = {"shown": {"image": image.name}, "image": image.name, "version": image.version}
            tx.step(child, "image.delete_on_node", copy.domain_node, spec | CAN_BE_ASKED_AGAIN)
        if not here:
            tx.finish(parent)
        return parent


def _refuse_used(tx: Tx, image: Image, force: bool) -> None:
    used = uses(tx.session, image)
    if used.hard:
        raise WrongState(
            f"image {image.name}:{image.version} is used by {'; '.join(used.hard + used.soft)}",
            next="Delete or refresh these VMs first: their disks are worthless without it",
        )
    if used.soft and not force:
        raise WrongState(
            f"image {image.name}:{image.version} is used by {'; '.join(used.soft)}",
            next="Publish another version, delete the backups; or add --force (backups keep a copy of their base)",
        )


@on_done("image.delete_on_node")
def _deleted(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    move(_copy_of(tx, operation), ImageState.DELETED)


@on_failed("image.delete_on_node")
def _not_deleted(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """The file may be there still: the image is shown again, so that it can be deleted once more."""
    copy = _copy_of(tx, operation)
    move(copy, ImageState.READY if error.code == Cancelled.code else ImageState.FAILED)
    copy.image.deleted_at = None


def list_images(control: Control) -> list[dict[str, Any]]:
    with control.store.read() as session:
        images = session.scalars(select(Image).where(Image.deleted_at.is_(None)).order_by(Image.name, Image.version))
        published: dict[str, list[str]] = {}
        for row in session.scalars(select(ImagePublished).order_by(ImagePublished.domain_node)):
            published.setdefault(row.image_id, []).append(row.domain_node)
        return [view(image, published.get(image.id, ())) for image in images]


def view(image: Image, published: Sequence[str] = ()) -> dict[str, Any]:
    """The image as callers see it; ``published``: domain nodes where clones of its name take this version."""
    return {
        "id": image.id, "name": image.name, "version": image.version, "virtual_size_bytes": image.virtual_size_bytes,
        "sha256": image.sha256, "copies": {c.domain_node: c.state.value for c in image.copies},
        "published": list(published), "shape": image.shape, "created_at": image.created_at.isoformat(),
    }  # fmt: skip
