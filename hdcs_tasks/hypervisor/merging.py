"""Taking points out of the middle of a chain: the next kept one is rewritten to hold what lay between.

    full ← 2 ← 3 ← 4      keep 3 and 4:      3 (full now) ← 4

A merged point keeps its id, file name and content, so what stands on it need not be touched. Its new file is compared
with the old one before it takes that name. Between the two renames (file, manifest) lies an intent, the finished
manifest under a name of its own; ``settle`` ends what a dead worker left there.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from hdcs_tasks.errors import BackupBroken, Invalid
from hdcs_tasks.hypervisor import disks, manifests
from hdcs_tasks.hypervisor.bases import storage_errors, write_durably
from hdcs_tasks.hypervisor.jobs import IsCancelled, OnProgress
from hdcs_tasks.hypervisor.layers import flatten, same_content
from hdcs_tasks.hypervisor.manifests import Point
from hdcs_tasks.hypervisor.repository import Repository

_INTENT = ".merge.partial"


def merge(
    repository: Repository,
    point: Point,
    below: Point | None,
    *,
    attempt: str,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    deadline_s: float = 3600,
) -> Point:
    """Make ``point`` stand directly on ``below``, a point under it (None: on the base image, as a full one).

    The points between stay; nothing of this chain needs them any more. Returns the point as it is now. Raises
    BackupBroken, Cancelled, HypervisorRefused; after any of them the chain is as it was.
    """
    chain = repository.links(point)
    if point.parent == (below.id if below else None):
        return point
    if below is not None and below not in chain[:-1]:
        raise Invalid(f"backup point {point.id} does not stand on {below.id}", next="Plan the prune anew")
    repository.check_headers(chain)
    stands_on = below or point.base
    backing = repository.backing(stands_on, point.vm_id, point.chain) if stands_on is not None else None
    partial = repository.partial(point.vm_id, point.chain, point.seq, attempt)
    partial.unlink(missing_ok=True)
    try:
        of_point, of_below = repository.keys_of(point), repository.keys_of(stands_on)
        backing = backing and replace(backing, keys=of_below, depth=len(of_point) - len(of_below))
        flatten(
            repository.file(point), partial, backing, on_progress, cancelled, deadline_s, keys=of_point, key=of_point[0]
        )  # fmt: skip
        if not same_content(
            repository.file(point), partial, of_point, (of_point[0], *of_below), cancelled=cancelled,
            timeout_s=deadline_s,
        ):  # fmt: skip
            raise BackupBroken(
                f"merging into {point.id} did not give the same content; the chain is as it was",
                next="Verify the point; look at the storage's health",
            )
        draft = replace(point, parent=below.id if below else None, kind="inc" if below else "full")
        merged = repository.complete(partial, draft, on_progress=None, cancelled=cancelled)
        with repository.bases.locked(), storage_errors(f"merging into {point.id}"):
            write_durably(_intent(repository, merged), manifests.dump(merged))
            os.replace(partial, repository.file(merged))
            disks.sync(partial.parent)
            _finish(repository, merged)
    finally:
        partial.unlink(missing_ok=True)
    return merged


def settle(repository: Repository, vm_id: str) -> int:
    """End the merges of a VM's points that dead workers left half done; returns how many there were."""
    pattern = f"*/.*{_INTENT}"
    folder = repository.folder / manifests.check_vm_id(vm_id)
    if next(folder.glob(pattern), None) is None:
        return 0
    with repository.bases.locked():  # a merge that lives has what it does between intent and end in one go
        return _settle(repository, sorted(folder.glob(pattern)))


def _settle(repository: Repository, found: list[Path]) -> int:
    for path in found:
        merged = manifests.load(path.read_bytes(), path.name)
        file = repository.file(merged)
        if file.is_file() and disks.sha256(file) == merged.sha256:
            _finish(repository, merged)
        else:
            path.unlink(missing_ok=True)  # it died before the file was in place: the old manifest is right
    return len(found)


def _intent(repository: Repository, point: Point) -> Path:
    return repository.file(point).with_name(f".{point.seq:04d}{_INTENT}")


def _finish(repository: Repository, merged: Point) -> None:
    file = repository.file(merged)
    os.replace(_intent(repository, merged), file.with_name(merged.manifest_name))
    disks.sync(file.parent)
