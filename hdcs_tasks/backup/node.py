"""Taking backups on a server node: the VM's own layer into a plain chain of files. Steps may be repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hdcs_tasks.clock import monotonic_s
from hdcs_tasks.errors import BackupBroken, Cancelled, HdcsError, NotFound, OutcomeUnknown, Rejected
from hdcs_tasks.hypervisor import backup as guest_backup
from hdcs_tasks.hypervisor import guests, merging, storage
from hdcs_tasks.hypervisor.bases import PARTIAL, storage_errors, write_durably
from hdcs_tasks.hypervisor.bitmaps import bitmaps, ensure_seed
from hdcs_tasks.hypervisor.checkpoints import delete_checkpoint, keep_checkpoints, name_of
from hdcs_tasks.hypervisor.keys import KeyRing
from hdcs_tasks.hypervisor.layers import Backing
from hdcs_tasks.hypervisor.locks import vm_lock
from hdcs_tasks.hypervisor.manifests import BaseImage, Kind, Point
from hdcs_tasks.hypervisor.repository import Repository
from hdcs_tasks.operations.node import HandOver, Run
from hdcs_tasks.vm.node import CHECKPOINTS, image_path, still_ours

LOCK_WAIT_S = 10.0
ENCRYPTED = ".encrypted"


def layout_of(run: Run) -> storage.StorageLayout:
    return storage.check(run.ctx.settings.storage_root, run.ctx.domain_node)


def repository_of(run: Run) -> Repository:
    """The backups in this domain node's storage, with the keys this server node has."""
    return Repository(layout_of(run).root, KeyRing.of(run.ctx.settings))


