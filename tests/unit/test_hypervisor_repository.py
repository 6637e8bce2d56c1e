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
from hdcs_tasks.hypervisor import disks, manifests, merging
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
        self.image = image
        self.base = BaseImage("mini", 1, disks.sha256(image))
        self.repository.bases.keep(self.base, image)

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
        partial = self.repository.partial(VM, chain, seq, "1")
        below = replace(draft, seq=seq - 1) if seq > 1 else self.base
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
        "0001.json", "0001.qcow2", "0002.json", "0002.qcow2", "0003.json", "0003.qcow2",
    ]  # fmt: skip
    assert points[2].disk_bytes == 64 << 20
    assert points[0].created_at.endswith("+00:00")
    told: list[float] = []
    repository.verify(points[2], on_progress=lambda percent, _phase, _eta: told.append(percent))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(100)
    for point in points:
        target = tmp_path / "vms" / f"{point.id}.qcow2"
        repository.restore(point, target, image=store.image)
        assert repository.compare(point, target)
        info = disks.probe(target)
        assert info.backing == store.image
        assert bitmaps(target) == {SEED: True}
        # 11M.. to 10 + seq + 1: one MiB per link, as the base image reaches to 16M
        assert point.seq << 20 <= info.file_bytes < (point.seq + 1) << 20
    assert not repository.compare(points[0], tmp_path / "vms" / "a-2.qcow2")
    assert list((tmp_path / "vms").glob(".*")) == []


def test_without_base_image_a_restored_disk_stands_alone(store: Store, tmp_path: Path) -> None:
    partial = store.repository.partial(VM, "n", 1, "1")
    tool("qemu-img", "create", "-q", "-f", "qcow2", partial, SIZE)
    write(partial, 3, 9)
    point = store.repository.publish(partial, store.draft(1, "n", base=False))
    store.repository.verify(point)
    store.repository.restore(point, tmp_path / "vms" / "d.qcow2", image=None)
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
        {"base": {"name": "x", "version": 1, "sha256": "../../etc/passwd", "format": "raw"}},
        {"base": {"name": "../x", "version": 1, "sha256": "0" * 64, "format": "raw"}},
        {"base": {"name": "x", "version": "1/..", "sha256": "0" * 64, "format": "raw"}},
        {"base": {"name": "x", "version": 1, "sha256": "0" * 64, "path": "/etc/passwd", "format": "raw"}},
        {"created_at": "yesterday"},
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
    image = store.repository.bases.file(store.base)
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
    partial = store.repository.partial(VM, "a", 1, "1")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, partial)
    with pytest.raises(BackupBroken, match="secret"):
        store.repository.publish(partial, store.draft(1))
    assert store.repository.points() == []
    partial.unlink()
    point = store.take(1)
    file = store.repository.file(point)
    tool("qemu-img", "rebase", "-u", "-F", "raw", "-b", secret, file)
    with pytest.raises(BackupBroken, match="secret"):
        store.repository.restore(point, tmp_path / "vms" / "d.qcow2", image=store.image)
    assert not (tmp_path / "vms" / "d.qcow2").exists()


def test_links_out_of_the_storage_are_refused(store: Store, tmp_path: Path) -> None:
    point = store.take(1)
    image = store.repository.bases.file(store.base)
    image.rename(tmp_path / "elsewhere.qcow2")
    image.symlink_to(tmp_path / "elsewhere.qcow2")
    with pytest.raises(BackupBroken, match="is a link"):
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
        store.repository.partial(VM, "a", 1, name)


def test_a_missing_link_breaks_the_later_points_only(store: Store) -> None:
    points = [store.take(seq) for seq in (1, 2, 3)]
    store.manifest(points[1]).unlink()
    store.repository.verify(points[0])
    with pytest.raises(BackupBroken, match="stands on a-2"):
        store.repository.links(points[2])
    assert [p.name for p in store.repository.leftovers()] == ["0002.qcow2"]


def delete(store: Store, point: Point) -> bool:
    return store.repository.delete(VM, point.chain, point.seq, point.id)


def test_deleting_goes_from_the_end(store: Store) -> None:
    points = [store.take(seq) for seq in (1, 2)]
    with pytest.raises(Conflict, match="a-2"):
        delete(store, points[0])
    assert delete(store, points[1])
    assert not delete(store, points[1])
    assert delete(store, points[0])
    assert not (store.repository.folder / VM).exists()


