"""Which version of an image clones take: per domain node the published one, or else the newest that is ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Invalid, NotFound, WrongState
from hdcs_tasks.image.control import get_image
from hdcs_tasks.image.control_copy import bring, is_ready
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.states import ImageState
from hdcs_tasks.store.models import Image, ImageCopy, ImagePublished, Operation, Step, Vm, now


def publish(control: Control, name: str, version: int, asked: Asked, *, domain_nodes: Sequence[str] = ()) -> Operation:
    """Let clones of ``name`` take ``version`` from now on: in the named domain nodes, or in every one that has a
    version of it. Where its copy is missing it is brought first; one child operation per domain node. A domain node
    whose copy fails keeps what it had."""
    with control.transaction() as tx:
        words = {"version": version, "domain_nodes": domain_nodes}
        if (same := tx.same_request(asked, "image.publish", name, **words)) is not None:
            return same
        image, wanted = _check(tx.session, name, version, domain_nodes)
        shown = f"{image.name}:{image.version}"
        parent = tx.open(
            "image.publish", asked=asked, subject=shown, request={"image": image.id, "domain_nodes": wanted}
        )
        children = []
        for to in wanted:
            request = {"image": image.id, "domain_node": to}
            child = tx.open("image.publish_on", asked=asked, subject=f"{shown} on {to}", request=request, parent=parent)
            if bring(tx, child, image, to) is None:
                children.append((child, to))
        for child, to in children:
            # Not before the last child is there: a parent ends with the last of those it has.
            _set(tx, image, to)
            tx.finish(child, {"domain_node": to, "image": shown})
        return parent


def plan(control: Control, name: str, version: int, *, domain_nodes: Sequence[str] = ()) -> dict[str, Any]:
    """What ``publish`` would do: ``{image, domain_nodes: [{domain_node, was, copied, vms}]}``; ``vms``: derived ones on
    other versions, which follow on a refresh."""
    with control.store.read() as session:
        image, wanted = _check(session, name, version, domain_nodes)
        now_there = versions(session, image.name)
        return {
            "image": f"{image.name}:{image.version}",
            "domain_nodes": [
                {"domain_node": to, "was": now_there[to].version if to in now_there else None,
                 "copied": not is_ready(image, to), "vms": _behind(session, image, to)}
                for to in wanted
            ],
        }  # fmt: skip


def _behind(session: Session, image: Image, domain_node: str) -> int:
    query = select(Vm.id).join(Image, Vm.image_id == Image.id).where(
        Image.name == image.name, Image.id != image.id, Vm.home == domain_node, Vm.deleted_at.is_(None)
    )  # fmt: skip
    return len(session.scalars(query).all())


def _check(session: Session, name: str, version: int, domain_nodes: Sequence[str]) -> tuple[Image, list[str]]:
    if ":" in name:
        raise Invalid(f"{name!r} names a version itself", next=f"As in: hdcs image publish {name.split(':')[0]} 2")
    image = get_image(session, f"{name}:{version}")
    if not any(copy.state is ImageState.READY for copy in image.copies):
        raise WrongState(f"image {name}:{version} is ready on no domain node yet", next="See: hdcs image list")
    for to in domain_nodes:
        get_domain_node(session, to)
    if domain_nodes:
        return image, list(dict.fromkeys(domain_nodes))
    ready = select(ImageCopy.domain_node).join(Image).where(
        Image.name == name, Image.deleted_at.is_(None), ImageCopy.state == ImageState.READY
    )  # fmt: skip
    return image, sorted(set(session.scalars(ready)))


def _set(tx: Tx, image: Image, domain_node: str) -> None:
    row = tx.session.get(ImagePublished, (image.name, domain_node))
    if row is None:
        row = ImagePublished(name=image.name, domain_node=domain_node, image_id=image.id)
        tx.session.add(row)
    row.image_id, row.published_at = image.id, now()
    tx.event("image.published", image.name, f"clones of {image.name} take version {image.version} on {domain_node}")


@on_done("image.publish_on:image.copy_on_node")
def _brought(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    image = tx.session.get_one(Image, operation.request["image"])
    if image.deleted_at is not None:
        tx.fail(operation, NotFound(f"image {image.name}:{image.version} was deleted meanwhile"))
        return
    _set(tx, image, operation.request["domain_node"])


# --- what clones take


def versions(session: Session, name: str) -> dict[str, Image]:
    """For clones of image ``name`` (or ``name:version``): the version each domain node takes, where it is ready.

    Without a published one that is the newest that is ready anywhere, so that an import under way is in nobody's way.
    Raises NotFound, Invalid.
    """
    named = get_image(session, name)
    if ":" in name:
        return dict.fromkeys(_ready_on(named), named)
    living = session.scalars(
        select(Image).where(Image.name == name, Image.deleted_at.is_(None)).order_by(Image.version.desc())
    )
    newest = next((image for image in living if _ready_on(image)), named)
    found = dict.fromkeys(_ready_on(newest), newest)
    for row in session.scalars(select(ImagePublished).where(ImagePublished.name == name)):
        image = session.get(Image, row.image_id)
        if image is not None and image.deleted_at is None and row.domain_node in _ready_on(image):
            found[row.domain_node] = image
    return found


def _ready_on(image: Image) -> list[str]:
    return sorted(copy.domain_node for copy in image.copies if copy.state is ImageState.READY)
