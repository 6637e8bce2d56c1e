"""Images in and out on real files: every format compared by qemu-img, nothing left of what was cut."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from hdcs_tasks.errors import Cancelled, Conflict, HdcsError, Invalid, NoCapacity
from hdcs_tasks.hypervisor import exporting, importing, v2v
from hdcs_tasks.hypervisor.conversion import Watch
from hdcs_tasks.hypervisor.disks import compare
from hdcs_tasks.hypervisor.exporting import Order
from hdcs_tasks.hypervisor.probing import Source

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img") and not os.environ.get("CI"), reason="needs qemu-img")

MIB = 1 << 20
MAX = 64 * MIB
FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc")
SHAPE = {"name": "office", "vcpus": 2, "memory_mib": 1024}


def tool(*argv: object) -> None:
    subprocess.run([str(a) for a in argv], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A qcow2 of 40 MiB and a bit, with data in front, in the middle and at the end."""
    path = tmp_path / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, 40 * MIB + 512 * 3)
    for at, size, pattern in ((0, "1M", 1), (17 * MIB, "64k", 2), (40 * MIB, 1024, 3)):
        tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} {at} {size}", path)
    return path


def order(disk: Path, fmt: str, **more: Any) -> Order:
    return Order(Source(disk, "qcow2"), 40 * MIB + 1536, fmt, SHAPE, {"image": "office:1"}, **more)


def bring_in(path: Path, target: Path, watch: Watch | None = None, **more: Any) -> str:
    target.parent.mkdir(exist_ok=True)
    found = importing.find(
        path,
        path.parent,
        fmt=more.pop("fmt", "ova" if path.suffix == ".ova" else None),
        disk=more.pop("disk", None),
        max_bytes=MAX,
    )
    return importing.bring_in(found, target, watch or Watch(), attempt=1, **more)