def test_a_damaged_point_can_be_deleted(store: Store) -> None:
    point = store.take(1)
    store.manifest(point).write_bytes(b"{}")
    assert delete(store, point)
    assert not (store.repository.folder / VM).exists()


def test_the_repository_restores_with_only_itself(store: Store, tmp_path: Path) -> None:
    """The image is deleted and the storage lost; the copied folder alone brings back image and disk."""
    points = [store.take(seq) for seq in (1, 2)]
    kept = store.repository.bases.file(store.base)
    assert kept.samefile(store.image), "a hard link: it takes no space"
    other = tmp_path / "other"
    shutil.copytree(store.repository.folder, other / "backups")
    (other / "vms").mkdir()
    repository = Repository(other)
    assert repository.points() == points
    image = other / "images" / "mini" / "1.qcow2"
    image.parent.parent.mkdir()
    assert repository.bases.bring_back(store.base, image)
    assert not repository.bases.bring_back(store.base, image)
    repository.verify(points[1])
    repository.restore(points[1], other / "vms" / "d.qcow2", image=image)
    assert disks.compare(other / "vms" / "d.qcow2", store.repository.file(points[1]))
    # as the docs say it: qemu-img and the folder, no HDCS
    tool("qemu-img", "convert", "-O", "raw", repository.file(points[1]), other / "plain.raw")
    assert disks.compare(other / "plain.raw", other / "vms" / "d.qcow2", formats=("raw", "qcow2"))


def test_a_base_image_is_kept_only_as_it_was_added(store: Store, tmp_path: Path) -> None:
    wrong = replace(store.base, sha256="0" * 64)
    with pytest.raises(BackupBroken, match="its hash differs"):
        store.repository.bases.keep(wrong, store.image)
    assert not store.repository.bases.file(wrong).exists()
    other = tmp_path / "images" / "other.qcow2"
    other.write_bytes(b"another image")
    with pytest.raises(Conflict, match="another than the backup stands on"):
        store.repository.bases.bring_back(store.base, other)
    assert other.read_bytes() == b"another image"


def test_unused_base_images_go_with_the_last_point(store: Store) -> None:
    point = store.take(1)
    store.manifest(point).write_bytes(b"{}")
    assert store.repository.drop_unused_bases() == [], "nobody knows what the damaged one stands on"
    delete(store, point)
    point = store.take(1)
    assert store.repository.drop_unused_bases() == []
    partial = store.repository.partial(VM, "b", 1, "1")
    partial.touch()
    delete(store, point)
    assert store.repository.drop_unused_bases() == [], "a backup under way stands on it"
    orphan = partial.with_name("0001.qcow2")
    orphan.touch()
    for left in (partial, orphan):
        os.utime(left, (0, 0))
    assert store.repository.drop_unused_bases() == [store.base.sha256], "nobody took that up again for a week"
    assert (partial.exists(), orphan.exists()) == (False, True)
    assert store.image.exists(), "the image is not the repository's"


def test_two_attempts_at_one_point(store: Store) -> None:
    point = store.take(1)
    again = store.repository.partial(VM, "a", 1, "2")
    shutil.copy(store.repository.file(point), again)
    with pytest.raises(BackupBroken):
        store.repository.publish(again, store.draft(1))
    assert list(store.repository.leftovers(VM)) == [again]
    store.repository.verify(point)


def test_a_cancel_publishes_nothing(store: Store, tmp_path: Path) -> None:
    store.take(1)
    partial = store.repository.partial(VM, "a", 2, "1")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "0001.qcow2", partial)
    with pytest.raises(Cancelled):
        store.repository.publish(partial, store.draft(2), cancelled=lambda: True)
    assert [p.seq for p in store.repository.points()] == [1]
    with pytest.raises(Cancelled):
        store.repository.restore(
            store.repository.get(VM, "a-1"), tmp_path / "vms" / "d", image=store.image, cancelled=lambda: True
        )
    assert list((tmp_path / "vms").iterdir()) == []


