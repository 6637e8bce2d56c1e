"""A second copy of backup points, on a server node of the domain node that gets it. The step may be repeated."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.backup.node import layout_of, part, repository_of
from hdcs_tasks.errors import Conflict
from hdcs_tasks.hypervisor import disks, manifests, merging
from hdcs_tasks.hypervisor.manifests import BaseImage, Point
from hdcs_tasks.hypervisor.repository import Repository
from hdcs_tasks.operations.node import Run
from hdcs_tasks.pool import node_files
from hdcs_tasks.vm.node import image_path


def fetch(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Bring the files of ``spec["points"]`` (manifests, the full one first) that are not here, write their manifests,
    read all of it. Then drop the points of ``spec["drop"]`` that nothing here stands on.

    Result: ``bytes`` that travelled, ``seconds``, ``resumed``, ``dropped``.
    """
    repository = repository_of(run)
    points = [manifests.from_dict(each) for each in spec["points"]]
    merging.settle(repository, spec["source_vm_id"])
    run.check()
    for point in points:
        if point.id in spec["replace"]:
            repository.discard(point)
    known = {point.id for point in repository.points(spec["source_vm_id"])}
    missing = [point for point in points if point.id not in known]
    for point in missing:
        _drop_other(repository, point)
    files = [_file(repository, point) for point in missing]
    base = points[-1].base
    if base is not None and not _have_base(run, repository, base):
        # After the points: while those are without manifests, nobody drops a base.
        path = f"backups/bases/{repository.bases.file(base).name}"
        size_bytes = base.stored_bytes if base.key else base.file_bytes
        files.append({"path": path, "size_bytes": size_bytes, "sha256": base.file_sha256})
    done = node_files.fetch(run, spec | {"files": files})
    for point in missing:
        run.check()
        repository.receive(point)
    repository.verify(points[-1], on_progress=part(run, 90, 100), cancelled=run.cancelled)
    return done | {"dropped": _drop(run, repository, spec)}


def drop(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Drop the points of ``spec["drop"]`` that nothing here stands on. Result: ``dropped``, those gone before too."""
    repository = repository_of(run)
    merging.settle(repository, spec["source_vm_id"])
    return {"node": run.ctx.server_node, "dropped": _drop(run, repository, spec)}


def _file(repository: Repository, point: Point) -> dict[str, Any]:
    path = repository.file(point).relative_to(repository.root)
    return {"path": str(path), "size_bytes": point.file_bytes, "sha256": point.sha256}


def _drop_other(repository: Repository, point: Point) -> None:
    """A file without a manifest that has the name, and another content: the point was merged since it came here."""
    file = repository.file(point)
    if file.is_file() and disks.sha256(file) != point.sha256:
        file.unlink()


def _have_base(run: Run, repository: Repository, base: BaseImage) -> bool:
    """The base image is here, or the same image is, to be linked."""
    if repository.bases.file(base).is_file():
        return True
    image = image_path(layout_of(run), base.name, base.version)
    if base.key is not None:
        return False  # the very container its points stand on
    if not image.is_file() or disks.sha256(image, cancelled=run.cancelled) != base.sha256:
        return False
    repository.bases.keep(base, image, cancelled=run.cancelled)
    return True


def _drop(run: Run, repository: Repository, spec: dict[str, Any]) -> list[str]:
    going = [p for p in repository.points(spec["source_vm_id"]) if p.id in spec["drop"]]
    here = {p.id for p in going}
    dropped = [each for each in spec["drop"] if each not in here]
    for point in reversed(going):
        run.check()
        try:
            repository.delete(point.vm_id, point.chain, point.seq, point.id)
        except Conflict:
            continue  # a kept one stands on it: here nothing is merged
        dropped.append(point.id)
    if dropped:
        repository.drop_unused_bases()
    return dropped
