"""Images of strangers: what one is, before anything is done with it. Fails closed.

Order matters: the header's names are read from bytes (``headers``) and judged, for every image of a chain, before
qemu-img opens the first; then qemu-img looks at each under limits, with its format said. Only files of one folder tree
(``root``) may be part of an image: an overlay in import/ on somebody's VM disk is as foreign as /etc/shadow.

And it must be whole: what lies past the end of a file that was cut off reads as zeroes, without any error.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import HypervisorRefused, Invalid, NotFound
from hdcs_tasks.hypervisor import keys
from hdcs_tasks.hypervisor.headers import Header, read_header, reader, vdi_end_bytes
from hdcs_tasks.hypervisor.keys import Key
from hdcs_tasks.hypervisor.processes import Cancel, Finished, run

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")
_CHECKED = ("qcow2", "vmdk", "vdi", "vhdx")
_SECTOR = 512
CHAIN_MAX = 16
PARTS_MAX = 256
MEMORY_MIB = 1024
CPU_S = 10
TIMEOUT_S = 60.0
CHECK_CPU_S = 60
CHECK_TIMEOUT_S = 600.0
"""A check reads every table, no content: 0.7 s for a qcow2 of 500 GiB whose clusters are all there."""
FILES_MAX = 256
_ADVICE = "Check the file where it comes from: qemu-img check"


@dataclass(frozen=True)
class Source:
    """An image to be read: a file, a block device, or ``length_bytes`` at ``offset`` inside of a file (an OVA).

    ``key``: of a disk of ours that is encrypted; a stranger's never is.
    """

    path: Path
    format: str
    offset: int = 0
    length_bytes: int | None = None
    key: Key | None = None

    def arguments(self) -> list[str]:
        """How qemu-img is told to read it: the format said, nothing left to guess."""
        if self.key is not None:
            return keys.opened(self.path, (self.key,))
        if self.length_bytes is None:
            return ["-f", self.format, str(self.path)]
        name = str(self.path).replace(",", ",,")
        return ["--image-opts", (
            f"driver={self.format},file.driver=raw,file.offset={self.offset},file.size={self.length_bytes},"
            f"file.file.driver=file,file.file.filename={name}"
        )]  # fmt: skip


@dataclass(frozen=True)
class Probed:
    """What an image is. ``virtual_bytes``: what a guest sees; ``needed_bytes``: what it takes as a qcow2 (None: not to
    be known before it is read, of a device); ``chain``: its files, top first."""

    source: Source
    virtual_bytes: int
    needed_bytes: int | None
    chain: tuple[Path, ...]

    @property
    def format(self) -> str:
        return self.source.format


def probe(
    path: Path, root: Path, *, fmt: str | None = None, max_bytes: int, offset: int = 0, length_bytes: int | None = None,
    cancelled: Cancel | None = None,
) -> Probed:  # fmt: skip
    """What the image at ``path`` is, if it may be read and is whole; every file it is made of must lie below ``root``.

    ``fmt``: the format it must have; None: what its header says, and "raw" only for a block device or a name that says
    so (.raw, .img, .dd). ``offset``, ``length_bytes``: a member of an archive, which may name no other file at all.
    Raises Invalid, NotFound, Cancelled, Unavailable (the check took too long).
    """
    inside = length_bytes is not None
    header, is_device = _look(path, root, offset, length_bytes)
    found = _agreed(path, header, fmt, is_device)
    source = Source(path.absolute(), found, offset, length_bytes)
    chain = [source]
    if inside and (header.parts or header.backing):
        raise _refuse(path, "an image inside of an archive names other files", "Export it as one file per disk")
    _check_parts(path, header, root)
    _follow(chain, header, root)
    size = _virtual_bytes(source)
    if not 0 < size <= max_bytes:
        raise _refuse(
            path, f"its virtual size is {size} bytes, the limit {max_bytes}", "HDCS_IMAGE_MAX_GIB sets the limit"
        )
    for image in chain:
        _check_whole(image, cancelled)
    needed = None if is_device else _needed_bytes(source)
    return Probed(source, size, needed, (path, *(image.path for image in chain[1:])))


def _refuse(path: Path, why: str, advice: str) -> Invalid:
    return Invalid(f"{path} is refused: {why}", next=advice)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Not blocking, as a named pipe would: what strangers left in the import folder is not trusted."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}", next="Check its name and folder on that server node") from None
    except OSError as error:
        raise _refuse(path, error.strerror or str(error), "Check its rights and type") from error
    try:
        yield handle, os.fstat(handle)
    finally:
        os.close(handle)


def _look(path: Path, root: Path, offset: int, length_bytes: int | None) -> tuple[Header, bool]:
    check_inside(path, path, root)
    with _opened(path) as (handle, seen):
        is_device = stat.S_ISBLK(seen.st_mode)
        if not (is_device or stat.S_ISREG(seen.st_mode)):
            raise _refuse(path, "it is neither a file nor a block device", "Name the image itself")
        size = length_bytes if length_bytes is not None else os.lseek(handle, 0, os.SEEK_END)
        try:
            header = read_header(reader(handle, size, offset), size)
        except Invalid as error:
            raise Invalid(f"{path}: {error.message}", next=error.next) from error
        except OSError as error:
            raise _refuse(path, error.strerror or str(error), "Is the disk behind it sound?") from error
    if header.encrypted:
        raise _refuse(path, "it is encrypted", "Decrypt it where its key is: qemu-img convert")
    return header, is_device


def _said(fmt: str) -> str:
    """What people call a format: vpc is qemu-img's word."""
    return "vhd" if fmt == "vpc" else fmt


