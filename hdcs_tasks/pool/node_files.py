"""Files between the storages of two domain nodes, on their server nodes. The work of steps; each may be repeated.

A feature registers them under names of its own (``image.copy_on_node``, ``vm.fetch_on_node``, …), so that it settles
its own steps; ``pool/files.py`` makes their specs on the control plane:

    fetch_step = step_task("backup.fetch_on_node", node_files.fetch)      # its node_tasks.py
    tx.step(operation, "backup.fetch_on_node", "west", files.fetch_spec(tx.session, "east", [RemoteFile…]))
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import NoCapacity
from hdcs_tasks.hypervisor import storage, transfer
from hdcs_tasks.hypervisor.connection import peer_of
from hdcs_tasks.operations.node import Run

SPACE_LEFT_BYTES = 64 << 20
"""A storage that is full pauses every guest on it: the last bytes are theirs."""


def place_of(run: Run) -> storage.StorageLayout:
    return storage.check(run.ctx.settings.storage_root, run.ctx.domain_node)


def local_path(place: storage.StorageLayout, path: str) -> Path:
    """Where a file of this name (``vms/<id>/disk0.qcow2``) lies in this domain node's storage."""
    kind, *parts = path.split("/")
    return place.path(kind, *parts)


def offer(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """At the source: hash files that nobody writes to. ``{node, address, files: [{path, size_bytes, sha256,
    allocated_bytes}]}``: what ``fetch`` takes. Spec: ``paths``; one of ``optional`` that is missing is left out."""
    place = place_of(run)
    wanted = [*spec["paths"], *(p for p in spec.get("optional", ()) if local_path(place, p).is_file())]
    found = [
        transfer.describe(local_path(place, path), path, on_progress=run.progress, cancelled=run.cancelled)
        for path in wanted
    ]
    return {"node": run.ctx.server_node, "address": run.ctx.settings.server_node_ip, "files": found}


def fetch(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """At the target: bring every file, in the order given. Spec: ``sources`` [{node, address}], ``files`` [{path,
    size_bytes, sha256, to (another path here, if wanted)}], ``bandwidth_mib_s``.

    Result: ``{node, bytes, seconds, resumed}``. What arrived before a failure stays, partly received files too: the
    next attempt goes on there. Raises what ``transfer.fetch`` raises, and NoCapacity.
    """
    place, begun = place_of(run), time.monotonic()
    uris = [peer_of(run.ctx.settings, s["address"]) for s in spec["sources"]]
    files = [(_remote(file), local_path(place, file.get("to") or file["path"])) for file in spec["files"]]
    check_space(place, sum(f.get("allocated_bytes", f["size_bytes"]) for f in spec["files"]), run.ctx.domain_node,
                [target for _, target in files])  # fmt: skip
    part = _Part(run, max(1, sum(file.size_bytes for file, _ in files)))
    received, resumed = 0, False
    for file, target in files:
        run.check()
        target.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        part.size = file.size_bytes
        got = transfer.fetch(
            uris, file, target, bandwidth_mib_s=spec.get("bandwidth_mib_s"), on_progress=part.told,
            cancelled=run.cancelled,
        )  # fmt: skip
        part.before += file.size_bytes
        received, resumed = received + got.bytes, resumed or got.resumed_at > 0
    return {
        "node": run.ctx.server_node, "bytes": received, "seconds": round(time.monotonic() - begun, 3),
        "resumed": resumed
    }  # fmt: skip


@dataclass
class _Part:
    """One file's share of the progress of all."""

    run: Run
    total: int
    before: int = 0
    size: int = 0

    def told(self, percent: float, phase: str, eta_s: float | None) -> None:
        self.run.progress((100.0 * self.before + percent * self.size) / self.total, phase, eta_s)


def _remote(file: dict[str, Any]) -> transfer.RemoteFile:
    return transfer.RemoteFile(file["path"], file["size_bytes"], file["sha256"])


def check_space(place: storage.StorageLayout, bytes_: int, domain_node: str, targets: list[Path] | None = None) -> None:
    """NoCapacity unless so much may still be written; what earlier attempts wrote to ``targets`` counts as written."""
    there = sum(
        part.stat().st_blocks * 512
        for target in targets or ()
        for part in (*target.parent.glob(f"{target.name}.*.transfer"), target)
        if part.exists()
    )
    free = shutil.disk_usage(place.root).free
    if free + there < bytes_ + SPACE_LEFT_BYTES:
        raise NoCapacity(
            f"storage of domain node {domain_node} is too full for {bytes_ >> 20} MiB: {free >> 20} MiB are free",
            next="Delete VMs, images or backups there, or add storage",
        )
