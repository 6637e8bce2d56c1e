"""Who uses an image: in words, for whoever wants to delete it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from hdcs_tasks.states import OPERATION_LIVE, BackupState, ImageState
from hdcs_tasks.store.models import Backup, Image, ImageCopy, ImagePublished, Operation, Vm, WarmPool

_SHOWN = 5
_READERS = (
    "image.export", "image.copy", "image.publish", "image.publish_on", "vm.refresh", "image.import", "image.add",
    "image.add_copy", "backup.restore",
)  # fmt: skip


@dataclass(frozen=True)
class Uses:
    """``hard``: it would be destroyed by the deletion; ``soft``: it goes on without the image (backups keep a copy of
    their base, clones take the newest version instead), so an operator may insist."""

    hard: list[str]
    soft: list[str]


def uses(session: Session, image: Image) -> Uses:
    vms = session.scalars(select(Vm.name).where(Vm.image_id == image.id, Vm.deleted_at.is_(None)).order_by(Vm.name))
    hard = _say("VM", list(vms))
    hard += [f"warm pool {name}" for name in _warm_pools(session, image)]
    live = select(Operation).where(Operation.state.in_(OPERATION_LIVE), Operation.kind.in_(_READERS))
    at_work = [op for op in session.scalars(live) if op.request.get("image") == image.id]
    hard += [f"operation {op.id[:8]} ({op.kind})" for op in at_work[:_SHOWN]]
    published = select(ImagePublished.domain_node).where(ImagePublished.image_id == image.id)
    soft = [f"clones on {name} (it is published there)" for name in sorted(session.scalars(published))]
    return Uses(hard, soft + _say("backup", _backups(session, image)))


def _warm_pools(session: Session, image: Image) -> list[str]:
    """Pools that clone this very version: named so, published, or the newest there is."""
    newest = session.scalar(select(func.max(Image.version)).where(Image.name == image.name, Image.deleted_at.is_(None)))
    published = select(ImagePublished.image_id).where(ImagePublished.image_id == image.id).limit(1)
    taken = image.version == newest or session.scalar(published) is not None
    names = [f"{image.name}:{image.version}", *([image.name] if taken else [])]
    return list(session.scalars(select(WarmPool.name).where(WarmPool.image.in_(names)).order_by(WarmPool.name)))


def _backups(session: Session, image: Image) -> list[str]:
    """Backups whose base has this content, unless another image of the same content stays: they know it by hash."""
    if image.sha256 is None or _has_twin(session, image):
        return []
    states = (BackupState.READY, BackupState.BROKEN)
    rows = session.execute(select(Backup.id, Backup.vm_name, Backup.manifest).where(Backup.state.in_(states)))
    return [
        f"{backup_id[:8]} of {vm_name}" for backup_id, vm_name, manifest in rows
        if ((manifest or {}).get("base") or {}).get("sha256") == image.sha256
    ]  # fmt: skip


def _has_twin(session: Session, image: Image) -> bool:
    twin = (
        select(ImageCopy.image_id).join(Image, Image.id == ImageCopy.image_id)
        .where(Image.sha256 == image.sha256, Image.id != image.id, Image.deleted_at.is_(None))
        .where(ImageCopy.state == ImageState.READY)
    )  # fmt: skip
    return session.scalar(twin.limit(1)) is not None


def _say(noun: str, names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return [f"{noun} {shown}" if len(names) == 1 else f"{len(names)} {noun}s ({shown})"]
