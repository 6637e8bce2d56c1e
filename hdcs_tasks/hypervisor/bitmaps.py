"""Dirty bitmaps inside a qcow2 file that no guest has open: make the seed, and mend what a killed QEMU left.

Runs qemu-img and qemu-io. Never call it on the disk of a running guest: QEMU's own image lock refuses it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hdcs_tasks.hypervisor import keys
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.keys import Key
from hdcs_tasks.hypervisor.processes import run

_GRANULARITY = 65536
_ZERO_MAX = 1 << 30  # qemu-io refuses requests of 2 GiB
_COMMANDS_AT_ONCE = 400
_MAP_PART = 1 << 30
_TIMEOUT_S = 600.0


def bitmaps(disk: Path) -> dict[str, bool]:
    """Names of the persistent bitmaps in ``disk``; True for a sound one, False for one a dead QEMU left ``in-use``."""
    found = _info(disk).get("format-specific", {}).get("data", {}).get("bitmaps", [])
    return {each["name"]: "in-use" not in each["flags"] for each in found}


def ensure_seed(disk: Path, *, keep: Collection[str] | None = None, key: Key | None = None) -> bool:
    """Give ``disk`` a sound seed bitmap that marks all its own clusters; True if it had none.

    Call it on a new overlay, on a restored or imported disk, and before the start of a VM whose QEMU died. Broken
    bitmaps are removed, and with ``keep`` all but the seed and the named: a backup point whose bitmap is gone makes
    the next backup a full one. ``key``: of an encrypted disk.
    """
    found = bitmaps(disk)
    for name, sound in found.items():
        wanted = keep is None or name == SEED or name in keep
        if not (sound and wanted):
            _bitmap(disk, key, "--remove", name)
    if found.get(SEED, False):
        return False
    marks = list(_own_extents(disk, key))
    _bitmap(disk, key, "--add", "-g", str(_GRANULARITY), SEED)
    if marks:
        _mark(disk, marks, key)
    return True


def _bitmap(disk: Path, key: Key | None, *options: str) -> None:
    *how, name = options
    argv = [*how, *keys.opened(disk, (key,)), name]
    keys.run(["qemu-img", "bitmap"], *argv, keys=(key,), timeout_s=_TIMEOUT_S)


def _mark(disk: Path, marks: list[tuple[int, int]], key: Key | None) -> None:
    """Set the bits of ``marks`` (offset, length) in the seed of ``disk``.

    qemu-img can only merge bitmaps, so they are made in a scratch image, by writing zeros (no data) there.
    """
    size = str(_info(disk)["virtual-size"])
    with tempfile.TemporaryDirectory(dir=disk.parent, prefix=".seed-") as folder:
        scratch = str(Path(folder) / "scratch.qcow2")
        run(["qemu-img", "create", "-q", "-f", "qcow2", scratch, size], timeout_s=_TIMEOUT_S)
        run(["qemu-img", "bitmap", "--add", "-g", str(_GRANULARITY), scratch, "marks"], timeout_s=_TIMEOUT_S)
        commands = (f"write -q -z {at} {length}" for at, length in _cut(marks))
        while batch := list(islice(commands, _COMMANDS_AT_ONCE)):
            argv = [part for command in batch for part in ("-c", command)]
            run(["qemu-io", "-f", "qcow2", *argv, scratch], timeout_s=_TIMEOUT_S)
        _bitmap(disk, key, "--merge", "marks", "-b", scratch, "-F", "qcow2", SEED)


def _cut(marks: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for at, length in marks:
        for part in range(at, at + length, _ZERO_MAX):
            yield part, min(_ZERO_MAX, at + length - part)


def _own_extents(disk: Path, key: Key | None) -> Iterator[tuple[int, int]]:
    """(offset, length) of what the top layer of ``disk`` holds, zeros included: they hide the base, too.

    In parts, as the map of a large fragmented disk is more text than a child may write.
    """
    for start in range(0, _info(disk)["virtual-size"], _MAP_PART):
        argv = ["--output=json", f"--start-offset={start}", f"--max-length={_MAP_PART}", *keys.opened(disk, (key,))]
        done = keys.run(["qemu-img", "map"], *argv, keys=(key,), timeout_s=_TIMEOUT_S)
        for each in json.loads(done.stdout):
            if each["depth"] == 0 and (each.get("present", True) or each["zero"]):
                yield each["start"], each["length"]


def _info(disk: Path) -> dict[str, Any]:
    argv = ["qemu-img", "info", "--output=json", "-f", "qcow2", str(disk)]
    found: dict[str, Any] = json.loads(run(argv, timeout_s=_TIMEOUT_S).stdout)
    return found
