"""An image that was cut off is refused before it is converted: what is missing would read as zeroes, silently."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path

import pytest

from hdcs_tasks.errors import Cancelled, Invalid
from hdcs_tasks.hypervisor import probing
from hdcs_tasks.hypervisor.headers import read_header, vdi_end_bytes
from tests.unit.test_image_probing import MAX, MIB, create, refused, tool

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img") and not os.environ.get("CI"), reason="needs qemu-img")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "import"
    made.mkdir()
    return made


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """A raw disk of 16 MiB with something that cannot be compressed up to its very end, and a hole."""
    path = tmp_path / "content.raw"
    noise = random.Random(1)
    path.write_bytes(noise.randbytes(5 * MIB) + bytes(8 * MIB) + noise.randbytes(3 * MIB))
    return path


def convert(content: Path, path: Path, fmt: str, *options: str) -> Path:
    tool("qemu-img", "convert", "-f", "raw", "-O", fmt, *options, content, path)
    return path


@pytest.mark.parametrize("cut", [MIB // 2, 4 * MIB])
@pytest.mark.parametrize(
    ("fmt", "options", "words"),
    [
        ("qcow2", (), "cut off or damaged.*ERROR.*exceeding the end of the file"),
        ("qcow2", ("-c",), "cut off or damaged.*ERROR"),
        ("vmdk", ("-o", "subformat=monolithicSparse"), "cut off or damaged.*points after EOF"),
        ("vmdk", ("-o", "subformat=streamOptimized"), "cut off or damaged.*points after EOF"),
        ("vdi", (), r"is cut off: it has \d+ bytes of \d+"),
        ("vdi", ("-o", "static=on"), r"is cut off: it has \d+ bytes of \d+"),
        # These qemu-img does not open, or does not know, when their end is missing.
        ("vhdx", (), "points after end of file|points after EOF|truncated"),
        ("vpc", (), "truncated"),
        ("vpc", ("-o", "subformat=fixed,force_size=on"), "no image format"),
    ],
)
def test_what_was_cut_off_is_refused(
    content: Path, root: Path, fmt: str, options: tuple[str, ...], words: str, cut: int
) -> None:
    path = convert(content, root / "disk", fmt, *options)
    assert probing.probe(path, root, max_bytes=MAX).format == fmt
    os.truncate(path, path.stat().st_size - cut)
    refused(path, root, words)


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse"])
def test_a_vmdk_whose_part_was_cut_off_is_refused(content: Path, root: Path, subformat: str) -> None:
    path = convert(content, root / "disk.vmdk", "vmdk", "-o", f"subformat={subformat}")
    assert probing.probe(path, root, max_bytes=MAX).virtual_bytes == 16 * MIB
    (part,) = set(root.iterdir()) - {path}
    os.truncate(part, part.stat().st_size - MIB)
    words = f"its part '{part.name}' is cut off: it has {15 * MIB} bytes of {16 * MIB}"
    refused(path, root, "points after EOF" if "Sparse" in subformat else words)


def test_the_parts_lengths_are_as_the_descriptor_says() -> None:
    text = (
        b'# Disk DescriptorFile\nparentCID=ffffffff\nRW 10 FLAT "a b.vmdk" 6\nRW 10 VMFS "c.vmdk"\n'
        b'RW 10 SPARSE "d.vmdk"\nRW 10 ZERO\nRW 7 FLAT "e.vmdk"\n'
    )
    header = read_header(lambda at, length: text[at : at + length], len(text))
    assert [(part.name, part.end_bytes) for part in header.parts] == [
        ("a b.vmdk", 16 * 512), ("c.vmdk", 10 * 512), ("d.vmdk", 0), ("e.vmdk", 7 * 512)
    ]  # fmt: skip


def test_a_vdi_of_which_its_last_block_is_half_the_disks_is_whole(root: Path) -> None:
    """Other programs end the file where the disk ends; its table may be cut off too."""
    path = create(root / "disk.vdi", fmt="vdi", size=str(2 * MIB + 4096))
    tool("qemu-io", "-f", "vdi", "-c", f"write -q -P 3 {2 * MIB} 4096", path)
    tool("qemu-io", "-f", "vdi", "-c", "write -q -P 4 0 4096", path)
    data = path.read_bytes()

    def end(data: bytes) -> int:
        return vdi_end_bytes(lambda at, length: data[at : at + length])

    assert end(data) == path.stat().st_size, "the block that was written last is a whole one of the disk"
    data_at = struct.unpack_from("<I", data, 0x158)[0]
    table_at = struct.unpack_from("<I", data, 0x154)[0]
    swapped = bytearray(data)
    swapped[table_at : table_at + 12] = struct.pack("<III", 0, 0xFFFFFFFF, 1)
    assert end(bytes(swapped)) == data_at + MIB + 4096
    swapped[table_at : table_at + 12] = struct.pack("<III", *[0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
    assert end(bytes(swapped)) == data_at, "nothing is written"
    with pytest.raises(Invalid, match="within its table"):
        end(data[: table_at + 9])


def test_a_raw_disk_of_half_a_sector_is_refused(root: Path) -> None:
    path = root / "disk.img"
    path.write_bytes(bytes(10_000_001))
    refused(path, root, "10000001 bytes are no whole number of sectors")
    refused(create(root / "top.qcow2", "-b", "disk.img", "-F", "raw"), root, "no whole number of sectors")
    tool("truncate", "-s", "%512", path)
    assert probing.probe(path, root, max_bytes=MAX).virtual_bytes == 10_000_384


def test_an_image_below_is_looked_at_too(content: Path, root: Path) -> None:
    base = convert(content, root / "base.qcow2", "qcow2")
    top = create(root / "top.qcow2", "-b", "base.qcow2", "-F", "qcow2", size="16M")
    assert len(probing.probe(top, root, max_bytes=MAX).chain) == 2
    os.truncate(base, base.stat().st_size - MIB)
    refused(top, root, "base.qcow2 is refused: it is cut off or damaged")


def test_a_qcow2_that_leaked_is_taken_and_one_with_a_bad_table_is_not(root: Path) -> None:
    path = create(root / "disk.qcow2")
    tool("qemu-io", "-f", "qcow2", "-c", "write -q 0 1M", path)
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 40)[0])
    table &= 0x00FFFFFFFFFFFE00
    first = bytes(data[table : table + 8])
    data[table : table + 8] = bytes(8)
    path.write_bytes(data)
    assert probing.probe(path, root, max_bytes=MAX).format == "qcow2"
    data[table + 8 : table + 16] = data[table + 16 : table + 24]  # two places of the disk on one cluster
    data[table : table + 8] = first
    path.write_bytes(data)
    refused(path, root, "cut off or damaged")


def test_a_cancelled_check_ends(content: Path, root: Path) -> None:
    with pytest.raises(Cancelled):
        probing.probe(
            convert(content, root / "disk", "qcow2"), root, max_bytes=MAX, cancelled=lambda: True
        )  # fmt: skip
