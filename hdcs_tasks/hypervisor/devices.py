"""Block devices as sources and targets of images. Writing to one destroys what is on it, so guards fail closed.

The kernel knows best who uses a device: opening it with O_EXCL fails while it, its whole disk or a partition of it is
mounted, swapped to, or claimed by LVM, MD or multipath, in whatever namespace. The rest here says by whom.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hdcs_tasks.errors import Conflict, HypervisorRefused, Invalid, NotFound
from hdcs_tasks.hypervisor.processes import run

_BLKGETSIZE64 = 0x80081272
_BLKROGET = 0x125E
_WIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class Device:
    """A block device: its canonical path, size, and kernel number."""

    path: Path
    size_bytes: int
    number: str


def is_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def look(path: Path) -> Device:
    """The block device at ``path`` (links followed). Raises NotFound, Invalid (no block device), HypervisorRefused."""
    try:
        seen = path.stat()
    except FileNotFoundError:
        raise NotFound(f"there is no device {path}", next="See on that server node: lsblk") from None
    except OSError as error:
        raise Invalid(f"{path} cannot be looked at: {error.strerror}", next="See on that server node: lsblk") from error
    if not stat.S_ISBLK(seen.st_mode):
        raise Invalid(f"{path} is not a block device", next="See on that server node: lsblk")
    with _open(path, os.O_RDONLY) as handle:
        (size,) = struct.unpack("Q", fcntl.ioctl(handle, _BLKGETSIZE64, bytes(8)))
    return Device(path.resolve(), size, f"{os.major(seen.st_rdev)}:{os.minor(seen.st_rdev)}")


@contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    try:
        handle = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise HypervisorRefused(
            f"device {path} cannot be opened: {error.strerror}", next="Is a medium in it, and is it sound?"
        ) from error
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def claimed(path: Path, needed_bytes: int, *, force: bool = False) -> Iterator[Device]:
    """The device for the length of the block, nobody else's: while we hold it nobody can mount it or claim it.

    Raises Conflict (in use, says by what; or it holds something and ``force`` is not given), Invalid (too small, read
    only), NotFound.
    """
    device = look(path)
    if device.size_bytes < needed_bytes:
        raise Invalid(
            f"device {device.path} has {device.size_bytes} bytes, the disk needs {needed_bytes}",
            next="Choose a device at least as large",
        )
    users = list(used_by(device))
    if users:
        raise Conflict(f"device {device.path} is in use: {', '.join(users)}", next="Free it, or choose another")
    try:
        handle = os.open(device.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Conflict(
                f"device {device.path} is in use: the kernel says so", next="See: lsblk, findmnt, dmsetup, mdadm"
            ) from error
        raise HypervisorRefused(
            f"device {device.path} cannot be written: {error.strerror}", next="Is it read only?"
        ) from error
    try:
        (read_only,) = struct.unpack("i", fcntl.ioctl(handle, _BLKROGET, bytes(4)))
        if read_only:
            raise Invalid(f"device {device.path} is read only", next="Choose another")
        held = None if force else content_of(device.path)
        if held:
            raise Conflict(
                f"device {device.path} holds {held}", next="Look at it; add --force to overwrite what is on it"
            )
        yield device
    finally:
        os.close(handle)


def users(path: Path) -> list[str]:
    """In words, who uses the device at ``path`` now; empty: nobody. For one that is only to be read."""
    device = look(path)
    found = list(used_by(device))
    if found:
        return found
    try:
        os.close(os.open(device.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return [f"the kernel says that {device.path} is in use"] if error.errno == errno.EBUSY else []
    return []


def used_by(device: Device) -> Iterator[str]:
    """In words, who uses the device or a partition of it, as far as it shows here."""
    numbers = {device.number: device.path.name}
    folder = Path("/sys/dev/block") / device.number
    for part in sorted(folder.glob("*/partition")):
        with suppress(OSError):
            numbers[(part.parent / "dev").read_text().strip()] = part.parent.name
    for number, name in numbers.items():
        for holder in sorted((Path("/sys/dev/block") / number / "holders").glob("*")):
            yield f"{name} is part of {holder.name}"
    yield from mounted(Path("/proc/self/mountinfo").read_text(), numbers)
    yield from _swapped(numbers)


def mounted(mountinfo: str, numbers: dict[str, str]) -> Iterator[str]:
    """Which of these devices (``{"major:minor": name}``: a disk and its partitions) are mounted where. ``mountinfo``:
    the kernel's table (proc_pid_mountinfo(5): the third field is the device, the fifth the mount point)."""
    for line in mountinfo.splitlines():
        fields = line.split()
        if fields[2] in numbers:
            yield f"{numbers[fields[2]]} is mounted on {fields[4]}"


def _swapped(numbers: dict[str, str]) -> Iterator[str]:
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        with suppress(OSError):
            seen = Path(line.split()[0]).stat()
            number = f"{os.major(seen.st_rdev)}:{os.minor(seen.st_rdev)}"
            if stat.S_ISBLK(seen.st_mode) and number in numbers:
                yield f"{numbers[number]} is swap"


def content_of(path: Path) -> str:
    """What lies on a device, in words (``ext4 file system``, ``gpt partition table``); empty: nothing known."""
    answer = run(["blkid", "-p", "-o", "export", str(path)], timeout_s=60, ok=(0, 2, 8))
    if answer.exit_code == 8:
        return "more than one file system"
    found = dict(line.partition("=")[::2] for line in answer.stdout.splitlines())
    if "PTTYPE" in found and "TYPE" not in found:
        return f"a {found['PTTYPE']} partition table"
    kind = " file system" if found.get("USAGE") == "filesystem" else ""
    return f"{found['TYPE']}{kind}" if "TYPE" in found else ""


def wipe_start(path: Path) -> None:
    """Make a half-written device look empty: nothing shall boot or mount half a disk."""
    with suppress(OSError):
        _zero(path, 0, _WIPE_BYTES)


def wipe_end(device: Device, from_bytes: int) -> None:
    """Remove what an earlier owner has at the very end of a device that is to hold a disk of ``from_bytes``: the second
    copy of a partition table, the mark of an MD array. It would be found there, and believed. HypervisorRefused."""
    at = max(from_bytes, device.size_bytes - _WIPE_BYTES)
    try:
        if at < device.size_bytes:
            _zero(device.path, at, device.size_bytes - at)
    except OSError as error:
        raise HypervisorRefused(
            f"the end of device {device.path} cannot be written: {error.strerror}", next="Is the device sound?"
        ) from error


def _zero(path: Path, at: int, length: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(at)
        while length > 0:
            length -= file.write(bytes(length)) or 0
        os.fsync(file.fileno())
