"""The backup repository on real qcow2 files: what is written is found, what was changed is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hdcs_tasks.errors import BackupBroken, Cancelled, Conflict, Invalid, NotFound
from hdcs_tasks.hypervisor import disks, manifests
from hdcs_tasks.hypervisor.bitmaps import bitmaps, ensure_seed
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.manifests import BaseImage, Point
from hdcs_tasks.hypervisor.repository import Repository

VM = str(uuid.UUID(int=7))
SIZE = "64M"


def tool(*argv: object) -> str:
    return subprocess.run([str(a) for a in argv], check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def needs_qemu_img() -> None:
    if not shutil.which("qemu-img"):
        if os.environ.get("CI"):
            pytest.fail("qemu-img is missing")
        pytest.skip("needs qemu-img")


def write(file: Path, at_mib: int, pattern: int, mib: int = 1) -> None:
    tool("qemu-io", "-c", f"write -q -P {pattern} {at_mib}M {mib}M", file)


class Store:
    """A domain node's storage with a base image, and chains whose files are made by hand."""

    def __init__(self, root: Path) -> None:
        self.repository = Repository(root)
        self.root = root
        (root / "images").mkdir()
        (root / "vms").mkdir()
        (root / "backups").mkdir()
        image = root / "images" / "mini-1.qcow2"
        tool("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)
        write(image, 0, 1, 16)
        self.base = BaseImage("mini", 1, disks.sha256(image), "images/mini-1.qcow2")

    def draft(self, seq: int, chain: str = "a", base: bool = True) -> Point:
        return Point(
            id=f"{chain}-{seq}", vm_id=VM, chain=chain, seq=seq, kind="full" if seq == 1 else "inc",
            parent=None if seq == 1 else f"{chain}-{seq - 1}", checkpoint=f"{chain}-{seq}",
            checkpoint_xml="<domaincheckpoint/>", consistency="filesystem",
            definition={"name": "desk-01", "vcpus": 1}, base=self.base if base else None,
        )  # fmt: skip

    def take(self, seq: int, chain: str = "a") -> Point:
        """A point that differs from its parent in one MiB at ``10 + seq``."""
        draft = self.draft(seq, chain)
        partial = self.repository.partial(VM, chain, seq, draft.kind, "1")
        below = replace(draft, seq=seq - 1, kind="full" if seq == 2 else "inc") if seq > 1 else self.base
        backing = self.repository.backing(below, VM, chain)
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", backing.format, "-b", backing.path, partial)
        write(partial, 10 + seq, 100 + seq)
        return self.repository.publish(partial, draft)

    def manifest(self, point: Point) -> Path:
        return self.repository.file(point).with_suffix(".json")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_a_chain_is_written_listed_verified_and_restored(store: Store, tmp_path: Path) -> None:
    points = [store.take(seq) for seq in (1, 2, 3)]
    repository = store.repository
    assert Repository(tmp_path).points(VM) == points == repository.points()
    assert [p.name for p in sorted(repository.chain_folder(VM, "a").iterdir())] == [
        "0001-full.json", "0001-full.qcow2", "0002-inc.json", "0002-inc.qcow2", "0003-inc.json", "0003-inc.qcow2",
    ]  # fmt: skip
    assert points[2].disk_bytes == 64 << 20
    assert points[0].created_at.endswith("+00:00")
    told: list[float] = []
    repository.verify(points[2], on_progress=lambda percent, _phase, _eta: told.append(percent))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(100)
    for point in points:
        target = tmp_path / "vms" / f"{point.id}.qcow2"
        repository.restore(point, target)
        assert repository.compare(point, target)
        info = disks.probe(target)
        assert info.backing == (tmp_path / store.base.path)
        assert bitmaps(target) == {SEED: True}
        # 11M.. to 10 + seq + 1: one MiB per link, as the base image reaches to 16M
        assert point.seq << 20 <= info.file_bytes < (point.seq + 1) << 20
    assert not repository.compare(points[0], tmp_path / "vms" / "a-2.qcow2")
    assert list((tmp_path / "vms").glob(".*")) == []


def test_without_base_image_a_restored_disk_stands_alone(store: Store, tmp_path: Path) -> None:
    partial = store.repository.partial(VM, "n", 1, "full", "1")
    tool("qemu-img", "create", "-q", "-f", "qcow2", partial, SIZE)
    write(partial, 3, 9)
    point = store.repository.publish(partial, store.draft(1, "n", base=False))
    store.repository.verify(point)
    store.repository.restore(point, tmp_path / "vms" / "d.qcow2")
    assert disks.probe(tmp_path / "vms" / "d.qcow2").backing is None
    assert store.repository.compare(point, tmp_path / "vms" / "d.qcow2")


def edit(path: Path, change: Callable[[dict[str, Any]], None], seal: bool = False) -> None:
    body = json.loads(path.read_bytes())
    change(body)
    if seal:
        body.pop("manifest_sha256")
        body["manifest_sha256"] = manifests._seal(body)
    path.write_text(json.dumps(body))


def test_an_edited_manifest_is_no_point(store: Store) -> None:
    store.take(1)
    point = store.take(2)
    edit(store.manifest(point), lambda body: body["definition"].update(name="other"))
    damaged: list[str] = []
    assert [p.id for p in store.repository.points(VM, damaged)] == ["a-1"]
    assert "changed after it was written" in damaged[0]
    with pytest.raises(NotFound, match="changed after"):
        store.repository.get(VM, "a-2")
    with pytest.raises(BackupBroken, match="missing"):
        store.repository.verify(point)


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"name": "x", "version": 1, "sha256": "0" * 64, "path": "images/../../etc/passwd", "format": "raw"}},
        {"base": {"name": "x", "version": 1, "sha256": "0" * 64, "path": "/etc/passwd", "format": "raw"}},
        {"vm_id": "../../etc"},
        {"chain": ".."},
        {"kind": "half"},
        {"seq": "1"},
        {"file_bytes": "many"},
        {"format": 2},
        {"surprise": 1},
        {"chain": "elsewhere"},
    ],
)
def test_a_forged_manifest_is_no_point(store: Store, change: dict[str, Any]) -> None:
    """Sealed again, as somebody would who knows how."""
    point = store.take(1)
    edit(store.manifest(point), lambda body: body.update(change), seal=True)
    damaged: list[str] = []
    assert store.repository.points(None, damaged) == []
    assert len(damaged) == 1


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b"[" * 100000, b"x" * (manifests.MANIFEST_MAX_BYTES + 1)]
)
def test_a_broken_manifest_is_no_point(store: Store, content: bytes) -> None:
    store.manifest(store.take(1)).write_bytes(content)
    damaged: list[str] = []
    assert store.repository.points(None, damaged) == []
    assert len(damaged) == 1


