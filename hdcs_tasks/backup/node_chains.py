"""What is done to stored backups on a server node: verify, delete, prune, and read back what a repository holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hdcs_tasks.backup.node import part, repository_of
from hdcs_tasks.backup.node_restore import found_point
from hdcs_tasks.errors import ClaimLost, HdcsError
from hdcs_tasks.hypervisor import merging
from hdcs_tasks.hypervisor.repository import Repository
from hdcs_tasks.operations.node import Run

SCAN_POINTS = 200


def verify(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    repository, point = found_point(run, spec)
    repository.verify(point, on_progress=run.progress, cancelled=run.cancelled)
    return {"node": run.ctx.server_node, "links": len(repository.links(point))}


def delete(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    repository = repository_of(run)
    merging.settle(repository, spec["source_vm_id"])
    run.check()
    was = repository.delete(spec["source_vm_id"], spec["chain"], spec["seq"], spec["point"])
    repository.drop_unused_bases()
    return {"node": run.ctx.server_node, "was_there": was}


def prune(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Merge, then drop, as planned. Repeated, it finds done what was done."""
    repository = repository_of(run)
    vm_id, merges = spec["vm_id"], spec["merge"]
    merging.settle(repository, vm_id)
    merged = []
    for number, each in enumerate(merges):
        run.check()
        point = repository.get(vm_id, each["point"])
        repository.drop_partials(point)
        below = repository.get(vm_id, each["below"]) if each["below"] else None
        tell = part(run, 90.0 * number / len(merges), 90.0 * (number + 1) / len(merges))
        done = merging.merge(
            repository, point, below, attempt=str(run.attempt), on_progress=tell, cancelled=run.cancelled,
            deadline_s=run.ctx.settings.step_deadline_s,
        )  # fmt: skip
        merged.append(asdict(done))
    dropped, why = _drop(run, repository, vm_id, spec["drop"])
    left = [each["point"] for each in spec["drop"] if each["point"] not in dropped]
    return {"node": run.ctx.server_node, "merged": merged, "dropped": dropped, "left": left, "why_left": why}


def _drop(run: Run, repository: Repository, vm_id: str, going: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Delete in this order as far as it goes: what is gone is told even when the rest could not be."""
    dropped: list[str] = []
    try:
        for each in going:
            run.check()
            repository.delete(vm_id, each["chain"], each["seq"], each["point"])
            dropped.append(each["point"])
        repository.drop_unused_bases()
    except ClaimLost:
        raise
    except HdcsError as error:
        return dropped, str(error)
    return dropped, ""


def scan(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """The manifests of the next VMs after ``spec["after"]``: at least one VM, about ``SCAN_POINTS`` points.

    ``next`` is where to go on, None at the end. Manifests that cannot be read are told in ``damaged``.
    """
    repository = repository_of(run)
    points: list[dict[str, Any]] = []
    damaged: list[str] = []
    for vm_id in repository.vm_ids():
        if vm_id <= spec["after"]:
            continue
        run.check()
        merging.settle(repository, vm_id)
        points += [asdict(point) for point in repository.points(vm_id, damaged)]
        if len(points) >= SCAN_POINTS:
            return {"node": run.ctx.server_node, "points": points, "damaged": damaged, "next": vm_id}
    return {"node": run.ctx.server_node, "points": points, "damaged": damaged, "next": None}
