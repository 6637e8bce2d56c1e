"""Backups on a server node: the VM's own layer into a plain chain of files, and back. Steps may be repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import BackupBroken, HdcsError, NotFound
from hdcs_tasks.hypervisor import backup as guest_backup
from hdcs_tasks.hypervisor import guests, storage
from hdcs_tasks.hypervisor.bitmaps import ensure_seed
from hdcs_tasks.hypervisor.checkpoints import delete_checkpoint, keep_checkpoints
from hdcs_tasks.hypervisor.locks import vm_lock
from hdcs_tasks.hypervisor.manifests import BaseImage, Kind, Point
from hdcs_tasks.hypervisor.repository import Repository
from hdcs_tasks.operations.node import HandOver, Run

LOCK_WAIT_S = 10.0
CHECKPOINTS = "checkpoints.json"


def _layout(run: Run) -> storage.StorageLayout:
    return storage.check(run.ctx.settings.storage_root, run.ctx.domain_node)


def create(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Write the next point: copied, hashed and published under its name before its checkpoint counts."""
    ctx = run.ctx
    if spec["server_node"] not in (None, ctx.server_node):
        raise HandOver(spec["server_node"], spec)
    layout = _layout(run)
    repository = Repository(layout.root)
    with vm_lock(ctx.settings.state_dir, spec["vm_id"], LOCK_WAIT_S):
        done = _published(repository, spec)
        if done is None:
            run.check()
            done = _write(run, spec, layout, repository)
    return {
        "node": ctx.server_node, "checkpoint": done.checkpoint, "file_bytes": done.file_bytes, "sha256": done.sha256,
        "consistency": done.consistency, "manifest": asdict(done) | {"image": spec["image"]},
    }  # fmt: skip


def _published(repository: Repository, spec: dict[str, Any]) -> Point | None:
    """The point, if an earlier attempt has published it."""
    try:
        return repository.get(spec["vm_id"], spec["point"])
    except NotFound:
        return None


def _write(run: Run, spec: dict[str, Any], layout: storage.StorageLayout, repository: Repository) -> Point:
    kind: Kind = "full" if spec["kind"] == "full" else "inc"
    base = _base(spec)
    parent = repository.get(spec["vm_id"], spec["parent"]) if spec["parent"] else None
    if spec["parent"] and parent is None:
        raise BackupBroken(f"the parent point {spec['parent']} is gone", next="The next backup is a full one")
    below = parent or base
    backing = repository.backing(below, spec["vm_id"], spec["chain"]) if below is not None else None
    partial = repository.partial(spec["vm_id"], spec["chain"], spec["seq"], kind, f"{run.attempt}")
    checkpoint = f"hdcs-{spec['point']}"
    _discard_earlier(run, spec["vm_id"], partial, checkpoint)
    run.progress(5, "copying")
    made = _copy(run, spec, layout, partial, checkpoint, backing)  # cleans up after itself
    try:
        run.check()
        draft = Point(
            id=spec["point"], vm_id=spec["vm_id"], chain=spec["chain"], seq=spec["seq"], kind=kind,
            parent=spec["parent"], checkpoint=checkpoint, base=base, definition=spec["definition"],
            consistency=made.consistency, checkpoint_xml=made.checkpoint_xml,
        )  # fmt: skip
        published = repository.publish(partial, draft, on_progress=_part(run, 80, 100), cancelled=run.cancelled)
    except HdcsError:
        partial.unlink(missing_ok=True)
        delete_checkpoint(run.ctx.host(), spec["vm_id"], checkpoint)
        raise
    _keep(run, layout, spec["vm_id"], published)
    return published


def _discard_earlier(run: Run, vm_id: str, partial: Path, checkpoint: str) -> None:
    """What attempts of this point left when their worker died: frozen file systems, a job, a file, a checkpoint."""
    point = partial.name.split(".")[1]
    for left in {partial, *partial.parent.glob(f".{point}.*{partial.suffix}")}:
        guest_backup.discard_left_behind(run.ctx.host(), vm_id, left, checkpoint)


