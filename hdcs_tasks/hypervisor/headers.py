"""What a disk image's own header says, read before any program opens it: format, size, and other files it names.

qemu-img opens whatever a header names: a VMDK's extents may be any file, device or network address. So names are read
here first, from bytes, and judged by ``probing``. Nothing is opened, followed or believed.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from hdcs_tasks.errors import Invalid

Read = Callable[[int, int], bytes]
"""``read(offset, length)``: bytes of the image, fewer at its end."""

NAME_MAX_BYTES = 1023
_DESCRIPTOR_MAX_BYTES = 1 << 20
_SECTOR = 512
_QCOW2_DATA_FILE = 1 << 2
_QCOW2_ENCRYPTED = 32
_BACKING_FORMAT = 0xE2792ACA
_EXTENSIONS_MAX = 64
_EXTENT = re.compile(
    r'^\s*(?:RW|RDONLY|NOACCESS)\s+(\d+)\s+([A-Z]+)(?:\s+"([^"]*)"(?:[ \t]+(\d+))?)?', re.MULTILINE
)  # fmt: skip
_FLAT = ("FLAT", "VMFS")
_PARENT = re.compile(r"^\s*parentCID\s*=\s*([0-9a-fA-F]+)", re.MULTILINE)
_NO_PARENT = 0xFFFFFFFF
_VDI_NO_BLOCK = 0xFFFFFFFE
"""From here on: a block that is nowhere in the file, and reads as zeroes."""


@dataclass(frozen=True)
class PartFile:
    """A file that holds content of an image. ``end_bytes``: how long it must be, of one that has no header of its own
    to say so; else 0."""

    name: str
    end_bytes: int = 0


@dataclass(frozen=True)
class Header:
    """``backing``: the image it stands on, as written; ``parts``: files beside it that hold its content."""

    format: str
    backing: str | None = None
    backing_format: str | None = None
    parts: tuple[PartFile, ...] = ()
    encrypted: bool = False


def read_header(read: Read, size_bytes: int) -> Header:
    """The header of an image of ``size_bytes``; unknown magic is "raw". Raises Invalid: an image that must not be
    opened, whatever it names."""
    head = read(0, 512).ljust(512, b"\0")
    if head.startswith(b"QFI\xfb"):
        return _qcow2(head, read)
    if head.startswith((b"KDMV", b"# Disk DescriptorFile", b"COWD")):
        return _vmdk(head, read, size_bytes)
    if head.startswith(b"vhdxfile"):
        return Header("vhdx")
    if head[0x40:0x44] == b"\x7f\x10\xda\xbe":
        return Header("vdi")
    footer = read(max(0, size_bytes - 512), 512)
    if b"conectix" in (head[:8], footer[:8]):
        return _vpc(head if head.startswith(b"conectix") else footer)
    return Header("raw")


def reader(handle: int, size_bytes: int, offset: int = 0) -> Read:
    """Reads an image of ``size_bytes`` that begins at ``offset`` of an open file; what lies past its end is empty."""

    def read(at: int, length: int) -> bytes:
        if not 0 <= at < size_bytes or length <= 0:
            return b""
        return os.pread(handle, min(length, size_bytes - at), offset + at)

    return read


def _refused(why: str, advice: str) -> Invalid:
    return Invalid(f"the image is refused: {why}", next=advice)


# --- qcow2


def _qcow2(head: bytes, read: Read) -> Header:
    version, backing_at, backing_bytes = struct.unpack_from(">IQI", head, 4)
    if version not in (2, 3):
        raise _refused(f"qcow2 version {version}", "Convert it where it was made: qemu-img convert -O qcow2")
    encrypted = int.from_bytes(head[_QCOW2_ENCRYPTED:36], "big") != 0
    header_bytes = 72
    if version == 3:
        if int.from_bytes(head[72:80], "big") & _QCOW2_DATA_FILE:
            raise _refused("its data lies in another file", "Make it one file: qemu-img convert -O qcow2")
        header_bytes = int.from_bytes(head[100:104], "big")
    if not backing_at:
        return Header("qcow2", encrypted=encrypted)
    if not 0 < backing_bytes <= NAME_MAX_BYTES:
        raise _refused("the name of its backing image is too long", "Flatten it where it was made")
    name = read(backing_at, backing_bytes)
    if len(name) < backing_bytes:
        raise _refused("its header is cut off", "Copy it again")
    backing_format = _backing_format(read, header_bytes)
    return Header("qcow2", name.decode(errors="surrogateescape"), backing_format, encrypted=encrypted)


def _backing_format(read: Read, at: int) -> str | None:
    for _ in range(_EXTENSIONS_MAX):
        lead = read(at, 8)
        if len(lead) < 8:
            return None
        kind, length = struct.unpack(">II", lead)
        if kind == 0:
            return None
        if kind == _BACKING_FORMAT:
            return read(at + 8, min(length, 16)).decode("ascii", errors="replace")
        at += 8 + (length + 7) // 8 * 8
    return None


# --- vmdk


def _vmdk(head: bytes, read: Read, size_bytes: int) -> Header:
    if head.startswith(b"COWD"):
        raise _refused("a VMDK of ESX's old COWD kind", "Export it as streamOptimized or OVA")
    whole = False
    if head.startswith(b"KDMV"):
        capacity, _, descriptor_at, descriptor_sectors = struct.unpack_from("<QQQQ", head, 12)
        # With a capacity the content is in this very file, whatever its descriptor calls it.
        whole = capacity > 0
        length = min(descriptor_sectors * _SECTOR, _DESCRIPTOR_MAX_BYTES)
        text = read(descriptor_at * _SECTOR, length) if descriptor_at else b""
    else:
        text = read(0, min(size_bytes, _DESCRIPTOR_MAX_BYTES))
    words = text.split(b"\0")[0].decode("utf-8", errors="surrogateescape")
    parent = _PARENT.search(words)
    if parent and int(parent[1][:8], 16) != _NO_PARENT:
        raise _refused("it is a snapshot that stands on another VMDK", "Consolidate its snapshots, then export it")
    if whole:
        return Header("vmdk")
    return Header("vmdk", parts=tuple(_part(*found) for found in _EXTENT.findall(words) if found[2]))


def _part(sectors: str, kind: str, name: str, offset: str) -> PartFile:
    """Of a line of the descriptor: sectors, kind, name, and for FLAT the sector of the file where it begins."""
    return PartFile(name, (int(sectors) + int(offset or 0)) * _SECTOR if kind in _FLAT else 0)


# --- vdi


def vdi_end_bytes(read: Read) -> int:
    """How long the file of a VDI must be for a guest to see all that its table of blocks names. Its virtual size must
    have been judged: so many MiB, so many entries are read. Invalid: the table itself is cut off."""
    table_at, data_at = struct.unpack_from("<II", head := read(0, _SECTOR).ljust(_SECTOR, b"\0"), 0x154)
    disk_bytes, block_bytes = struct.unpack_from("<QI", head, 0x170)
    blocks = -(-disk_bytes // max(1, block_bytes))
    table = array("I", (raw := read(table_at, blocks * 4))[: len(raw) // 4 * 4])
    if len(table) < blocks:
        raise _refused("it is cut off within its table of blocks", "Copy it again, whole")
    if sys.byteorder == "big":
        table.byteswap()
    last = max((at for at in table if at < _VDI_NO_BLOCK), default=None)
    if last is None:
        return int(data_at)
    # Of the disk's last block only what is of the disk.
    return int(data_at + last * block_bytes + min(block_bytes, disk_bytes - table.index(last) * block_bytes))


# --- vpc


def _vpc(footer: bytes) -> Header:
    if int.from_bytes(footer[60:64], "big") == 4:
        raise _refused("it is a differencing VHD", "Merge it with its parent, then export it")
    return Header("vpc")