def test_restore_does_not_overwrite(store: Store, tmp_path: Path) -> None:
    point = store.take(1)
    target = tmp_path / "vms" / "d.qcow2"
    target.write_bytes(b"mine")
    with pytest.raises(Conflict):
        store.repository.restore(point, target, image=store.image)
    assert target.read_bytes() == b"mine"


def test_restore_does_not_overwrite_what_came_meanwhile(store: Store, tmp_path: Path) -> None:
    point = store.take(1)
    target = tmp_path / "vms" / "d.qcow2"
    with pytest.raises(Conflict):
        store.repository.restore(
            point, target, image=store.image, on_progress=lambda *_: target.write_bytes(b"mine") and None
        )
    assert target.read_bytes() == b"mine"
    assert list(target.parent.iterdir()) == [target]


def test_merging_keeps_content_and_what_stands_on_it(store: Store, tmp_path: Path) -> None:
    points = [store.take(seq) for seq in (1, 2, 3, 4)]
    flat = {p.id: tmp_path / f"{p.id}.raw" for p in points}
    for point in points:
        tool("qemu-img", "convert", "-O", "raw", store.repository.file(point), flat[point.id])
    untouched = store.repository.file(points[3]).read_bytes()
    merged = merging.merge(store.repository, points[2], None, attempt="1")
    assert (merged.id, merged.kind, merged.parent, merged.seq) == ("a-3", "full", None, 3)
    assert merging.merge(store.repository, merged, None, attempt="2") == merged, "done once"
    assert delete(store, points[1]) and delete(store, points[0])
    assert [p.id for p in store.repository.points()] == ["a-3", "a-4"]
    for point in store.repository.points():
        store.repository.verify(point)
        assert disks.compare(store.repository.file(point), flat[point.id], formats=("qcow2", "raw"))
    assert store.repository.file(points[3]).read_bytes() == untouched
    assert list(store.repository.leftovers()) == []
    following = store.take(5)
    store.repository.verify(following)


def test_merging_onto_a_kept_point(store: Store) -> None:
    points = [store.take(seq) for seq in (1, 2, 3)]
    merged = merging.merge(store.repository, points[2], points[0], attempt="1")
    assert (merged.kind, merged.parent) == ("inc", "a-1")
    delete(store, points[1])
    store.repository.verify(merged)
    assert disks.probe(store.repository.file(merged)).backing == store.repository.file(points[0])
    with pytest.raises(Invalid, match="does not stand on"):
        merging.merge(store.repository, merged, points[1], attempt="1")


@pytest.mark.parametrize("dies_in", ["flatten", "complete", "write_durably", "_finish"])
def test_a_merge_that_dies_is_ended_or_undone(store: Store, monkeypatch: Any, dies_in: str) -> None:
    """Where it dies as by kill -9 (nothing after that point runs), the chain is whole once ``settle`` has run."""
    points = [store.take(seq) for seq in (1, 2)]

    def die(*_: Any, **__: Any) -> None:
        raise SystemExit

    where = Repository if dies_in == "complete" else merging
    with monkeypatch.context() as patch:
        patch.setattr(where, dies_in, die)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            merging.merge(store.repository, points[1], None, attempt="1")
    assert merging.settle(store.repository, VM) == (1 if dies_in == "_finish" else 0)
    found = store.repository.points(VM)
    assert [p.kind for p in found] == ["full", "full" if dies_in == "_finish" else "inc"]
    for point in found:
        store.repository.verify(point)
    again = merging.merge(store.repository, found[1], None, attempt="1")
    store.repository.verify(again)


def test_the_seed_marks_the_disks_own_clusters(store: Store, tmp_path: Path) -> None:
    """Read back through QEMU's own NBD server is the lab's part; here: sound, once, and kept names stay."""
    disk = tmp_path / "vms" / "d.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", store.image, disk)
    write(disk, 30, 5)
    assert ensure_seed(disk)
    assert not ensure_seed(disk)
    tool("qemu-img", "bitmap", "--add", disk, "p1")
    tool("qemu-img", "bitmap", "--add", disk, "p2")
    assert not ensure_seed(disk, keep=["p2"])
    assert bitmaps(disk) == {SEED: True, "p2": True}
    assert [p.name for p in disk.parent.iterdir()] == ["d.qcow2"]
