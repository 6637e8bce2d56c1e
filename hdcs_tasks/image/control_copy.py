"""An image brought into another domain node's storage: once, then every VM there stands on that copy.

As an operation of its own (``image.copy``), or as a step of another that needs it there first (``bring``): a move of a
VM, a clone. The step is ``image.copy_on_node``, on the queue of the domain node that wants the image.
"""

from __future__ import annotations

from typing import Any

from hdcs_tasks.errors import HdcsError, NotFound, WrongState
from hdcs_tasks.image.control import get_image, missed, ready
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.pool.files import fetch_spec, sources_of
from hdcs_tasks.states import ImageState
from hdcs_tasks.store.models import Image, ImageCopy, Operation, Step
from hdcs_tasks.store.transitions import move

PATIENCE_S = 30.0
"""How long a copy waits for a storage that is too full."""


def copy(control: Control, name: str, to: str, asked: Asked) -> Operation:
    """Bring an image (``name`` or ``name:version``) to domain node ``to`` from one that has it; there already: done."""
    with control.transaction() as tx:
        if (same := tx.same_request(asked, "image.copy", name, to=to)) is not None:
            return same
        image = get_image(tx.session, name)
        get_domain_node(tx.session, to)
        subject = f"{image.name}:{image.version} to {to}"
        operation = tx.open("image.copy", asked=asked, subject=subject, request={"image": image.id, "domain_node": to})
        if bring(tx, operation, image, to) is None:
            tx.finish(operation, {"bytes": 0, "domain_node": to})
        return operation


def is_ready(image: Image, domain_node: str) -> bool:
    return any(c.domain_node == domain_node and c.state is ImageState.READY for c in image.copies)


def bring(tx: Tx, operation: Operation, image: Image, to: str) -> Step | None:
    """Add the step that brings ``image`` to domain node ``to``; None where it is ready there.

    The operation goes on by ``on_done("<its kind>:image.copy_on_node")``. Two operations may bring the same image at
    once: the second finds the file and receives nothing. Raises NotFound (no domain node has it), Unreachable,
    WrongState (it is being deleted there), and has changed nothing then: who settles a step goes another way.
    """
    if is_ready(image, to):
        return None
    source = _source(tx, image)
    path = f"images/{image.name}/{image.version}.qcow2"
    file = {"path": path, "size_bytes": source.file_bytes, "sha256": image.sha256}
    shown = {"image": f"{image.name}:{image.version}", "from": source.domain_node, "pool": to}
    spec = fetch_spec(tx.session, source.domain_node, [file], shown=shown) | {"image_id": image.id, "domain_node": to}
    row = tx.session.get(ImageCopy, (image.id, to))
    if row is None:
        tx.session.add(ImageCopy(image_id=image.id, domain_node=to, state=ImageState.ADDING))
    elif row.state is ImageState.DELETING:
        raise WrongState(f"image {image.name}:{image.version} is being deleted on {to}", next="Ask again in a moment")
    elif row.state is not ImageState.ADDING:
        move(row, ImageState.ADDING)
    return tx.step(operation, "image.copy_on_node", to, spec, patience_s=PATIENCE_S)


def _source(tx: Tx, image: Image) -> ImageCopy:
    """A domain node's copy that can be read now, else any: its error says who must come back."""
    ready = [copy for copy in image.copies if copy.state is ImageState.READY and copy.file_bytes is not None]
    if not ready:
        raise NotFound(
            f"image {image.name}:{image.version} is ready on no domain node", next="Add it: hdcs image add NAME FILE"
        )
    for found in sorted(ready, key=lambda c: c.domain_node):
        try:
            sources_of(tx.session, found.domain_node)
        except HdcsError:
            continue
        return found
    return ready[0]


@on_done("image.copy_on_node")
def _copied(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    if (row := _row(tx, step)) is not None:
        ready(row, step.spec["files"][0]["size_bytes"])


@on_failed("image.copy_on_node")
def _not_copied(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    if (row := _row(tx, step)) is not None:
        missed(row)


def _row(tx: Tx, step: Step) -> ImageCopy | None:
    return tx.session.get(ImageCopy, (step.spec["image_id"], step.spec["domain_node"]))
