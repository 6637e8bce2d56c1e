"""A lock per VM on its server node: two attempts never touch one guest at once, whatever Redis believes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from hdcs_tasks.errors import Invalid, Unavailable

_POLL_S = 0.05


@contextmanager
def vm_lock(state_dir: Path, vm_id: str, timeout_s: float = 0) -> Iterator[None]:
    """Hold ``<state_dir>/locks/<vm_id>`` inside the block; raises Unavailable when another has it for ``timeout_s``.

    The kernel frees it when the process dies. It is not handed to children (they run with closed descriptors), and
    one thread waits for another's as for another process's. The file stays: removing it would split the lock.
    """
    try:
        name = str(UUID(vm_id))
    except (ValueError, AttributeError, TypeError):
        raise Invalid(f"{vm_id!r} is not a VM id", next="A VM id is a UUID; see: hdcs vm list") from None
    folder = state_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _take(handle, name, timeout_s)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)  # only for the one who looks why it is locked
        yield
    finally:
        os.close(handle)


def _take(handle: int, vm_id: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
                raise Unavailable(
                    f"VM {vm_id} is being worked on by process {holder} of this server node",
                    next="Wait for that work to end; see: hdcs op list",
                ) from None
        time.sleep(_POLL_S)