def create(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Write the next point: copied, hashed and published under its name before its checkpoint counts."""
    ctx = run.ctx
    if spec["server_node"] not in (None, ctx.server_node):
        raise HandOver(spec["server_node"], spec)
    layout = layout_of(run)
    repository = repository_of(run)
    with vm_lock(ctx.settings.state_dir, spec["vm_id"], LOCK_WAIT_S):
        merging.settle(repository, spec["vm_id"])
        done = _published(repository, spec)
        if done is None:
            _check(run, spec, repository)
            done = _write(run, spec, layout, repository)
        else:
            repository.drop_partials(done)
        # Also when an earlier attempt published it: that one may have died before its checkpoint counted.
        _keep_or_undo(run, layout, repository, done)
    return {
        "node": ctx.server_node, "checkpoint": done.checkpoint, "file_bytes": done.file_bytes, "sha256": done.sha256,
        "consistency": done.consistency, "manifest": asdict(done),
    }  # fmt: skip


def _check(run: Run, spec: dict[str, Any], repository: Repository) -> None:
    """The fence. A cancelled step undoes what its dead attempts left, a frozen guest above all: nobody comes after."""
    try:
        run.check()
    except Cancelled:
        partial = _partial(run, spec, repository)
        _discard_earlier(run, spec["vm_id"], partial, f"hdcs-{spec['point']}")
        repository.forget_empty(spec["vm_id"], spec["chain"])
        raise


def _partial(run: Run, spec: dict[str, Any], repository: Repository) -> Path:
    return repository.partial(spec["vm_id"], spec["chain"], spec["seq"], f"{run.attempt}")


def _published(repository: Repository, spec: dict[str, Any]) -> Point | None:
    """The point, if an earlier attempt has published it."""
    try:
        return repository.get(spec["vm_id"], spec["point"])
    except NotFound:
        return None


def _write(run: Run, spec: dict[str, Any], layout: storage.StorageLayout, repository: Repository) -> Point:
    kind: Kind = "full" if spec["kind"] == "full" else "inc"
    partial = _partial(run, spec, repository)
    checkpoint = f"hdcs-{spec['point']}"
    _discard_earlier(run, spec["vm_id"], partial, checkpoint)  # first: what follows may fail, and the guest be frozen
    try:
        repository.check_free(spec["vm_id"], spec["chain"], spec["seq"])
        stay_encrypted(repository, run.ctx.settings.backup_key)
        with _begun(partial):
            parent = _parent(repository, spec)
            base = _base(run, spec, layout, repository) if parent is None else _base_of(repository, parent, spec)
            backing = _backing(repository, parent or base, spec)
            run.progress(5, "copying")
            made = _copy(run, spec, layout, partial, checkpoint, backing)
            run.check()
            draft = Point(
                id=spec["point"], vm_id=spec["vm_id"], chain=spec["chain"], seq=spec["seq"], kind=kind,
                parent=spec["parent"], checkpoint=checkpoint, base=base, definition=spec["definition"],
                consistency=made.consistency, checkpoint_xml=made.checkpoint_xml,
                key=run.ctx.settings.backup_key or None,
            )  # fmt: skip
            published = repository.publish(partial, draft, on_progress=part(run, 80, 100), cancelled=run.cancelled)
    except OutcomeUnknown:
        raise  # its job may go on: the next attempt looks, and discards
    except Exception:
        partial.unlink(missing_ok=True)
        delete_checkpoint(run.ctx.host(), spec["vm_id"], checkpoint)
        repository.forget_empty(spec["vm_id"], spec["chain"])
        raise
    return published


def stay_encrypted(repository: Repository, key: str) -> None:
    """A repository that holds encrypted points gets none in clear from a server node that was not told its key's name.

    Raises Rejected.
    """
    mark = repository.folder / ENCRYPTED
    if not key and mark.exists():
        raise Rejected(
            "the backups here are encrypted, and this server node has no HDCS_BACKUP_KEY",
            next=f"Set it as on the others; to go on in clear, remove {mark}",
        )
    if key and not mark.exists():
        with storage_errors(f"writing {mark.name}"):
            write_durably(mark, b"New backups in this folder are encrypted.\n")


@contextmanager
def _begun(partial: Path) -> Iterator[None]:
    """A file that is no point, from before its base image is looked for: while it is there, none is dropped."""
    mark = partial.with_name(f"{partial.name.removesuffix(PARTIAL)}.begun{PARTIAL}")
    with storage_errors(f"writing {mark.name}"):
        mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def _backing(repository: Repository, below: Point | BaseImage | None, spec: dict[str, Any]) -> Backing | None:
    if below is None:
        return None
    found = repository.backing(below, spec["vm_id"], spec["chain"])
    return replace(found, keys=repository.keys_of(below)) if isinstance(below, BaseImage) else found


def _parent(repository: Repository, spec: dict[str, Any]) -> Point | None:
    """The point an increment stands on, with all below it; BackupBroken makes control begin a new chain."""
    if spec["parent"] is None:
        return None
    try:
        parent = repository.get(spec["vm_id"], spec["parent"])
    except NotFound as error:
        raise BackupBroken(error.message, next="The next backup is a full one") from error
    repository.links(parent)
    return parent


def _discard_earlier(run: Run, vm_id: str, partial: Any, checkpoint: str) -> None:
    """What attempts of this point left when their worker died: frozen file systems, a job, a file, a checkpoint."""
    point = partial.name.split(".")[1]
    for left in {partial, *partial.parent.glob(f".{point}.*{partial.suffix}")}:
        guest_backup.discard_left_behind(run.ctx.host(), vm_id, left, checkpoint)


def _copy(
    run: Run, spec: dict[str, Any], layout: storage.StorageLayout, partial: Any, checkpoint: str,
    backing: Backing | None,
) -> guest_backup.BackupResult:  # fmt: skip
    host, vm_id, ring = run.ctx.host(), spec["vm_id"], KeyRing.of(run.ctx.settings)
    how: dict[str, Any] = {
        "target": partial, "key": ring.find(run.ctx.settings.backup_key),
        "checkpoint": checkpoint, "backing": backing, "incremental_from": spec["parent_checkpoint"],
        "on_progress": part(run, 5, 80), "cancelled": run.cancelled, "bandwidth_mib_s": spec.get("bandwidth_mib_s"),
        "deadline_s": run.ctx.settings.step_deadline_s,
    }  # fmt: skip
    seen = guests.info(host, vm_id)
    if seen is not None and seen.active:
        return guest_backup.backup_running(host, vm_id, **how)
    disk = layout.disk(vm_id)
    disk_key = ring.find(spec["definition"].get("disk_key"))
    kept = {name_of(xml): xml for xml in _kept(layout, vm_id)}
    # Also for a full one: until that is safe, the chain there is goes on.
    ensure_seed(disk, keep=kept, key=disk_key)
    sound = bitmaps(disk)
    checkpoints = tuple(xml for name, xml in kept.items() if name in sound)
    return guest_backup.backup_stopped(host, vm_id, disk=disk, disk_key=disk_key, checkpoints=checkpoints, **how)


def part(run: Run, first: float, last: float) -> Callable[[float, str, float | None], None]:
    """Progress of one part of the step as progress of the whole. What cannot tell when it will be through is judged by
    how fast it was so far."""
    began = monotonic_s()

    def tell(percent: float, phase: str, eta_s: float | None) -> None:
        if eta_s is None and percent > 0:
            eta_s = (monotonic_s() - began) * (100.0 - percent) / percent
        run.progress(first + (last - first) * percent / 100.0, phase, eta_s)

    return tell


def _base(run: Run, spec: dict[str, Any], layout: storage.StorageLayout, repository: Repository) -> BaseImage | None:
    """The VM's image, kept in the repository from now on: in an encrypted one in a container."""
    image, settings = spec["image"], run.ctx.settings
    if image is None:
        return None
    source = image_path(layout, image["name"], image["version"])
    size = source.stat().st_size if source.is_file() else 0
    base = BaseImage(name=image["name"], version=image["version"], sha256=image["sha256"], file_bytes=size)
    key = KeyRing.of(settings).find(settings.backup_key)
    return repository.bases.keep(base, source, key=key, on_progress=part(run, 0, 5), cancelled=run.cancelled)


def _base_of(repository: Repository, parent: Point, spec: dict[str, Any]) -> BaseImage | None:
    """What an increment stands on is what its chain began on, as it lies there, whatever the key is by now."""
    base, image = parent.base, spec["image"]
    if (base and base.sha256) != (image and image["sha256"]):
        raise BackupBroken("the chain stands on another image than the VM", next="The next backup is a full one")
    if base is not None and not repository.bases.file(base).is_file():
        raise BackupBroken(f"base image {base.name} of the chain is missing", next="The next backup is a full one")
    return base


def _kept(layout: storage.StorageLayout, vm_id: str) -> list[str]:
    file = layout.vm_dir(vm_id) / CHECKPOINTS
    found: list[str] = json.loads(file.read_text()) if file.exists() else []
    return found


def _keep_or_undo(run: Run, layout: storage.StorageLayout, repository: Repository, point: Point) -> None:
    """A point whose checkpoint cannot be kept is none: it would be in the way of the next one."""
    try:
        _keep(run, layout, point.vm_id, point)
    except Exception:
        still_ours(run)
        repository.delete(point.vm_id, point.chain, point.seq, point.id)
        with suppress(HdcsError):  # it is gone with its guest, or the next full backup drops it
            delete_checkpoint(run.ctx.host(), point.vm_id, point.checkpoint)
        raise


def _keep(run: Run, layout: storage.StorageLayout, vm_id: str, point: Point) -> None:
    """The newest checkpoint is the one the next increment needs: kept in the storage, the older ones dropped."""
    file = layout.vm_dir(vm_id) / CHECKPOINTS
    partial = file.with_suffix(".partial")
    with storage_errors("keeping the checkpoint"):
        partial.write_text(json.dumps([point.checkpoint_xml]))
        partial.replace(file)
    if guests.info(run.ctx.host(), vm_id) is not None:
        keep_checkpoints(run.ctx.host(), vm_id, point.checkpoint)
