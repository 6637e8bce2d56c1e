"""Storage layout, disks, children and locks on real files with the real qemu-img."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hdcs_tasks.errors import Cancelled, Conflict, HypervisorRefused, Invalid, NotFound, Rejected, Unavailable
from hdcs_tasks.hypervisor import disks, facts, keys, overlays, processes, storage
from hdcs_tasks.hypervisor.locks import vm_lock

VM_ID = "6f0c3a52-9d2e-4c4f-8a4e-0d0a51e2a001"
MIB = 1 << 20
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img") and not os.environ.get("CI"), reason="needs qemu-img")


@pytest.fixture
def layout(tmp_path: Path) -> storage.StorageLayout:
    return storage.prepare(tmp_path, "east")


# -- layout


def test_storage_names_its_domain_node(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match=r"no \.hdcs-domain-node"):
        storage.check(tmp_path, "east")
    storage.prepare(tmp_path, "east")
    assert storage.check(tmp_path, "east") == storage.prepare(tmp_path, "east")
    with pytest.raises(Rejected, match="belongs to domain node east"):
        storage.check(tmp_path, "west")
    with pytest.raises(Rejected, match="belongs to domain node east"):
        storage.prepare(tmp_path, "west")
    (tmp_path / "agent").rmdir()
    with pytest.raises(Rejected, match="lacks agent"):
        storage.check(tmp_path, "east")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == [storage.MARKER]


@pytest.mark.parametrize(
    "parts",
    [("..",), ("a", "..", "b"), ("a/b",), ("/etc",), ("",), (".",), ("a\0b",), ("-rf",), ("a\n",), ("x" * 300,)],
)
def test_no_path_leads_outside(layout: storage.StorageLayout, parts: tuple[str, ...]) -> None:
    with pytest.raises(Invalid):
        layout.path("images", *parts)


def test_links_do_not_lead_outside(layout: storage.StorageLayout, tmp_path: Path) -> None:
    (layout.root / "images" / "out").symlink_to("/etc")
    with pytest.raises(Invalid, match="linked out"):
        layout.path("images", "out", "passwd")
    with pytest.raises(Invalid):
        layout.path("secrets", "x")
    assert layout.disk(VM_ID) == tmp_path / "vms" / VM_ID / "disk0.qcow2"
    assert layout.contains(layout.disk(VM_ID))
    assert not layout.contains(layout.root / "images" / "out" / "passwd")


# -- disks


def image(path: Path, size: int = 4 * MIB) -> Path:
    disks.create_blank(path, size)
    return path


@needs_qemu_img
def test_overlay_is_made_once(tmp_path: Path) -> None:
    base, top = image(tmp_path / "base.qcow2"), tmp_path / "top.qcow2"
    assert disks.create_overlay(base, top, bitmap="b0", attempt="2") == top
    seen = disks.probe(top, root=tmp_path)
    assert (seen.backing, seen.backing_format, seen.bitmaps, seen.virtual_bytes) == (base, "qcow2", ("b0",), 4 * MIB)
    before = top.stat().st_ino
    disks.create_overlay(base, top, bitmap="b0", attempt="3")
    assert top.stat().st_ino == before
    other = image(tmp_path / "other.qcow2")
    with pytest.raises(Conflict):
        disks.create_overlay(other, top)
    assert [d.path for d in disks.chain(top, root=tmp_path)] == [top, base]
    assert not list(tmp_path.glob("*.partial"))


@needs_qemu_img
def test_an_overlay_like_one_before_needs_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlays, "_SETTLED_S", 0.0)
    base = image(tmp_path / "base.qcow2")
    first = disks.create_overlay(base, tmp_path / "first.qcow2", bitmap="b0")
    children: list[object] = []
    run = keys.run
    monkeypatch.setattr(keys, "run", lambda *given, **more: children.append(given) or run(*given, **more))
    second = disks.create_overlay(base, tmp_path / "second.qcow2", bitmap="b0")
    assert not children
    assert first.read_bytes() == second.read_bytes()
    assert disks.probe(second, root=tmp_path).bitmaps == ("b0",)
    assert disks.check(second).clean
    assert (
        disks.probe(disks.create_overlay(base, tmp_path / "third.qcow2", size_bytes=8 * MIB)).virtual_bytes == 8 * MIB
    )
    base.unlink()
    image(base, 16 * MIB)  # another base under the same name
    after = disks.probe(disks.create_overlay(base, tmp_path / "fourth.qcow2", bitmap="b0"))
    assert (after.virtual_bytes, after.bitmaps, len(children)) == (16 * MIB, ("b0",), 3)


@needs_qemu_img
def test_failed_overlay_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        disks.create_overlay(tmp_path / "none.qcow2", tmp_path / "top.qcow2")
    with pytest.raises(HypervisorRefused):
        disks.create_overlay(image(tmp_path / "base.qcow2"), tmp_path / "top.qcow2", bitmap="x" * 2000)
    assert [p.name for p in tmp_path.iterdir()] == ["base.qcow2"]


@needs_qemu_img
def test_strangers_images_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    text = root / "text.qcow2"
    text.write_text("no image")
    with pytest.raises(Invalid, match="content is raw"):
        disks.probe(text)
    outside = image(tmp_path / "outside.qcow2")
    top = disks.create_overlay(outside, root / "top.qcow2")
    with pytest.raises(Invalid, match="outside of the storage"):
        disks.probe(top, root=root)
    assert disks.probe(top).backing == outside
    data = root / "data.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/secret.raw", data, "1M"], check=True
    )
    with pytest.raises(Invalid, match="another file"):
        disks.probe(data)
    guess = root / "guess.qcow2"
    nowhere = "nbd://127.0.0.1:1/x"
    subprocess.run(["qemu-img", "create", "-qu", "-f", "qcow2", "-b", nowhere, "-F", "raw", guess, "1M"], check=True)
    with pytest.raises(Invalid, match="is not a file"):
        disks.probe(guess)
    os.mkfifo(root / "pipe")
    with pytest.raises(Invalid, match="regular file"):
        disks.probe(root / "pipe")
    with pytest.raises(Invalid, match=r"regular file|directory"):
        disks.probe(root)


@needs_qemu_img
def test_vmdk_may_not_name_foreign_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 65536)
    (tmp_path / "import").mkdir()
    evil = tmp_path / "import" / "evil.vmdk"
    evil.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 128 FLAT "{secret}" 0\nddb.adapterType = "ide"\n'
    )
    with pytest.raises(Invalid, match="its content lies in"):
        disks.probe(evil)


@needs_qemu_img
@pytest.mark.parametrize("fmt", ["qcow2", "vmdk", "vdi", "vhdx", "vpc"])
def test_formats_are_read_from_their_magic(tmp_path: Path, fmt: str) -> None:
    path = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", fmt, path, "8M"], check=True)
    assert disks.sniff(path) == fmt
    assert disks.probe(path).format == fmt
    with pytest.raises(Invalid):
        disks.probe(path, fmt="raw")


@needs_qemu_img
def test_convert_tells_progress_and_can_be_cancelled(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(os.urandom(24 * MIB))
    told: list[tuple[float, str, float | None]] = []
    made = disks.convert(raw, "raw", tmp_path / "a.qcow2", on_progress=lambda *p: told.append(p))
    assert disks.compare(raw, made, formats=("raw", "qcow2"))
    assert disks.check(made).clean
    assert told[-1][:2] == (100.0, "disk")
    assert [p[0] for p in told] == sorted(p[0] for p in told)
    with pytest.raises(Cancelled):
        disks.convert(raw, "raw", tmp_path / "b.qcow2", cancelled=lambda: True)
    with pytest.raises(Conflict):
        disks.convert(raw, "raw", made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.qcow2", "disk.raw"]


def test_copy_keeps_holes_and_bytes(tmp_path: Path) -> None:
    source = tmp_path / "a"
    with source.open("wb") as file:
        file.write(b"head" * 1000)
        file.truncate(40 * MIB)
    digest = disks.copy_image(source, tmp_path / "b")
    assert digest == disks.sha256(source) == disks.sha256(tmp_path / "b")
    assert (tmp_path / "b").stat().st_blocks * 512 < 20 * MIB
    with pytest.raises(Cancelled):
        disks.copy_image(source, tmp_path / "c", cancelled=lambda: True)
    assert not list(tmp_path.glob("c*"))


@needs_qemu_img
def test_compare_sees_a_changed_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(MIB))
    (tmp_path / "b").write_bytes(bytes(MIB - 1) + b"x")
    assert not disks.compare(tmp_path / "a", tmp_path / "b", formats=("raw", "raw"))


@needs_qemu_img
def test_disks_only_grow(tmp_path: Path) -> None:
    path = image(tmp_path / "a.qcow2")
    disks.resize(path, 8 * MIB)
    assert disks.probe(path).virtual_bytes == 8 * MIB
    with pytest.raises(Invalid, match="cut data off"):
        disks.resize(path, MIB)


# -- children


def test_child_that_fails_names_itself() -> None:
    with pytest.raises(HypervisorRefused, match=r"sh -c .*exit code 3: oops"):
        processes.run(["sh", "-c", "echo oops >&2; exit 3"], timeout_s=10)
    with pytest.raises(HypervisorRefused):
        processes.run(["no-such-program-at-all"], timeout_s=10)
    assert processes.run(["sh", "-c", "echo hi; exit 3"], timeout_s=10, ok=(3,)).stdout == "hi\n"


def test_child_over_its_time_or_cancelled_is_gone(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"echo $$ > {pid_file}; trap '' TERM; while :; do sleep 0.1; done"
    with pytest.raises(Unavailable, match="took too long"):
        processes.run(["sh", "-c", script], timeout_s=2)
    assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        processes.run(["sleep", "60"], timeout_s=60, cancelled=lambda: time.monotonic() - begun > 0.2)


def test_child_is_held_to_its_memory() -> None:
    argv = [sys.executable, "-c", "x = bytearray(300 << 20)"]
    assert processes.run(argv, timeout_s=20).exit_code == 0
    with pytest.raises(HypervisorRefused, match="MemoryError"):
        processes.run(argv, timeout_s=20, memory_mib=128)


def test_child_may_not_flood() -> None:
    with pytest.raises(HypervisorRefused, match="wrote over"):
        processes.run(["cat", "/dev/zero"], timeout_s=20)


def test_child_dies_with_its_worker(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"""
from hdcs_tasks.hypervisor import processes
processes.run(["sh", "-c", "echo $$ > {pid_file}; exec sleep 300"], timeout_s=300)
"""
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.05)
        child = Path("/proc") / pid_file.read_text().strip()
        assert child.exists()
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    deadline = time.monotonic() + 30
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(child)


def _alive(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- locks


def test_vm_lock_excludes_threads_and_frees_itself(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with vm_lock(tmp_path, VM_ID):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(5)
    with pytest.raises(Unavailable, match=f"process {os.getpid()}"), vm_lock(tmp_path, VM_ID, timeout_s=0.1):
        pass
    leave.set()
    with vm_lock(tmp_path, VM_ID, timeout_s=5):
        pass
    holder.join()
    with pytest.raises(Invalid), vm_lock(tmp_path, "../../etc/x"):
        pass


# -- facts


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64") and not os.environ.get("CI"), reason="needs QEMU")
def test_boot_probe_tells_booting_from_not(tmp_path: Path) -> None:
    emulator = shutil.which("qemu-system-x86_64") or ""
    disk = tmp_path / "sector"
    disk.write_bytes(facts.boot_sector())
    assert facts.boots(emulator, "tcg", str(disk), 10)
    disk.write_bytes(b"\xf4" * 510 + b"\x55\xaa")  # halts at once
    assert not facts.boots(emulator, "tcg", str(disk), 1)
    assert not facts.boots("no-such-emulator", "tcg", str(disk), 1)


def test_an_old_attempt_does_not_overwrite_a_newer_ones_file(tmp_path: Path) -> None:
    target = tmp_path / "disk0.qcow2"
    with pytest.raises(Conflict, match="appeared meanwhile"), disks.partial_file(target, "1") as partial:
        partial.write_text("old")
        target.write_text("new")
    assert target.read_text() == "new" and not partial.exists()