def test_a_changed_file_is_noticed(store: Store, tmp_path: Path) -> None:
    points = [store.take(seq) for seq in (1, 2)]
    file = store.repository.file(points[0])
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BackupBroken, match="not the file that was written"):
        store.repository.verify(points[1])


def test_a_changed_or_missing_base_image_is_noticed(store: Store) -> None:
    point = store.take(1)
    image = store.root / store.base.path
    write(image, 1, 77)
    with pytest.raises(BackupBroken, match="has changed"):
        store.repository.verify(point)
    store.repository.verify(point, base=False)
    image.unlink()
    with pytest.raises(BackupBroken, match="is missing"):
        store.repository.verify(point)


def test_a_file_that_leads_out_is_never_opened(store: Store, tmp_path: Path) -> None:
    """A backing file of somebody's choice would put any file of the host into the restored disk."""
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"s" * (64 << 20))
    partial = store.repository.partial(VM, "a", 1, "full", "1")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, partial)
    with pytest.raises(BackupBroken, match="secret"):
        store.repository.publish(partial, store.draft(1))
    assert store.repository.points() == []
    partial.unlink()
    point = store.take(1)
    file = store.repository.file(point)
    tool("qemu-img", "rebase", "-u", "-F", "raw", "-b", secret, file)
    with pytest.raises(BackupBroken, match="secret"):
        store.repository.restore(point, tmp_path / "vms" / "d.qcow2")
    assert not (tmp_path / "vms" / "d.qcow2").exists()