def _copy(
    run: Run, spec: dict[str, Any], layout: storage.StorageLayout, partial: Path, checkpoint: str,
    backing: guest_backup.Backing | None,
) -> guest_backup.BackupResult:  # fmt: skip
    host, vm_id = run.ctx.host(), spec["vm_id"]
    seen = guests.info(host, vm_id)
    if seen is not None and seen.active:
        return guest_backup.backup_running(
            host, vm_id, target=partial, checkpoint=checkpoint, backing=backing,
            incremental_from=spec["parent_checkpoint"], on_progress=_part(run, 5, 80), cancelled=run.cancelled,
            deadline_s=run.ctx.settings.step_deadline_s,
        )  # fmt: skip
    ensure_seed(layout.disk(vm_id), keep=[spec["parent_checkpoint"] or ""])
    return guest_backup.backup_stopped(
        host, vm_id, disk=layout.disk(vm_id), target=partial, checkpoint=checkpoint, backing=backing,
        incremental_from=spec["parent_checkpoint"], checkpoints=tuple(_kept(layout, vm_id)),
        on_progress=_part(run, 5, 80), cancelled=run.cancelled, deadline_s=run.ctx.settings.step_deadline_s,
    )  # fmt: skip


def _part(run: Run, first: float, last: float) -> Callable[[float, str, float | None], None]:
    """Progress of one part of the step as progress of the whole."""

    def tell(percent: float, phase: str, eta_s: float | None) -> None:
        run.progress(first + (last - first) * percent / 100.0, phase, eta_s)

    return tell


def _base(spec: dict[str, Any]) -> BaseImage | None:
    image = spec["image"]
    if image is None:
        return None
    path = f"images/{image['name']}/{image['version']}.qcow2"
    return BaseImage(name=image["name"], version=image["version"], sha256=image["sha256"], path=path)


def _kept(layout: storage.StorageLayout, vm_id: str) -> list[str]:
    file = layout.vm_dir(vm_id) / CHECKPOINTS
    found: list[str] = json.loads(file.read_text()) if file.exists() else []
    return found


def _keep(run: Run, layout: storage.StorageLayout, vm_id: str, point: Point) -> None:
    """The newest checkpoint is the one the next increment needs: kept in the storage, the older ones dropped."""
    file = layout.vm_dir(vm_id) / CHECKPOINTS
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps([point.checkpoint_xml]))
    partial.replace(file)
    if guests.info(run.ctx.host(), vm_id) is not None:
        keep_checkpoints(run.ctx.host(), vm_id, point.checkpoint)


def _point(run: Run, spec: dict[str, Any]) -> tuple[Repository, Point]:
    repository = Repository(_layout(run).root)
    return repository, repository.get(spec["source_vm_id"], spec["point"])


def restore(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Make a new VM's disk with the content of a point, after every link of its chain was verified."""
    layout = _layout(run)
    repository, point = _point(run, spec)
    target = layout.disk(spec["vm_id"])
    if not target.exists():
        repository.verify(point, on_progress=_part(run, 0, 40), cancelled=run.cancelled)
        run.check()
        target.parent.mkdir(mode=0o711, exist_ok=True)
        try:
            repository.restore(
                point, target, attempt=str(run.attempt), on_progress=_part(run, 40, 100), cancelled=run.cancelled
            )
        except HdcsError:
            for left in target.parent.iterdir():
                left.unlink()
            target.parent.rmdir()
            raise
    return {"node": run.ctx.server_node, "point": point.id, "disk_bytes": point.disk_bytes}


def verify(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    repository, point = _point(run, spec)
    repository.verify(point, on_progress=run.progress, cancelled=run.cancelled)
    return {"node": run.ctx.server_node, "links": len(repository.links(point))}


def delete(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    try:
        repository, point = _point(run, spec)
    except NotFound:
        return {"node": run.ctx.server_node, "was_there": False}
    run.check()
    return {"node": run.ctx.server_node, "was_there": repository.delete(point)}
