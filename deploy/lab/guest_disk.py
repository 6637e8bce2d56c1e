"""A bootable disk as plain bytes: cpio archive, kernel modules in load order, MBR with GRUB before the partition.

Needs no loop device, no mount and no root.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

SECTOR = 512
PARTITION_START = 1 << 20  # bytes; GRUB's core image lives in the gap before it


def cpio_newc(root: Path) -> bytes:
    """The folder ``root`` as a ``newc`` archive owned by 0:0, the format the kernel unpacks as its initramfs."""
    out = bytearray()
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*"))
    for inode, name in enumerate([".", *names], 1):
        path = root / name
        info = path.lstat()
        data = b""
        if stat.S_ISLNK(info.st_mode):
            data = os.readlink(path).encode()
        elif stat.S_ISREG(info.st_mode):
            data = path.read_bytes()
        _cpio_entry(out, inode, info.st_mode, name, data)
    _cpio_entry(out, 0, 0, "TRAILER!!!", b"")
    return bytes(out)


def _cpio_entry(out: bytearray, inode: int, mode: int, name: str, data: bytes) -> None:
    raw = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    out += b"070701" + b"".join(b"%08X" % f for f in fields) + raw
    out += b"\0" * (-len(out) % 4)
    out += data
    out += b"\0" * (-len(out) % 4)


def modules_in_order(kernel_dir: Path, wanted: Iterable[str]) -> list[Path]:
    """The files of the ``wanted`` modules and all they depend on, dependencies first.

    ``kernel_dir`` is ``lib/modules/VERSION``. A wanted module that is built in (or absent) is left out: the boot test
    shows whether it was needed. Reads ``depends=`` from the modules themselves, so no depmod run is needed.
    """
    files = {p.stem.replace("-", "_"): p for p in kernel_dir.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:
            return
        for needed in _module_depends(path):
            add(needed)
        order.append(path)

    for name in wanted:
        add(name)
    return order


def _module_depends(path: Path) -> Iterator[str]:
    found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
    if found:
        yield from (n for n in found[1].decode().split(",") if n)


def write_disk(raw: Path, root: Path, size_mib: int, boot_img: Path, core_img: bytes, label: str) -> None:
    """Write ``raw`` (sparse): MBR with GRUB's boot sector, its core image, one ext4 partition made from ``root``."""
    room = PARTITION_START - SECTOR
    if len(core_img) > room:
        raise ValueError(f"GRUB's core image has {len(core_img)} bytes, the gap before the partition {room}")
    size = size_mib << 20
    with raw.open("wb") as disk:
        disk.truncate(size)
        disk.write(_mbr(boot_img.read_bytes(), size))
        disk.write(core_img)
    part_kib = (size - PARTITION_START) >> 10
    # lazy initialisation would write for minutes after the first boot, and into every first backup;
    # the switched-off features are unknown to GRUB 2.06
    subprocess.run(
        [
            "mke2fs", "-q", "-F", "-t", "ext4", "-L", label, "-m", "0", "-b", "4096", "-J", "size=4",
            "-O", "^metadata_csum_seed,^64bit,^resize_inode",
            "-E", f"offset={PARTITION_START},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0",
            "-d", str(root), str(raw), f"{part_kib}k",
        ],
        check=True,
        env=os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
    )  # fmt: skip


def _mbr(boot_img: bytes, size: int) -> bytes:
    """GRUB's boot.img loads sector 1 by default, which is where the core image goes; add the partition table."""
    first, count = PARTITION_START // SECTOR, (size - PARTITION_START) // SECTOR
    no_chs = b"\xfe\xff\xff"
    entry = struct.pack("<B3sB3sII", 0x80, no_chs, 0x83, no_chs, first, count)
    return boot_img[:440] + b"HDCS\0\0" + entry + b"\0" * 48 + b"\x55\xaa"