def test_links_out_of_the_storage_are_refused(store: Store, tmp_path: Path) -> None:
    point = store.take(1)
    image = store.root / store.base.path
    image.rename(tmp_path / "elsewhere.qcow2")
    image.symlink_to(tmp_path / "elsewhere.qcow2")
    with pytest.raises(BackupBroken, match="leads out"):
        store.repository.verify(point)
    folder = store.repository.chain_folder(VM, "a")
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(BackupBroken, match="linked elsewhere"):
        store.repository.file(point)


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 65, "a\n", None])
def test_names_are_checked(store: Store, name: Any) -> None:
    with pytest.raises(Invalid):
        store.repository.chain_folder(VM, name)
    with pytest.raises(Invalid):
        store.repository.chain_folder(name, "a")
    with pytest.raises(Invalid):
        store.repository.partial(VM, "a", 1, "full", name)


def test_a_missing_link_breaks_the_later_points_only(store: Store) -> None:
    points = [store.take(seq) for seq in (1, 2, 3)]
    store.manifest(points[1]).unlink()
    store.repository.verify(points[0])
    with pytest.raises(BackupBroken, match="link 2"):
        store.repository.links(points[2])
    assert [p.name for p in store.repository.leftovers()] == ["0002-inc.qcow2"]


def test_deleting_goes_from_the_end(store: Store) -> None:
    points = [store.take(seq) for seq in (1, 2)]
    with pytest.raises(Conflict, match="a-2"):
        store.repository.delete(points[0])
    assert store.repository.delete(points[1])
    assert not store.repository.delete(points[1])
    assert store.repository.delete(points[0])
    assert list(store.repository.folder.iterdir()) == []


def test_two_attempts_at_one_point(store: Store) -> None:
    point = store.take(1)
    again = store.repository.partial(VM, "a", 1, "full", "2")
    shutil.copy(store.repository.file(point), again)
    with pytest.raises(Conflict):
        store.repository.publish(again, store.draft(1))
    assert list(store.repository.leftovers(VM)) == [again]
    store.repository.verify(point)


def test_a_cancel_publishes_nothing(store: Store, tmp_path: Path) -> None:
    store.take(1)
    partial = store.repository.partial(VM, "a", 2, "inc", "1")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "0001-full.qcow2", partial)
    with pytest.raises(Cancelled):
        store.repository.publish(partial, store.draft(2), cancelled=lambda: True)
    assert [p.seq for p in store.repository.points()] == [1]
    with pytest.raises(Cancelled):
        store.repository.restore(store.repository.get(VM, "a-1"), tmp_path / "vms" / "d", cancelled=lambda: True)
    assert list((tmp_path / "vms").iterdir()) == []


def test_restore_does_not_overwrite(store: Store, tmp_path: Path) -> None:
    point = store.take(1)
    target = tmp_path / "vms" / "d.qcow2"
    target.write_bytes(b"mine")
    with pytest.raises(Conflict):
        store.repository.restore(point, target)
    assert target.read_bytes() == b"mine"


def test_restore_does_not_overwrite_what_came_meanwhile(store: Store, tmp_path: Path) -> None:
    point = store.take(1)
    target = tmp_path / "vms" / "d.qcow2"
    with pytest.raises(Conflict):
        store.repository.restore(point, target, on_progress=lambda *_: target.write_bytes(b"mine") and None)
    assert target.read_bytes() == b"mine"
    assert list(target.parent.iterdir()) == [target]


def test_the_seed_marks_the_disks_own_clusters(store: Store, tmp_path: Path) -> None:
    """Read back through QEMU's own NBD server is the lab's part; here: sound, once, and kept names stay."""
    disk = tmp_path / "vms" / "d.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", tmp_path / store.base.path, disk)
    write(disk, 30, 5)
    assert ensure_seed(disk)
    assert not ensure_seed(disk)
    tool("qemu-img", "bitmap", "--add", disk, "p1")
    tool("qemu-img", "bitmap", "--add", disk, "p2")
    assert not ensure_seed(disk, keep=["p2"])
    assert bitmaps(disk) == {SEED: True, "p2": True}
    assert [p.name for p in disk.parent.iterdir()] == ["d.qcow2"]
