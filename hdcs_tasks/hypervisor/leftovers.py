"""Files of a backup repository that are no point: what attempts left that died, or are just making."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from hdcs_tasks.hypervisor.bases import PARTIAL

DEAD_S = 7 * 86400.0
"""An attempt that nobody took up again for so long is over."""


def find(folder: Path, vm: str) -> Iterator[Path]:
    """Of the VM of this id, "*" of all: partial files, and files without a manifest."""
    for path in folder.glob(f"{vm}/*/*"):
        orphan = path.suffix == ".transfer" or (path.suffix == ".qcow2" and not path.with_suffix(".json").exists())
        if orphan or (path.name.startswith(".") and PARTIAL in path.name):
            yield path


def drop_if_old(left: Path) -> bool:
    """Whether a leftover is of an attempt that is over; then a partial file goes. What may be the only copy of
    something stays: a file whose manifest is gone, a merge's intent."""
    try:
        if time.time() - left.stat().st_mtime < DEAD_S:
            return False
        if left.suffix != ".qcow2" and not left.name.endswith(f".merge{PARTIAL}"):
            left.unlink()
    except FileNotFoundError:
        pass
    return True
