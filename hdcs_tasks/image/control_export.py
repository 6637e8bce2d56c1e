"""Images leave, on the control plane: flattened into a file of a server node's storage or paths, or onto a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from hdcs_tasks.errors import HdcsError, Invalid, NotFound, Unreachable
from hdcs_tasks.image import rules
from hdcs_tasks.image.control import get_image
from hdcs_tasks.image.control_import import living_node
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.pool.files import sources_of
from hdcs_tasks.routing import direct_queue
from hdcs_tasks.states import ImageState
from hdcs_tasks.store.models import Image, Operation

PATIENCE_S = 60.0


@dataclass(frozen=True)
class ExportRequest:
    """To where: ``path`` in the storage's export/ folder, on a server node, or a block device of ``node``. ``format``
    None: by the file's name, else qcow2; a device takes raw. ``force``: replace what is there."""

    path: str
    format: str | None = None
    compress: bool = False
    force: bool = False
    domain_node: str | None = None
    node: str | None = None

    def spec(self) -> dict[str, Any]:
        """The part of a step's spec that says to where. Raises Invalid."""
        place = rules.place_of(self.path)
        fmt = rules.format_of(self.format)
        if place is rules.Place.DEVICE:
            if fmt not in (None, "raw"):
                raise Invalid(f"a block device takes raw, not {fmt}", next="Leave --as out")
            if self.node is None:
                raise Invalid(
                    f"{self.path} is a device: of which server node?", next="Name the one it is at: --node NODE"
                )
            fmt = "raw"
        fmt = fmt or rules.format_by_name(self.path) or "qcow2"
        if self.compress and fmt != "qcow2":
            raise Invalid(f"{fmt} cannot be compressed", next="Only qcow2 can; an OVA is compressed anyway")
        return {"path": self.path, "format": fmt, "compress": self.compress, "force": self.force}


def export(control: Control, name: str, request: ExportRequest, asked: Asked, *, dry_run: bool = False) -> Operation:
    """Export an image (NAME is its newest version); ``dry_run``: only look whether the target may be written."""
    kind = "image.check_export" if dry_run else "image.export"
    with control.transaction() as tx:
        if (same := tx.same_request(asked, kind, name, **vars(request))) is not None:
            return same
        image = get_image(tx.session, name)
        shown = f"{image.name}:{image.version}"
        home = _home(tx.session, image, request)
        spec = request.spec() | {
            "shown": {"image": shown, "to": request.path, "pool": home}, "image": image.name,
            "version": image.version, "dry_run": dry_run, **CAN_BE_ASKED_AGAIN,
            "shape": _shape(image), "origin": {"image": shown, "sha256": image.sha256, "domain_node": home},
        }  # fmt: skip
        wanted = {"image": image.id, "path": request.path, "domain_node": home, "node": request.node}
        operation = tx.open(kind, asked=asked, subject=f"{shown} to {request.path}", request=wanted)
        queue = direct_queue(home, request.node) if request.node else home
        tx.step(operation, f"{kind}_on_node", queue, spec, patience_s=PATIENCE_S)
        return operation


def _shape(image: Image) -> dict[str, Any]:
    """The machine an export tells of: the one it was imported with, else a small one under the image's name."""
    shape = image.shape or {}
    return {
        "name": image.name, "vcpus": shape.get("vcpus", 2), "memory_mib": shape.get("memory_mib", 2048),
        "known": bool(shape),
    }  # fmt: skip


def _home(session: Session, image: Image, request: ExportRequest) -> str:
    """The domain node to read the image in: the named one, that of the named server node, or the first that is up."""
    ready = sorted(copy.domain_node for copy in image.copies if copy.state is ImageState.READY)
    wanted = request.domain_node
    if request.node is not None:
        home = living_node(session, request.node).domain_node
        if wanted not in (None, home):
            raise Invalid(
                f"server node {request.node} is of domain node {home}, not of {wanted}", next="See: hdcs node list"
            )
        wanted = home
    if wanted is not None:
        get_domain_node(session, wanted)
        if wanted not in ready:
            raise NotFound(
                f"image {image.name}:{image.version} is not ready on {wanted}",
                next=f"Bring it there: hdcs image copy {image.name}:{image.version} {wanted}",
            )
        return wanted
    refused: HdcsError = NotFound(f"image {image.name}:{image.version} is ready nowhere", next="See: hdcs image list")
    for name in ready:
        try:
            sources_of(session, name)
        except Unreachable as error:
            refused = error
            continue
        return name
    raise refused
