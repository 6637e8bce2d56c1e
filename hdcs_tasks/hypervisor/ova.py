"""OVA: a tar of an OVF, a manifest of hashes (.mf) and disks. Read where it lies: nothing is unpacked to the storage.

Members are never written under their own names, so none can lead elsewhere; one that would is refused all the same, as
is everything but plain files of the size the archive really has.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from hdcs_tasks.errors import Cancelled, Invalid, NotFound
from hdcs_tasks.hypervisor import ovf
from hdcs_tasks.hypervisor.processes import Cancel, Percent

MEMBERS_MAX = 64
MANIFEST_MAX_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
_HASHES = {"sha1": hashlib.sha1, "sha256": hashlib.sha256, "sha512": hashlib.sha512}
_LINE = re.compile(r"^\s*(SHA1|SHA256|SHA512)\s*\(([^)]{1,255})\)\s*=\s*([0-9a-fA-F]{40,128})\s*$")


@dataclass(frozen=True)
class Member:
    name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Archive:
    """What an OVA holds. ``hashes``: file → (algorithm, hex digest), empty where it has no manifest."""

    path: Path
    machine: ovf.Machine
    members: dict[str, Member]
    ovf_name: str
    hashes: dict[str, tuple[str, str]]

    def disk(self, number: int | None) -> tuple[ovf.OvfDisk, Member]:
        """The disk to import and where it lies: the only one, or the one of this number from 1. Raises Invalid."""
        disks = self.machine.disks
        if number is None and len(disks) != 1:
            raise Invalid(
                f"{self.path.name} has {len(disks)} disks, an image has one", next="Choose with --disk 1, --disk 2, …"
            )
        if not 1 <= (number or 1) <= len(disks):
            raise Invalid(f"{self.path.name} has no disk {number}", next=f"It has {len(disks)}, counted from 1")
        disk = disks[(number or 1) - 1]
        if disk.file is None:
            raise Invalid(f"disk {number or 1} of {self.path.name} is empty", next="Choose one with content")
        if disk.compressed:
            raise Invalid(f"disk {disk.file} is compressed in the archive", next="Unpack the OVA, then import the disk")
        if disk.file not in self.members:
            raise Invalid(f"{self.path.name} lacks {disk.file!r}, which its OVF names", next="Copy the OVA again")
        return disk, self.members[disk.file]


def _refuse(path: Path, why: str) -> Invalid:
    return Invalid(f"{path} is refused: {why}", next="Export the machine again as one OVA")


def read(path: Path) -> Archive:
    """What the OVA at ``path`` holds; hashes are read, not yet checked. Raises Invalid, NotFound."""
    try:
        with path.open("rb") as file:
            members = _members(path, file)
            found = [name for name in members if name.lower().endswith(".ovf")]
            if len(found) != 1:
                raise _refuse(path, f"it has {len(found)} OVF documents")
            machine = ovf.read(_content(path, file, members[found[0]], ovf.OVF_MAX_BYTES))
            hashes = _hashes(path, file, members)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}", next="Check its name and folder on that server node") from None
    except OSError as error:
        raise _refuse(path, error.strerror or str(error)) from error
    for disk in machine.disks:
        if disk.file is not None and hashes and disk.file not in hashes:
            raise _refuse(path, f"its manifest says nothing of {disk.file}")
    return Archive(path, machine, members, found[0], hashes)


def _members(path: Path, file: BinaryIO) -> dict[str, Member]:
    size = path.stat().st_size
    found: dict[str, Member] = {}
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _Bounded(file)), mode="r:") as archive:
            for each in archive:
                if len(found) >= MEMBERS_MAX:
                    raise _refuse(path, f"it has over {MEMBERS_MAX} members")
                plain = each.isreg() and not each.issparse() and each.name.isprintable() and each.name[:1] not in ".-"
                if not plain or "/" in each.name or "\\" in each.name or each.name in found:
                    raise _refuse(path, f"its member {each.name!r} is no plain file of its own name")
                if each.size < 0 or each.offset_data + each.size > size:
                    raise _refuse(path, f"its member {each.name!r} is cut off")
                found[each.name] = Member(each.name, each.offset_data, each.size)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _refuse(path, f"it is no plain tar archive: {error}") from error
    return found


class _Bounded:
    """A file of which tarfile cannot be made to read a header of any size into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.tell, self.seek, self._read = file.tell, file.seek, file.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MANIFEST_MAX_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _content(path: Path, file: BinaryIO, member: Member, max_bytes: int) -> bytes:
    if member.size_bytes > max_bytes:
        raise _refuse(path, f"its {member.name} has {member.size_bytes} bytes")
    file.seek(member.offset)
    return file.read(member.size_bytes)


