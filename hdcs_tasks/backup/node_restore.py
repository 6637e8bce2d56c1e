"""Restoring on a server node: a new VM's disk, or a VM's own disk set back; and seeing that the guest comes up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hdcs_tasks.backup.node import LOCK_WAIT_S, layout_of, part, repository_of
from hdcs_tasks.errors import BackupBroken, Conflict, NotFound
from hdcs_tasks.hypervisor import agent, disks, merging, storage
from hdcs_tasks.hypervisor.keys import Key, KeyRing
from hdcs_tasks.hypervisor.locks import vm_lock
from hdcs_tasks.hypervisor.manifests import Point
from hdcs_tasks.hypervisor.repository import Repository
from hdcs_tasks.operations.node import Run
from hdcs_tasks.vm import node_swap
from hdcs_tasks.vm.node import image_path, remove_folder, still_ours


def found_point(run: Run, spec: dict[str, Any]) -> tuple[Repository, Point]:
    """The point a step is about; merges that dead workers left half done are ended first."""
    repository = repository_of(run)
    merging.settle(repository, spec["source_vm_id"])
    try:
        return repository, repository.get(spec["source_vm_id"], spec["point"])
    except NotFound as error:  # the record says it is here
        raise BackupBroken(error.message, next="Restore another point, or a copy of it: hdcs backup list") from error


def restore(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Make a new VM's disk with the content of a point, after every link of its chain was verified."""
    layout = layout_of(run)
    repository, point = found_point(run, spec)
    image = _image(run, spec, layout, repository, point)
    target = layout.disk(spec["vm_id"])
    _drop_partials(target)
    try:
        key = _key(run, spec)
        if not target.exists():
            target.parent.mkdir(mode=0o711, exist_ok=True)
            _write(run, repository, point, target, image, key)
        if spec.get("compare"):
            _check_same(run, repository, point, target, key)
    except Exception:
        still_ours(run)
        remove_folder(target.parent)
        raise
    return _result(run, point, image)


def extract(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """A point's disk alone, flattened and in clear, as a file of the storage's import folder; verified before, compared
    after. Raises Conflict (the name is taken)."""
    repository, point = found_point(run, spec)
    target = layout_of(run).path("import", f"{spec['name']}.qcow2")
    marker = target.with_name(f".{target.name}.{run.step}")
    _drop_partials(target)
    if target.exists() and not marker.exists():
        raise Conflict(f"import/{target.name} exists", next="Choose another name")
    marker.touch()  # what is there from now on is this step's
    try:
        if not target.exists():
            _write(run, repository, point, target, None, None, whole=True)
        _check_same(run, repository, point, target, None)
    except Exception:
        still_ours(run)
        target.unlink(missing_ok=True)
        marker.unlink(missing_ok=True)
        raise
    marker.unlink(missing_ok=True)
    return {"node": run.ctx.server_node, "path": f"import/{target.name}", "file_bytes": target.stat().st_size}


def restore_in_place(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Set a stopped VM's disk back to a point. The current disk is kept until the restored one is in place and good.

    <vm>/restored-<step>.qcow2 is written and compared, <vm>/replaced-<step>.qcow2 becomes a second name of the current
    disk, then one rename swaps. An attempt that follows a dead one sees by these names how far that came.
    """
    ctx = run.ctx
    layout = layout_of(run)
    repository, point = found_point(run, spec)
    disk = layout.disk(spec["vm_id"])
    fresh, old = (disk.with_name(f"{what}-{run.step}.qcow2") for what in ("restored", "replaced"))
    with vm_lock(ctx.settings.state_dir, spec["vm_id"], LOCK_WAIT_S):
        node_swap.check_stopped(run, spec["vm_id"], disk)
        _drop_partials(fresh)
        image = _image(run, spec, layout, repository, point)
        if not old.exists():
            _prepare(run, repository, point, disk, fresh, old, image, _key(run, spec))
        run.check()
        node_swap.swap(disk, fresh, old)
    return _result(run, point, image)


def _drop_partials(disk: Path) -> None:
    """Remove what attempts that died while they wrote ``disk`` left beside it."""
    for left in (*disk.parent.glob(f".{disk.name}.*.partial"), *disk.parent.glob(".seed-*")):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def _prepare(
    run: Run, repository: Repository, point: Point, disk: Path, fresh: Path, old: Path, image: Path | None,
    key: Key | None,
) -> None:  # fmt: skip
    try:
        if not fresh.exists():
            _write(run, repository, point, fresh, image, key)
        _check_same(run, repository, point, fresh, key)
        run.check()
    except Exception:
        fresh.unlink(missing_ok=True)
        raise
    node_swap.set_aside(disk, old)


def _key(run: Run, spec: dict[str, Any]) -> Key | None:
    """What the restored disk is encrypted with."""
    return KeyRing.of(run.ctx.settings).find(spec.get("disk_key"))


def _write(
    run: Run, repository: Repository, point: Point, target: Path, image: Path | None, key: Key | None,
    *, whole: bool = False,
) -> None:  # fmt: skip
    repository.verify(point, on_progress=part(run, 0, 40), cancelled=run.cancelled)
    run.check()
    repository.restore(
        point, target, image=image, key=key, attempt=str(run.attempt), on_progress=part(run, 40, 90),
        cancelled=run.cancelled, deadline_s=run.ctx.settings.step_deadline_s, bitmap=not whole,
    )  # fmt: skip


def _check_same(run: Run, repository: Repository, point: Point, disk: Path, key: Key | None) -> None:
    run.progress(90, "comparing")
    if not repository.compare(point, disk, key=key, cancelled=run.cancelled):
        raise BackupBroken(
            f"the restored disk differs from backup point {point.id}", next="Check the storage, then restore once more"
        )


def _image(
    run: Run, spec: dict[str, Any], layout: storage.StorageLayout, repository: Repository, point: Point
) -> Path | None:
    """The point's base image under the name the record gives it here; brought back from the repository if need be."""
    if point.base is None:
        return None
    image = image_path(layout, spec["image"]["name"], spec["image"]["version"])
    repository.bases.bring_back(point.base, image, cancelled=run.cancelled)
    return image


def _result(run: Run, point: Point, image: Path | None) -> dict[str, Any]:
    found = None if image is None else disks.probe(image)
    return {
        "node": run.ctx.server_node, "point": point.id, "disk_bytes": point.disk_bytes,
        "image": found and {"virtual_size_bytes": found.virtual_bytes, "file_bytes": found.path.stat().st_size},
    }  # fmt: skip


def prove(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Wait for the agent of the guest a point was restored to; the seconds it took. Raises HypervisorRefused."""
    waited_s = agent.wait_for_agent(run.ctx.host(), spec["vm_id"], spec["timeout_s"])
    return {"node": run.ctx.server_node, "point": spec["point"], "agent_after_s": round(waited_s, 1)}
