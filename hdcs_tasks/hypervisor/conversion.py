"""One disk image made into another: the one place where qemu-img converts what strangers made, or what leaves.

The child runs under limits, dies with its worker, and is ended when cancelled or when it would fill the storage: a full
one pauses every guest on it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hdcs_tasks.errors import Cancelled, Conflict, NoCapacity
from hdcs_tasks.hypervisor import disks, keys
from hdcs_tasks.hypervisor.probing import Source
from hdcs_tasks.hypervisor.processes import Cancel, Percent

OPTIONS = {
    "vmdk": ("-o", "subformat=monolithicSparse,adapter_type=lsilogic"),
    "stream": ("-o", "subformat=streamOptimized,adapter_type=lsilogic"),
    # Else the size is rounded up to a geometry of cylinders, and the disk is no longer the same.
    "vpc": ("-o", "force_size=on"),
    "qcow2": ("-o", "compat=1.1,lazy_refcounts=off"),
}
SPACE_LEFT_BYTES = 64 << 20
MEMORY_MIB = 4096
FILES_MAX = 1024
_LOOK_EVERY_S = 0.5

Told = Callable[[float, str, float | None], None]


@dataclass
class Watch:
    """What goes with a long conversion: whom to tell, who may end it, and which storage must not run full."""

    on_progress: Told | None = None
    cancelled: Cancel | None = None
    storage: Path | None = None
    timeout_s: float = 6 * 3600.0
    _looked: float = field(default=0.0, init=False)

    def stop(self) -> bool:
        """Asked ten times a second. Raises NoCapacity."""
        if self.storage is not None and time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._check_space(self.storage)
        return self.cancelled is not None and self.cancelled()

    def go_on(self, what: str) -> None:
        """Between two blocks of work of our own: raises Cancelled, NoCapacity."""
        if self.stop():
            raise Cancelled(f"{what} was cancelled")

    def _check_space(self, storage: Path, needed_bytes: int = 0) -> None:
        seen = os.statvfs(storage)
        free = seen.f_bavail * seen.f_frsize
        if free < needed_bytes + SPACE_LEFT_BYTES:
            raise NoCapacity(
                f"the storage at {storage} is too full: {free >> 20} MiB are free, "
                f"{(needed_bytes + SPACE_LEFT_BYTES) >> 20} are needed",
                next="Delete VMs, images or backups there, or add storage",
            )

    def need(self, needed_bytes: int | None) -> None:
        """NoCapacity unless so much may still be written."""
        if self.storage is not None:
            self._check_space(self.storage, needed_bytes or 0)

    def part(self, first: float, last: float, phase: str) -> Percent:
        """Percent of one part of the work, told as percent of the whole with what is still to go."""
        begun = time.monotonic()

        def tell(percent: float) -> None:
            if self.on_progress is None:
                return
            spent = time.monotonic() - begun
            eta_s = spent * (100.0 - percent) / percent if percent > 1 else None
            self.on_progress(first + (last - first) * percent / 100.0, phase, eta_s)

        return tell

    def told(self, first: float, last: float) -> Told:
        """As ``part``, for work that tells its own phase and time."""

        def tell(percent: float, phase: str, eta_s: float | None) -> None:
            if self.on_progress is not None:
                self.on_progress(first + (last - first) * percent / 100.0, phase, eta_s)

        return tell


def convert(
    source: Source, target: Path, fmt: str, watch: Watch, percent: Percent, *, compress: bool = False,
    existing: bool = False, max_bytes: int | None = None,
) -> None:  # fmt: skip
    """Write the flattened content of ``source`` to the new file ``target``, or over an ``existing`` device.

    ``fmt``: of FORMATS, or "stream" (a VMDK as an OVA has it). ``max_bytes``: the largest file it may become. What is
    half written stays: the caller's to remove. Raises Cancelled, NoCapacity, HypervisorRefused, Unavailable.
    """
    options = [*OPTIONS.get(fmt, ()), *(["-c"] if compress else []), *(["-n", "-t", "none"] if existing else [])]
    output = "vmdk" if fmt == "stream" else fmt
    keys.run(
        ["qemu-img", "convert"], "-p", *options, "-O", output, *source.arguments(), target.absolute(),
        keys=(source.key,), timeout_s=watch.timeout_s, on_percent=percent, cancelled=watch.stop,
        memory_mib=MEMORY_MIB, file_bytes=max_bytes, files_max=FILES_MAX,
    )  # fmt: skip


def publish(partial: Path, target: Path, *, force: bool = False) -> None:
    """Make a whole file durable and give it its name; Conflict where another has it, unless ``force`` replaces it."""
    disks.sync(partial)
    if force:
        os.replace(partial, target)
    else:
        try:
            os.link(partial, target)
        except FileExistsError:
            raise Conflict(f"{target} exists", next="Choose another name, or add --force to replace it") from None
        partial.unlink()
    disks.sync(target.parent)


def sweep(paths: Iterable[Path], *, but: Sequence[Path] = ()) -> list[Path]:
    """Remove what dead attempts left (files, or folders of files); returns what went."""
    gone = []
    for path in paths:
        if path in but:
            continue
        if path.is_dir() and not path.is_symlink():
            sweep(path.iterdir())
            with suppress(OSError):
                path.rmdir()
        else:
            path.unlink(missing_ok=True)
        gone.append(path)
    return gone
