"""Disk files: what they are, and the work qemu-img does on them.

A file that is to be (overlay, copy) is written under a partial name that carries the attempt, made durable, then
renamed: under its own name a disk is always whole. Formats are read from magic bytes here and always said to
qemu-img; it is never left to guess one, as a guest can write any header into a raw disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import Cancelled, Conflict, HypervisorRefused, Invalid, NotFound
from hdcs_tasks.hypervisor import keys, overlays, processes
from hdcs_tasks.hypervisor.headers import Read, read_header, reader
from hdcs_tasks.hypervisor.keys import Key
from hdcs_tasks.hypervisor.processes import Cancel, Percent

Progress = Callable[[float, str, float | None], None]
"""Called with percent (0 to 100), phase, and the seconds still to go if known."""

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")
CHAIN_MAX = 64
_QUICK_S = 60.0
_LONG_S = 6 * 3600.0
_PROBE_MEMORY_MIB = 1024
_PROBE_CPU_S = 10
_HASH_BYTES = 4 << 20


@dataclass(frozen=True)
class DiskInfo:
    """What a disk file is. ``virtual_bytes``: what a guest sees; ``file_bytes``: what it takes on the storage."""

    path: Path
    format: str
    virtual_bytes: int
    file_bytes: int
    backing: Path | None = None
    backing_format: str | None = None
    bitmaps: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckResult:
    """What ``qemu-img check`` counted. Leaks cost space only; corruptions and errors cost data."""

    corruptions: int
    leaks: int
    errors: int

    @property
    def clean(self) -> bool:
        return self.corruptions == 0 and self.errors == 0


def _refuse(path: Path, why: str, advice: str = "Use a plain disk file of a known format") -> Invalid:
    return Invalid(f"{path} is not usable as a disk: {why}", next=advice)


def sniff(path: Path) -> str:
    """The format by magic bytes; "raw" for anything unknown. Raises NotFound, Invalid (no regular file)."""
    try:
        # Not blocking, as a named pipe would: what strangers left in the import folder is not trusted.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _refuse(path, "not a regular file")
            size = os.fstat(file.fileno()).st_size
            return _format(path, reader(file.fileno(), size), size)
    except FileNotFoundError:
        raise NotFound(f"no disk at {path}", next="Check the storage's mount and the name") from None
    except OSError as error:
        raise _refuse(path, str(error)) from error


def _format(path: Path, read: Read, size_bytes: int) -> str:
    try:
        return read_header(read, size_bytes).format
    except Invalid as error:
        raise _refuse(path, error.message, error.next) from error


def _image(*arguments: str | Path, timeout_s: float = _QUICK_S, **options: Any) -> processes.Finished:
    return processes.run(["qemu-img", *map(str, arguments)], timeout_s=timeout_s, **options)


def probe(path: Path, *, root: Path | None = None, fmt: str | None = None) -> DiskInfo:
    """What the disk at ``path`` is; ``root``: neither it nor its backing image may lie outside.

    ``fmt`` must be said for a raw disk, which has no magic. qemu-img runs under limits, as images come from
    strangers. Raises Invalid (no image, another format, foreign files), NotFound.
    """
    found = sniff(path)
    if fmt is not None and fmt not in FORMATS:
        raise Invalid(f"disk format {fmt!r} is not known", next=f"Use {', '.join(FORMATS)}")
    if found != (fmt or found) or (found == "raw" and fmt is None):
        hint = "Check the file; a raw disk becomes an image with: qemu-img convert -f raw -O qcow2 FILE NEW"
        raise _refuse(path, f"its content is {found}, not {fmt or 'an image'}", hint)
    _check_inside(path, path, root)
    try:
        answer = _image(
            "info", "-U", "-f", found, "--output=json", path.absolute(),
            memory_mib=_PROBE_MEMORY_MIB, cpu_s=_PROBE_CPU_S,
        )  # fmt: skip
        data = json.loads(answer.stdout)
    except (HypervisorRefused, ValueError) as error:
        raise _refuse(path, str(error)) from error
    specific = (data.get("format-specific") or {}).get("data") or {}
    _check_extents(path, specific, root)
    backing = data.get("full-backing-filename") or data.get("backing-filename")
    if backing is not None:
        _check_backing(path, str(backing), data.get("backing-filename-format"), root)
    return DiskInfo(
        path=path,
        format=found,
        virtual_bytes=int(data["virtual-size"]),
        file_bytes=int(data.get("actual-size", 0)),
        backing=Path(backing) if backing else None,
        backing_format=data.get("backing-filename-format"),
        bitmaps=tuple(b["name"] for b in specific.get("bitmaps") or ()),
    )


def _check_inside(image: Path, path: Path, root: Path | None) -> None:
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise _refuse(image, f"{path} lies outside of the storage {root}", "Import it, or copy what it needs")


def _check_backing(path: Path, backing: str, fmt: str | None, root: Path | None) -> None:
    if not backing.startswith("/") or ":" in backing.split("/")[0]:
        raise _refuse(path, f"its backing image {backing!r} is not a file")
    if fmt not in FORMATS:
        raise _refuse(path, "it does not say its backing image's format", "Rebase it with the format said")
    _check_inside(path, Path(backing), root)


def _check_extents(path: Path, specific: dict[str, Any], root: Path | None) -> None:
    """A VMDK may name any file as its content; only files beside it are its own."""
    for extent in specific.get("extents") or ():
        named = Path(str(extent.get("filename", "")))
        if named.absolute().parent.resolve() != path.absolute().parent.resolve() or named.is_symlink():
            raise _refuse(path, f"its content lies in {named}", "Put all parts of the image into one folder")
        _check_inside(path, named, root)


def chain(path: Path, *, root: Path | None = None) -> list[DiskInfo]:
    """The disk and all images below it, top first. Raises Invalid also for a loop or over 64 layers."""
    found = [probe(path, root=root)]
    while (backing := found[-1].backing) is not None:
        if len(found) >= CHAIN_MAX:
            raise _refuse(path, f"over {CHAIN_MAX} layers or a loop")
        found.append(probe(backing, root=root, fmt=found[-1].backing_format))
    return found


@contextmanager
def partial_file(target: Path, attempt: str = "0") -> Iterator[Path]:
    """A partial name beside ``target``; at the end of the block its file is made durable and gets the name.

    When the block raises, the partial file is removed. ``attempt`` keeps two attempts apart.
    """
    if not attempt.replace("-", "").isalnum():
        raise Invalid(f"{attempt!r} cannot be part of a file name", next="Use letters, digits and '-'")
    partial = target.with_name(f"{target.name}.{attempt}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        sync(partial)
        _publish(partial, target)
        sync(target.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _publish(partial: Path, target: Path) -> None:
    """Give the file its name unless another has it: a rename would put an old attempt's file over a living disk."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise Conflict(f"{target} appeared meanwhile", next="Look at what is there; another attempt made it") from None
    partial.unlink()