def _agreed(path: Path, header: Header, fmt: str | None, is_device: bool) -> str:
    """The format that header, caller and name agree on."""
    if fmt is not None and fmt not in FORMATS:
        raise Invalid(f"disk format {fmt!r} is not known", next=f"Use {', '.join(FORMATS)}")
    if fmt is not None and fmt != header.format:
        raise _refuse(
            path,
            f"its content is {_said(header.format)}, not {_said(fmt)}",
            "Say what it is, or leave the format to its header",
        )
    plain = is_device or path.suffix.lower() in (".raw", ".img", ".dd", ".bin")
    if header.format == "raw" and fmt is None and not plain:
        raise _refuse(
            path, "what it is is not known: its header is of no image format",
            "If it is a raw disk, say so: --source-format raw",
        )  # fmt: skip
    return header.format


def check_inside(image: Path, path: Path, root: Path) -> None:
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise _refuse(image, f"{path!r} cannot be followed: {error}", "Name plain files") from error
    if not real.is_relative_to(root.resolve()):
        raise _refuse(image, f"{path} lies outside of {root}", "Copy what it needs there, or flatten it first")


def _check_parts(path: Path, header: Header, root: Path) -> None:
    """A VMDK's extents: plain files beside it, no links, no addresses."""
    if len(header.parts) > PARTS_MAX:
        raise _refuse(path, f"it has {len(header.parts)} parts", "Convert it to one file first")
    if header.format == "vmdk" and header.parts == () and path.stat().st_size < 512:
        raise _refuse(path, "it has no content", "Copy it again")
    for named in header.parts:
        name, part = named.name, path.parent / named.name
        plain = name.isprintable() and "/" not in name and ":" not in name and name not in (".", "..")
        if not plain or part.is_symlink():
            raise _refuse(path, f"its content lies in {name!r}", "Put all parts into one folder, as plain files")
        check_inside(path, part, root)
        with _opened(part) as (_, seen):
            if not stat.S_ISREG(seen.st_mode):
                raise _refuse(path, f"its part {name!r} is no plain file", "Copy the parts as files")
            if seen.st_size < named.end_bytes:
                raise _refuse(
                    path, f"its part {name!r} is cut off: it has {seen.st_size} bytes of {named.end_bytes}",
                    "Copy that part again, whole",
                )  # fmt: skip


