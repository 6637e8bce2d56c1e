"""Images on a server node: a disk file becomes a plain, sealed qcow2 in the domain node's storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hdcs_tasks.errors import Conflict, Invalid
from hdcs_tasks.hypervisor import disks, probing, storage
from hdcs_tasks.image.node_paths import named_here
from hdcs_tasks.operations.node import Run


def _path(run: Run, spec: dict[str, Any]) -> Path:
    layout = storage.check(run.ctx.settings.storage_root, run.ctx.domain_node)
    return layout.path("images", spec["image"], f"{spec['version']}.qcow2")


def add(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Copy the file in, as a flattened qcow2 with no backing file. Left nothing when it fails."""
    target = _path(run, spec)
    source = Path(spec["path"])
    if target.exists():
        return _result(run, target)
    max_bytes = run.ctx.settings.image_max_gib << 30
    with named_here(run):
        found = probing.probe(source, source.parent, max_bytes=max_bytes, cancelled=run.cancelled)
        if len(found.chain) > 1:
            raise Invalid(f"{source} is an overlay on {found.chain[1]}", next="Flatten it: hdcs image import does so")
    run.check()
    target.parent.mkdir(mode=0o711, exist_ok=True)
    try:
        if found.format == "qcow2":
            disks.copy_image(
                source, target, on_progress=run.progress, cancelled=run.cancelled, attempt=str(run.attempt)
            )
        else:
            disks.convert(
                source, found.format, target, on_progress=run.progress, cancelled=run.cancelled,
                attempt=str(run.attempt),
            )  # fmt: skip
    except Conflict:
        if not target.exists():
            raise  # else an earlier attempt ended in between
    finally:
        _remove_if_empty(target.parent)
    return _result(run, target)


def _result(run: Run, target: Path) -> dict[str, Any]:
    found = disks.probe(target)
    return {
        "sha256": disks.sha256(target, cancelled=run.cancelled), "virtual_size_bytes": found.virtual_bytes,
        "file_bytes": target.stat().st_size, "node": run.ctx.server_node,
    }  # fmt: skip


def delete(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    target = _path(run, spec)
    run.check()
    target.unlink(missing_ok=True)
    _remove_if_empty(target.parent)
    return {"node": run.ctx.server_node}


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # it holds other versions, or is gone