def sync(path: Path) -> None:
    """fsync a file, or a folder (its names)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def create_overlay(
    base: Path,
    target: Path,
    *,
    size_bytes: int | None = None,
    bitmap: str | None = None,
    base_format: str | None = None,
    key: Key | None = None,
    attempt: str = "0",
) -> Path:
    """Make ``target`` a qcow2 overlay (linked clone) on ``base``; returns ``target``.

    ``size_bytes`` None: as large as the base. ``key``: the overlay is encrypted with it. ``bitmap``: a persistent dirty
    bitmap that records from the very first write. Being there already on that base is a success; another file
    there is a Conflict. Raises NotFound, Invalid, HypervisorRefused (no space).
    """
    if target.exists():
        present = probe(target)
        if present.backing == base.absolute() and size_bytes in (None, present.virtual_bytes):
            return target
        raise Conflict(f"{target} exists and is no overlay on {base}", next="Delete it first, or choose another name")
    fmt = base_format or sniff(base)
    with partial_file(target, attempt) as partial:
        overlays.write(base, partial, fmt, size_bytes, bitmap, key)
    return target


def create_blank(target: Path, size_bytes: int, *, attempt: str = "0") -> Path:
    """Make ``target`` an empty qcow2 of ``size_bytes``; Conflict when a file is there."""
    if target.exists():
        raise Conflict(f"{target} exists", next="Delete it first, or choose another name")
    with partial_file(target, attempt) as partial:
        _image("create", "-q", "-f", "qcow2", partial, str(size_bytes))
    return target


def _percent_with_eta(on_progress: Progress | None, phase: str) -> Percent | None:
    if on_progress is None:
        return None
    begun = time.monotonic()

    def tell(percent: float) -> None:
        spent = time.monotonic() - begun
        on_progress(percent, phase, spent * (100 - percent) / percent if percent > 0 else None)

    return tell


def convert(
    source: Path,
    fmt: str,
    target: Path,
    *,
    target_format: str = "qcow2",
    backing: Path | None = None,
    compress: bool = False,
    on_progress: Progress | None = None,
    cancelled: Cancel | None = None,
    timeout_s: float = _LONG_S,
    attempt: str = "0",
) -> Path:
    """Copy the content of ``source`` (format ``fmt``) into ``target``, flat or, with ``backing`` (qcow2), only what
    differs from that image; returns ``target``.

    Raises Cancelled, Conflict (``target`` exists), Unavailable (over ``timeout_s``), HypervisorRefused.
    """
    if target.exists():
        raise Conflict(f"{target} exists", next="Delete it first, or choose another name")
    if {fmt, target_format} - set(FORMATS):
        raise Invalid(f"disk formats {fmt!r}, {target_format!r}", next=f"Use {', '.join(FORMATS)}")
    options: list[str | Path] = ["-c"] if compress else []
    if backing is not None:
        options += ["-B", backing.absolute(), "-F", sniff(backing)]
    with partial_file(target, attempt) as partial:
        _image(
            "convert", "-p", "-f", fmt, "-O", target_format, *options, source.absolute(), partial.absolute(),
            timeout_s=timeout_s, cancelled=cancelled, on_percent=_percent_with_eta(on_progress, "disk") or _ignore,
        )  # fmt: skip
    return target


def _ignore(_percent: float) -> None:
    """For a caller who wants no progress: the progress lines must not be kept."""


def copy_image(
    source: Path,
    target: Path,
    *,
    on_progress: Progress | None = None,
    cancelled: Cancel | None = None,
    attempt: str = "0",
) -> str:
    """Copy a file byte by byte, holes kept; returns the SHA-256 of its bytes. Raises Cancelled, Conflict, NotFound."""
    if target.exists():
        raise Conflict(f"{target} exists", next="Delete it first, or choose another name")
    with partial_file(target, attempt) as partial, partial.open("xb") as out:
        digest = _read_all(source, out.write, _percent_with_eta(on_progress, "copy"), cancelled, hole=out.seek)
        out.truncate(source.stat().st_size)
    return digest


def sha256(path: Path, *, on_progress: Progress | None = None, cancelled: Cancel | None = None) -> str:
    """The SHA-256 of a file's bytes, hexadecimal. Raises Cancelled, NotFound."""
    return _read_all(path, None, _percent_with_eta(on_progress, "hash"), cancelled)


