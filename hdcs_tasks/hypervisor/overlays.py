"""Empty qcow2 overlays. What qemu-img makes twice on the same base is the same bytes, so they are kept and
written again: a clone then waits for no child process.

Kept is what a whole file was when it had just been made and nobody had opened it, per base (path, inode, size, times),
format, size and bitmap: a base that was replaced or written to is another one. Never kept: an encrypted overlay, whose
key must be its own, and one on a base that changed in the last seconds, as its times may not show the next change.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from pathlib import Path

from hdcs_tasks.errors import HypervisorRefused
from hdcs_tasks.hypervisor import keys
from hdcs_tasks.hypervisor.keys import Key

_KEPT = 16
_KEPT_MAX_BYTES = 4 << 20
_SETTLED_S = 2.0
_BLOCK = 65536
_CREATE_S = 60.0
_BITMAP_S = 60.0

_kept: OrderedDict[tuple[object, ...], bytes] = OrderedDict()  # a race of two threads makes one twice, no more


def write(base: Path, path: Path, fmt: str, size_bytes: int | None, bitmap: str | None, key: Key | None) -> None:
    """Make ``path``, which must not exist, an empty overlay on ``base`` of format ``fmt``; as ``disks.create_overlay``.

    Raises HypervisorRefused, Unavailable."""
    name = None if key is not None else _name(base, fmt, size_bytes, bitmap)
    if name is not None and (content := _kept.get(name)) is not None:
        _write_out(path, content)
        return
    _create(base, path, fmt, size_bytes, bitmap, key)
    if name is not None and name == _name(base, fmt, size_bytes, bitmap) and path.stat().st_size <= _KEPT_MAX_BYTES:
        _kept[name] = path.read_bytes()
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)


def _name(base: Path, fmt: str, size_bytes: int | None, bitmap: str | None) -> tuple[object, ...] | None:
    """What the overlay depends on; None where that cannot be told."""
    try:
        with base.open("rb") as file:  # a network file system looks anew only at an open
            seen = os.fstat(file.fileno())
    except OSError:
        return None  # qemu-img says it better
    if time.time() - max(seen.st_mtime, seen.st_ctime) < _SETTLED_S:
        return None
    place = (str(base.absolute()), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
    return (*place, fmt, size_bytes, bitmap)


def _create(base: Path, path: Path, fmt: str, size_bytes: int | None, bitmap: str | None, key: Key | None) -> None:
    size = [] if size_bytes is None else [str(size_bytes)]
    keys.run(
        ["qemu-img", "create"], "-q", "-f", "qcow2", *keys.encryption(key), "-F", fmt, "-b", base.absolute(),
        path, *size, keys=(key,), timeout_s=keys.CREATE_S if key else _CREATE_S,
    )  # fmt: skip
    if bitmap is not None:
        argv = [*keys.opened(path, (key,)), bitmap]
        keys.run(["qemu-img", "bitmap"], "--add", *argv, keys=(key,), timeout_s=_BITMAP_S)


def _write_out(path: Path, content: bytes) -> None:
    """Holes stay holes, as qemu-img leaves them."""
    try:
        with path.open("xb") as file:
            for at in range(0, len(content), _BLOCK):
                block = content[at : at + _BLOCK]
                if block.strip(b"\0"):
                    file.seek(at)
                    file.write(block)
            file.truncate(len(content))
    except OSError as error:
        raise HypervisorRefused(
            f"cannot write {path}: {os.strerror(error.errno or 0)}", next="Check the storage's mount and its free space"
        ) from error
