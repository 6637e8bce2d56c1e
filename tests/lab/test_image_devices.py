"""Physical disks, played by loop devices: what is on them comes in, what goes onto them destroys nothing in use."""

from __future__ import annotations

import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hdcs_tasks.errors import Cancelled, Conflict, HdcsError, Invalid, NotFound
from hdcs_tasks.hypervisor import devices, exporting, importing
from hdcs_tasks.hypervisor.conversion import Watch
from hdcs_tasks.hypervisor.exporting import Order
from hdcs_tasks.hypervisor.probing import Source
from tests.lab.loops import loop_device, tool

pytestmark = pytest.mark.lab

MIB = 1 << 20
SHAPE = {"name": "office", "vcpus": 2, "memory_mib": 1024}


@pytest.fixture
def disk(lab_possible: None, tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, 24 * MIB)
    for at in (0, 11 * MIB, 23 * MIB):
        tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P 5 {at} 1M", path)
    return path


@pytest.fixture
def device(lab_possible: None, tmp_path: Path) -> Iterator[Path]:
    with loop_device(tmp_path, 32 * MIB) as made:
        yield made


def order(disk: Path, **more: Any) -> Order:
    return Order(Source(disk, "qcow2"), 24 * MIB, "raw", SHAPE, {}, **more)


def content(path: Path) -> bytes:
    return path.read_bytes()


def test_onto_a_disk_and_back(disk: Path, device: Path, tmp_path: Path) -> None:
    # Old content, of which nothing may shine through: nor at the device's end, past the disk.
    device.write_bytes(os.urandom(24 * MIB) + bytes(7 * MIB) + os.urandom(MIB))
    told: list[float] = []
    watch = Watch(on_progress=lambda percent, _phase, _eta: told.append(percent))
    manifest = exporting.export(order(disk), device, watch, attempt="s-1")
    raw = tmp_path / "raw"
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, raw)
    assert content(device)[: 24 * MIB] == content(raw)
    assert content(device)[31 * MIB :] == bytes(MIB)
    assert devices.content_of(device) == ""
    assert manifest["files"][0]["sha256"] == tool("sha256sum", raw).split()[0]
    assert told[-1] == 100.0
    image = tmp_path / "images" / "1.qcow2"
    image.parent.mkdir()
    found = importing.find(device, Path("/dev"), fmt=None, disk=None, max_bytes=1 << 30)
    assert (found.probed.format, found.probed.virtual_bytes, found.warnings()) == ("raw", 32 * MIB, [])
    importing.bring_in(found, image, Watch(storage=tmp_path), attempt=1)
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", device, image)
    assert image.stat().st_blocks * 512 < 8 * MIB


def refused(disk: Path, target: Path, error: type[HdcsError], match: str, **more: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        exporting.export(order(disk, **more), target, Watch(), attempt="s-1")
    assert caught.value.next


def test_a_mounted_disk_is_never_written(disk: Path, device: Path, tmp_path: Path) -> None:
    tool("mkfs.ext4", "-q", device)
    refused(disk, device, Conflict, "holds ext4 file system")
    (tmp_path / "mnt").mkdir()
    tool("mount", device, tmp_path / "mnt")
    try:
        (tmp_path / "mnt" / "letter").write_text("dear")
        refused(disk, device, Conflict, "is mounted on", force=True)
        found = importing.find(device, Path("/dev"), fmt=None, disk=None, max_bytes=1 << 30)
        assert [text.split(":")[0] for text in found.warnings()] == [f"{device.name} is mounted on {tmp_path / 'mnt'}"]
        assert (tmp_path / "mnt" / "letter").read_text() == "dear"
    finally:
        tool("umount", tmp_path / "mnt")
    exporting.export(order(disk, force=True), device, Watch(), attempt="s-1")
    assert devices.content_of(device) == ""


def test_a_disk_mounted_where_it_does_not_show_is_never_written(disk: Path, device: Path, tmp_path: Path) -> None:
    """In another mount namespace: only the kernel knows."""
    tool("mkfs.ext4", "-q", device)
    (tmp_path / "mnt").mkdir()
    script = f"mount {device} {tmp_path}/mnt && echo there && read line"
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "there\n"
        refused(disk, device, Conflict, "in use: the kernel says so", force=True)
        assert devices.users(device) == [f"the kernel says that {device} is in use"]
    finally:
        holder.communicate("\n", timeout=30)
    exporting.check(order(disk, force=True), device)


def test_a_disk_with_a_mounted_partition_is_never_written(disk: Path, lab_possible: None, tmp_path: Path) -> None:
    table = bytearray(512)
    table[446:462] = struct.pack("<B3xB3xII", 0, 0x83, 2048, 46 * 2048)
    table[510:] = b"\x55\xaa"
    with loop_device(tmp_path, 48 * MIB, "--partscan", head=bytes(table)) as device:
        part = Path(f"{device}p1")
        if not part.exists():
            pytest.skip("this machine makes no nodes for partitions")
        refused(disk, device, Conflict, "holds a dos partition table")
        tool("mkfs.ext4", "-q", part)
        (tmp_path / "mnt").mkdir()
        tool("mount", part, tmp_path / "mnt")
        try:
            refused(disk, device, Conflict, f"{part.name} is mounted on", force=True)
            refused(disk, part, Conflict, "is mounted on", force=True)
        finally:
            tool("umount", tmp_path / "mnt")


def test_swap_is_never_written(disk: Path, device: Path) -> None:
    tool("mkswap", device)
    refused(disk, device, Conflict, "holds swap")
    try:
        tool("swapon", device)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine takes no swap: {error.stderr}")
    try:
        refused(disk, device, Conflict, "is swap", force=True)
    finally:
        tool("swapoff", device)


def test_impossible_devices(disk: Path, lab_possible: None, tmp_path: Path) -> None:
    with loop_device(tmp_path, 16 * MIB) as small:
        refused(disk, small, Invalid, "has 16777216 bytes, the disk needs 25165824", force=True)
    with loop_device(tmp_path, 32 * MIB, "--read-only") as locked:
        refused(disk, locked, HdcsError, "read only|cannot be written", force=True)
    refused(disk, Path("/dev/null"), Invalid, "not a block device")
    refused(disk, Path("/dev/hdcs-none"), NotFound, "no device")


def test_while_it_is_written_nobody_can_mount_it(disk: Path, device: Path, tmp_path: Path) -> None:
    with devices.claimed(device, MIB, force=True), pytest.raises(Conflict, match="in use"), devices.claimed(
        device, MIB, force=True
    ):  # fmt: skip
        pass


def test_a_cancelled_write_leaves_no_half_disk(disk: Path, device: Path) -> None:
    """What is there looks empty: nothing boots or mounts half a system."""
    done = threading.Event()
    watch = Watch(on_progress=lambda _p, phase, _e: done.set() if phase == "read back" else None, cancelled=done.is_set)
    with pytest.raises(Cancelled):
        exporting.export(order(disk, force=True), device, watch, attempt="s-1")
    assert content(device)[:MIB] == bytes(MIB)