def _read_all(
    path: Path,
    write: Callable[[bytes], Any] | None,
    on_percent: Percent | None,
    cancelled: Cancel | None,
    hole: Callable[[int, int], Any] | None = None,
) -> str:
    digest = hashlib.sha256()
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise NotFound(f"no file {path}", next="Check the storage's mount and the name") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        done = 0
        while block := file.read(_HASH_BYTES):
            if cancelled is not None and cancelled():
                raise Cancelled(f"reading {path} was cancelled")
            digest.update(block)
            if hole is not None and block == bytes(len(block)):
                hole(len(block), os.SEEK_CUR)
            elif write is not None:
                write(block)
            done += len(block)
            if on_percent is not None:
                on_percent(min(100.0, 100.0 * done / max(size, 1)))
    return digest.hexdigest()


def check(path: Path, *, cancelled: Cancel | None = None, timeout_s: float = _LONG_S) -> CheckResult:
    """Check a qcow2's structure; it must not be in use. Raises NotFound, Conflict (in use), HypervisorRefused."""
    fmt = sniff(path)
    try:
        answer = _image(
            "check", "-f", fmt, "--output=json", path, timeout_s=timeout_s, cancelled=cancelled, ok=(0, 2, 3)
        )
    except HypervisorRefused as error:
        if "lock" in error.message:
            raise Conflict(f"{path} is in use", next="Stop the guest that runs on it") from error
        raise
    data = json.loads(answer.stdout)
    return CheckResult(int(data.get("corruptions", 0)), int(data.get("leaks", 0)), int(data.get("check-errors", 0)))


def compare(
    one: Path,
    other: Path,
    *,
    formats: tuple[str, str] = ("", ""),
    cancelled: Cancel | None = None,
    timeout_s: float = _LONG_S,
) -> bool:
    """Whether a guest would read the same bytes from both disks; formats are sniffed unless said."""
    first, second = formats[0] or sniff(one), formats[1] or sniff(other)
    answer = _image(
        "compare", "-U", "-f", first, "-F", second, one, other, timeout_s=timeout_s, cancelled=cancelled, ok=(0, 1)
    )
    return answer.exit_code == 0


def rebase_unsafe(path: Path, backing: Path, backing_format: str) -> None:
    """Write another backing image into ``path``'s header without looking at the content of either."""
    _image("rebase", "-u", "-f", "qcow2", "-F", backing_format, "-b", backing.absolute(), path)


def resize(path: Path, size_bytes: int, *, key: Key | None = None) -> None:
    """Grow a qcow2 that is not in use; Invalid when it would shrink."""
    present = probe(path, fmt="qcow2").virtual_bytes
    if size_bytes < present:
        raise Invalid(f"{path} has {present} bytes; {size_bytes} would cut data off", next="Only growing is possible")
    if size_bytes > present:
        argv = ["-q", *keys.opened(path, (key,)), str(size_bytes)]
        keys.run(["qemu-img", "resize"], *argv, keys=(key,), timeout_s=_QUICK_S)


def bitmap_add(path: Path, name: str) -> None:
    """Add a persistent dirty bitmap to a qcow2 that is not in use."""
    _image("bitmap", "--add", "-f", "qcow2", path, name)


def bitmap_remove(path: Path, name: str) -> None:
    """Remove a persistent dirty bitmap from a qcow2 that is not in use."""
    _image("bitmap", "--remove", "-f", "qcow2", path, name)