def _follow(chain: list[Source], header: Header, root: Path) -> None:
    """Every image below, by names read from headers; each must be a plain file below ``root`` of the said format."""
    top = chain[0].path
    while header.backing is not None:
        name, fmt = header.backing, header.backing_format
        if len(chain) >= CHAIN_MAX:
            raise _refuse(top, f"it stands on over {CHAIN_MAX} images, or on itself", "Flatten it first")
        if not name.isprintable() or ":" in name.split("/")[0]:
            raise _refuse(top, f"its backing image {name!r} is not a file", "Flatten it where that can be read")
        if fmt not in FORMATS:
            raise _refuse(
                top, f"it does not say the format of its backing image {name!r}",
                "Say it: qemu-img rebase -u -F FORMAT -b NAME",
            )  # fmt: skip
        below = chain[-1].path.parent / name
        header, is_device = _look_below(top, below, root)
        if is_device or header.format != fmt:
            what = "a device" if is_device else header.format
            raise _refuse(top, f"its backing image {name!r} is {what}, not {fmt}", "Flatten it first")
        _check_parts(below, header, root)
        chain.append(Source(below.absolute(), fmt))


def _look_below(top: Path, below: Path, root: Path) -> tuple[Header, bool]:
    check_inside(top, below, root)
    return _look(below, root, 0, None)


# --- whole or cut off


def _check_whole(source: Source, cancelled: Cancel | None) -> None:
    """Invalid unless all that the image's own tables name is there. A raw one has none; a VHD, qemu-img does not open
    if it was cut off; of a VMDK in flat parts see ``_check_parts``."""
    with _opened(source.path) as (handle, _):
        size = source.length_bytes
        size = os.lseek(handle, 0, os.SEEK_END) if size is None else size
        if source.format == "raw" and size % _SECTOR:
            raise _refuse(
                source.path, f"its {size} bytes are no whole number of sectors: it is cut off, or no disk",
                f"Copy it again; if it is whole, fill its last sector: truncate -s %{_SECTOR} FILE",
            )  # fmt: skip
        # qemu-img's check of a VDI compares no lengths.
        if source.format == "vdi" and size < (end := vdi_end_bytes(reader(handle, size, source.offset))):
            raise _refuse(source.path, f"it is cut off: it has {size} bytes of {end}", "Copy it again, whole")
    if source.format in _CHECKED:
        _check(source, cancelled)


def _check(source: Source, cancelled: Cancel | None) -> None:
    """What ``qemu-img check`` finds wrong; clusters that leaked (exit code 3) take room and harm nobody."""
    answer = _limited(
        source, "check", "--output=json", timeout_s=CHECK_TIMEOUT_S, cpu_s=CHECK_CPU_S, ok=(0, 1, 2, 3),
        cancelled=cancelled,
    )  # fmt: skip
    if answer.exit_code in (0, 3):
        return
    lines = answer.stderr.splitlines() or ["nothing more"]
    said = [line for line in lines if "ERROR" in line] or lines
    raise _refuse(
        source.path, f"it is cut off or damaged; qemu-img check says: {said[-1]}",
        "Copy it again, whole, and compare hashes; where the original is so too: qemu-img check -r all",
    )  # fmt: skip


# --- qemu-img, under limits


def _virtual_bytes(source: Source) -> int:
    return int(_ask(source, "info", "-U", "--output=json")["virtual-size"])


def _needed_bytes(source: Source) -> int:
    return int(_ask(source, "measure", "-O", "qcow2", "--output=json")["required"])


def _ask(source: Source, verb: str, *options: str) -> dict[str, Any]:
    answer = _limited(source, verb, *options)
    try:
        return dict(json.loads(answer.stdout))
    except ValueError as error:
        raise _refuse(source.path, str(error), _ADVICE) from error


def _limited(
    source: Source, verb: str, *options: str, timeout_s: float = TIMEOUT_S, cpu_s: int = CPU_S,
    ok: Sequence[int] = (0,), cancelled: Cancel | None = None,
) -> Finished:  # fmt: skip
    try:
        return run(
            ["qemu-img", verb, *options, *source.arguments()], timeout_s=timeout_s, memory_mib=MEMORY_MIB, cpu_s=cpu_s,
            file_bytes=0, files_max=FILES_MAX, ok=ok, cancelled=cancelled,
        )  # fmt: skip
    except HypervisorRefused as error:
        raise _refuse(source.path, str(error), _ADVICE) from error