@pytest.mark.parametrize("fmt", [*FORMATS, "ova"])
def test_out_and_in_again_every_byte_is_the_same(disk: Path, tmp_path: Path, fmt: str) -> None:
    told: list[tuple[float, str, float | None]] = []
    watch = Watch(on_progress=lambda *seen: told.append(seen), storage=tmp_path)
    out = tmp_path / "export"
    out.mkdir()
    target = out / f"office.{fmt}"
    manifest = exporting.export(order(disk, fmt), target, watch, attempt="1")
    if fmt != "ova":
        assert compare(disk, target, formats=("qcow2", fmt))
    (file,) = manifest["files"]
    assert (file["name"], file["bytes"]) == (target.name, target.stat().st_size)
    assert file["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert json.loads((out / f"office.{fmt}.json").read_text()) == manifest
    assert manifest["machine"] == SHAPE
    assert sorted(p.name for p in out.iterdir()) == sorted([target.name, f"{target.name}.json"])
    assert [t[0] for t in told] == sorted(t[0] for t in told)
    assert told[-1][0] == 100.0

    told.clear()
    found = tmp_path / "images" / "office" / "1.qcow2"
    found.parent.parent.mkdir()
    digest = bring_in(target, found, watch)
    assert digest == hashlib.sha256(found.read_bytes()).hexdigest()
    assert compare(disk, found, formats=("qcow2", "qcow2"))
    assert found.stat().st_blocks * 512 < 4 * MIB, "sparse"
    assert [p.name for p in found.parent.iterdir()] == ["1.qcow2"]
    assert told[-1][0] == 100.0 and [t[0] for t in told] == sorted(t[0] for t in told)


def test_an_ova_keeps_the_machine(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "office.ova"
    exporting.export(order(disk, "ova"), target, Watch(), attempt="1")
    with tarfile.open(target) as archive:
        assert archive.getnames() == ["office.ovf", "office-disk1.vmdk", "office.mf"]
    found = importing.find(target, tmp_path, fmt="ova", disk=None, max_bytes=MAX)
    shape = found.shape()
    assert shape is not None
    assert (shape["name"], shape["vcpus"], shape["memory_mib"]) == ("office", 2, 1024)
    assert shape["disks_bytes"] == [40 * MIB + 1536]
    assert found.view()["checksums"] == 2


def test_an_ova_whose_disk_was_changed_is_refused(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "office.ova"
    exporting.export(order(disk, "ova"), target, Watch(), attempt="1")
    found = importing.find(target, tmp_path, fmt="ova", disk=None, max_bytes=MAX)
    assert found.archive is not None
    member = found.archive.members["office-disk1.vmdk"]
    with target.open("r+b") as file:
        file.seek(member.offset + member.size_bytes - 600)
        file.write(b"rot")
    with pytest.raises(Invalid, match="sha256 differs"):
        bring_in(target, tmp_path / "images" / "1.qcow2")
    assert not list((tmp_path / "images").iterdir())


def test_an_overlay_comes_and_goes_flat(disk: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", disk.name, top)
    tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 5M 1M", top)
    bring_in(top, tmp_path / "images" / "1.qcow2")
    exporting.export(Order(Source(top, "qcow2"), 1, "qcow2", SHAPE, {}), tmp_path / "o.qcow2", Watch(), attempt="1")
    for made in (tmp_path / "images" / "1.qcow2", tmp_path / "o.qcow2"):
        assert compare(top, made)
        assert b"disk.qcow2" not in made.read_bytes()[:4096]


def stop_at(phase: str) -> Watch:
    """A watch that is cancelled once this phase was seen."""
    seen: list[str] = []
    return Watch(on_progress=lambda _p, name, _e: seen.append(name), cancelled=lambda: phase in seen)


@pytest.mark.parametrize("phase", ["convert", "hash"])
def test_a_cancelled_import_leaves_nothing(tmp_path: Path, phase: str) -> None:
    big = tmp_path / "big.img"
    big.write_bytes(os.urandom(24 * MIB))
    with pytest.raises(Cancelled):
        bring_in(big, tmp_path / "images" / "1.qcow2", stop_at(phase))
    assert list((tmp_path / "images").iterdir()) == []


@pytest.mark.parametrize(("fmt", "phase"), [("vdi", "convert"), ("raw", "hash"), ("ova", "pack"), ("ova", "convert")])
def test_a_cancelled_export_leaves_nothing(tmp_path: Path, fmt: str, phase: str) -> None:
    big = tmp_path / "big.qcow2"
    raw = tmp_path / "raw"
    raw.write_bytes(os.urandom(24 * MIB))
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, big)
    (tmp_path / "out").mkdir()
    wanted = Order(Source(big, "qcow2"), 24 * MIB, fmt, SHAPE, {})
    with pytest.raises(Cancelled):
        exporting.export(wanted, tmp_path / "out" / "x", stop_at(phase), attempt="1")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_storage_that_would_run_full_takes_nothing(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "images" / "1.qcow2"
    monkeypatch.setattr("hdcs_tasks.hypervisor.conversion.SPACE_LEFT_BYTES", 1 << 60)
    with pytest.raises(NoCapacity, match="too full"):
        bring_in(disk, target, Watch(storage=tmp_path))
    assert list(target.parent.iterdir()) == []


def test_what_dead_attempts_left_is_swept(tmp_path: Path) -> None:
    images = tmp_path / "images"
    folder = images / "mini"
    (folder / "1.qcow2.1.v2v").mkdir(parents=True)
    (folder / "1.qcow2.1.v2v" / "x-sda").touch()
    (folder / "1.qcow2.2.partial").touch()
    (folder / "1.qcow2").touch()
    assert importing.sweep_stale(images) == []
    assert len(list(importing.leftovers(folder / "1.qcow2"))) == 2
    assert len(importing.sweep_stale(images, older_than_s=-1)) == 2
    assert [p.name for p in folder.iterdir()] == ["1.qcow2"]


def test_nothing_is_overwritten_unasked(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.raw"
    target.write_text("mine")
    with pytest.raises(Conflict, match="exists") as caught:
        exporting.export(order(disk, "raw"), target, Watch(), attempt="1")
    assert "--force" in caught.value.next
    assert target.read_text() == "mine"
    exporting.export(order(disk, "raw", force=True), target, Watch(), attempt="1")
    assert compare(disk, target, formats=("qcow2", "raw"))


@pytest.mark.parametrize(
    ("name", "fmt", "match"),
    [("folder", "raw", "no plain file"), ("link", "raw", "no plain file"), ("no/where", "raw", "no folder"),
     ("x", "iso", "not known")],
)  # fmt: skip
def test_impossible_targets_are_refused(disk: Path, tmp_path: Path, name: str, fmt: str, match: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/etc/hosts")
    with pytest.raises(HdcsError, match=match):
        exporting.export(order(disk, fmt, force=True), tmp_path / name, Watch(), attempt="1")
    with pytest.raises(Invalid, match="cannot be compressed"):
        exporting.check(order(disk, "raw", compress=True), tmp_path / "new")


def test_virt_v2v(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is missing: what to install. Its call: our qcow2, its format said, into a folder of the attempt's."""
    argv = v2v.arguments("/usr/bin/virt-v2v", tmp_path / "1.qcow2.1.partial", tmp_path / "f", "Win 10!")
    assert argv[1:] == [
        "-i", "disk", "-if", "qcow2", str(tmp_path / "1.qcow2.1.partial"), "-o", "local", "-os", str(tmp_path / "f"),
        "-of", "qcow2", "-on", "win-10-", "--quiet",
    ]  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    target = tmp_path / "images" / "1.qcow2"
    target.parent.mkdir()
    found = importing.Found(importing.probing.Probed(Source(disk, "qcow2"), 1, 1, (disk,)))
    with pytest.raises(Invalid, match="not installed on node1") as caught:
        importing.bring_in(found, target, Watch(), attempt=1, drivers_on="node1")
    assert "apt install virt-v2v" in caught.value.next
    assert list(target.parent.iterdir()) == []