def _hashes(path: Path, file: BinaryIO, members: dict[str, Member]) -> dict[str, tuple[str, str]]:
    found = [member for name, member in members.items() if name.lower().endswith(".mf")]
    if not found:
        return {}
    if len(found) > 1:
        raise _refuse(path, f"it has {len(found)} manifests")
    hashes: dict[str, tuple[str, str]] = {}
    for line in _content(path, file, found[0], MANIFEST_MAX_BYTES).decode(errors="replace").splitlines():
        if not line.strip():
            continue
        match = _LINE.match(line)
        if match is None or len(match[3]) != _HASHES[match[1].lower()]().digest_size * 2:
            raise _refuse(path, f"its manifest cannot be read: {line[:80]!r}")
        if match[2] not in members:
            raise _refuse(path, f"it lacks {match[2]!r}, which its manifest names")
        hashes[match[2]] = (match[1].lower(), match[3].lower())
    return hashes


def verify(archive: Archive, *, on_percent: Percent | None = None, cancelled: Cancel | None = None) -> None:
    """Hold every member the manifest names against its hash. Raises Invalid, Cancelled."""
    total = sum(archive.members[name].size_bytes for name in archive.hashes) or 1
    done = 0
    with archive.path.open("rb") as file:
        for name, (algorithm, wanted) in archive.hashes.items():
            digest = _HASHES[algorithm]()
            for block in _blocks(file, archive.members[name]):
                if cancelled is not None and cancelled():
                    raise Cancelled(f"reading {archive.path} was cancelled")
                digest.update(block)
                done += len(block)
                if on_percent is not None:
                    on_percent(100.0 * done / total)
            if digest.hexdigest() != wanted:
                raise _refuse(archive.path, f"{name} is not what its manifest says: its {algorithm} differs")


def _blocks(file: BinaryIO, member: Member) -> Iterator[bytes]:
    file.seek(member.offset)
    left = member.size_bytes
    while left and (block := file.read(min(_BLOCK_BYTES, left))):
        left -= len(block)
        yield block


# --- writing


class _Reader:
    """A file read in blocks that can be hashed, told of and cancelled on its way into the archive."""

    def __init__(self, file: BinaryIO, told: Callable[[int], None]) -> None:
        self.file, self.told, self.digest = file, told, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        self.told(len(block))
        return block


@contextmanager
def _archive(target: Path) -> Iterator[tarfile.TarFile]:
    with target.open("xb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        yield archive


def write(
    target: Path, machine: ovf.Machine, disk: Path, *, on_percent: Percent | None = None,
    cancelled: Cancel | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write the OVA ``target`` of one machine with one ``disk`` (a streamOptimized VMDK); SHA-256 by member name.

    OVF first, as readers expect it; the manifest last, when every hash is known. Raises Cancelled.
    """
    (named,) = machine.disks
    assert named.file is not None
    size, done = disk.stat().st_size, 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        if cancelled is not None and cancelled():
            raise Cancelled(f"writing {target} was cancelled")
        if on_percent is not None:
            on_percent(min(100.0, 100.0 * done / max(size, 1)))

    text = ovf.write(machine, {named.file: size})
    name = f"{machine.name}.ovf"
    hashes = {name: hashlib.sha256(text).hexdigest()}
    with _archive(target) as archive, disk.open("rb") as file:
        _add(archive, name, io.BytesIO(text), len(text))
        reader = _Reader(file, told)
        _add(archive, named.file, reader, size)
        hashes[named.file] = reader.digest.hexdigest()
        manifest = "".join(f"SHA256({each})= {digest}\n" for each, digest in hashes.items()).encode()
        _add(archive, f"{machine.name}.mf", io.BytesIO(manifest), len(manifest))
    return hashes


def _add(archive: tarfile.TarFile, name: str, content: object, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    archive.addfile(member, content)  # type: ignore[arg-type]
