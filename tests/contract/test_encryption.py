"""Encrypted repositories and disks on real LUKS files: nothing in clear, nothing lost, no key where others look."""

from __future__ import annotations

import json
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from hdcs_tasks.backup.node import stay_encrypted
from hdcs_tasks.errors import BackupBroken, HypervisorRefused, NotFound, Rejected
from hdcs_tasks.hypervisor import disks, keys, layers, manifests, merging
from hdcs_tasks.hypervisor.bitmaps import bitmaps, ensure_seed
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.keys import KeyRing
from hdcs_tasks.hypervisor.manifests import BaseImage, Point
from hdcs_tasks.hypervisor.repository import Repository
from tests.unit.test_hypervisor_repository import needs_qemu_img, tool, write  # noqa: F401 - needs_qemu_img is a fixture

VM = str(uuid.UUID(int=7))
pytestmark = pytest.mark.contract

SECRET = b"correct horse battery staple"
MARK = b"this must not be seen in any file"


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    folder = tmp_path / "keys"
    folder.mkdir()
    for name, content in (("vault", SECRET), ("disks", b"another key of good length")):
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(content + b"\n")
    return KeyRing(folder)


def test_keys_come_from_files_nobody_else_reads(ring: KeyRing) -> None:
    assert ring.get("vault").content == SECRET
    assert ring.find("") is None
    assert "horse" not in f"{ring.get('vault')!r}"
    with pytest.raises(NotFound, match="not on this server node"):
        ring.get("absent")
    assert ring.folder is not None
    (ring.folder / "vault").chmod(0o640)
    with pytest.raises(Rejected, match="others may read"):
        ring.get("vault")
    (ring.folder / "short").touch(mode=0o600)
    (ring.folder / "short").write_text("abc")
    with pytest.raises(Rejected, match="unfit"):
        ring.get("short")
    for name in ("../vault", "", "A B"):
        with pytest.raises(Rejected):
            ring.get(name)


def test_keys_come_from_a_secret_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text(
        '#!/bin/sh\n[ "$1" = vault ] && echo "correct horse battery staple" || { echo leak >&2; exit 3; }\n'
    )
    store.chmod(0o700)
    assert KeyRing(None, str(store)).get("vault").content == SECRET
    with pytest.raises(NotFound, match="exit code 3") as caught:
        KeyRing(None, str(store)).get("other")
    assert "leak" not in str(caught.value)


def test_ps_shows_no_key(ring: KeyRing, tmp_path: Path) -> None:
    """What a child is started with, and what it inherits, as any other process of the machine would see it."""
    seen = tmp_path / "seen"
    look = "; ".join(f'tr "\\0" "\\n" < /proc/$$/{what} >> {seen}' for what in ("cmdline", "environ"))
    script = look + f"; cat ${{2##*file=}} > {seen}.key"
    keys.run(["sh", "-c", script, "sh"], keys=(ring.get("vault"),), timeout_s=10)
    assert "secret,id=key-vault,file=/dev/fd/" in seen.read_text()
    assert SECRET.decode() not in seen.read_text()
    assert Path(f"{seen}.key").read_bytes() == SECRET, "and yet the child has it"


class Vault:
    """A storage whose repository is encrypted, and a VM whose disk is, too."""

    def __init__(
        self, root: Path, ring: KeyRing, *, base_key: str | None = None, disk_key: str | None = "disks"
    ) -> None:
        for folder in ("images", "vms", "backups"):
            (root / folder).mkdir(parents=True)
        self.root, self.ring = root, ring
        self.repository = Repository(root, ring)
        self.image = root / "images" / "mini-1.qcow2"
        tool("qemu-img", "create", "-q", "-f", "qcow2", self.image, "16M")
        write(self.image, 0, 1, 4)
        with self.image.open("ab") as file:
            file.write(MARK * 3)  # an image's file need not end at a sector
        self.plain_base = BaseImage("mini", 1, disks.sha256(self.image))
        self.base = self.repository.bases.keep(self.plain_base, self.image, key=ring.find(base_key))
        self.disk = root / "vms" / "d.qcow2"
        self.key = ring.find(disk_key)
        disks.create_overlay(self.image, self.disk, bitmap=SEED, base_format="qcow2", key=self.key)

    def change(self, at_mib: int) -> None:
        """Write a mark over one MiB."""
        raw = self.root / "mark"
        raw.write_bytes((MARK * (1 << 15))[: 1 << 20])
        keys.run(
            ["qemu-io"], "-c", f"write -q -s {raw} {at_mib}M 1M", keys.named(self.disk, (self.key,)), keys=(self.key,),
            timeout_s=60,
        )  # fmt: skip
        raw.unlink()

    def plain(self, name: str) -> Path:
        target = self.root / name
        layers.flatten(self.disk, target, None, None, None, 60, keys=(self.key,))
        return target

    def take(self, seq: int, key: str | None = "vault") -> Point:
        below = self.repository.get(VM, f"a-{seq - 1}") if seq > 1 else self.base
        partial = self.repository.partial(VM, "a", seq, "1")
        backing = self.repository.backing(below, VM, "a")
        backing = replace(backing, keys=self.repository.keys_of(below))
        layers.extract_layer(
            self.disk, partial, backing, None, None, 60, keys=(self.key,), key=self.ring.find(key)
        )  # fmt: skip
        return self.repository.publish(
            partial,
            Point(
                id=f"a-{seq}", vm_id=VM, chain="a", seq=seq, kind="full" if seq == 1 else "inc",
                parent=None if seq == 1 else f"a-{seq - 1}", checkpoint=f"a-{seq}", checkpoint_xml="<x/>",
                consistency="crash", definition={}, base=self.base, key=key,
            ),
        )  # fmt: skip

    def is_clear(self) -> list[str]:
        """Files of the VM and of the repository; the image is not encrypted where VMs are cloned from it."""
        own = [*(self.root / "vms").rglob("*"), *(self.root / "backups").rglob("*")]
        return [p.name for p in own if p.is_file() and MARK in p.read_bytes()]


def test_an_encrypted_chain_is_verified_restored_and_merged(tmp_path: Path, ring: KeyRing) -> None:
    vault = Vault(tmp_path / "srv", ring, base_key="vault")
    repository, points = vault.repository, []
    for seq in (1, 2, 3):
        vault.change(4 + seq)
        points.append(vault.take(seq))
    assert vault.is_clear() == [], "neither the disk nor a point holds it in clear"
    then = vault.plain("then.qcow2")
    assert "horse" not in "".join(p.read_text() for p in repository.folder.rglob("*.json"))
    for point in points:
        repository.verify(point)
    restored = vault.root / "vms" / "r.qcow2"
    repository.restore(points[2], restored, image=vault.image, key=vault.key)
    assert layers.same_content(restored, then, (vault.key,))
    assert repository.compare(points[2], restored, key=vault.key)
    assert not repository.compare(points[0], restored, key=vault.key)
    assert bitmaps(restored) == {SEED: True}
    assert disks.probe(restored).backing == vault.image
    _restored_without_hdcs(repository.file(points[2]).parent, then)
    whole = merging.merge(repository, points[2], None, attempt="2")
    assert (whole.kind, whole.key, whole.base) == ("full", "vault", vault.base)
    repository.verify(whole)
    assert repository.compare(whole, restored, key=vault.key)


def _restored_without_hdcs(chain: Path, then: Path) -> None:
    """By the command of docs/backups.md, run where it says; a base image taken for a point fails loudly."""
    page = (Path(__file__).parents[2] / "docs" / "backups.md").read_text()
    command = page[page.index("qemu-img convert -O qcow2 --object") :].split("```")[0]
    out = then.with_name("without.qcow2")
    command = command.replace("/var/lib/libvirt/images/desk-001.qcow2", str(out))
    (chain / "vault").write_bytes(SECRET)
    subprocess.run(["sh", "-c", command], check=True, cwd=chain)
    assert layers.same_content(out, then)
    naive = (
        command[: command.index('"backing.backing.backing.driver')]
        + command[command.index('"backing.backing.backing.file.key') :]
    )
    naive = naive.replace("backing.backing.backing.file.key-secret", "backing.backing.backing.encrypt.key-secret")
    done = subprocess.run(["sh", "-c", naive], cwd=chain, capture_output=True, text=True)
    assert done.returncode != 0 and "not in qcow2 format" in done.stderr
    (chain / "vault").unlink()


def test_without_the_key_it_is_not_restored_and_with_it_the_disk_grows(tmp_path: Path, ring: KeyRing) -> None:
    vault = Vault(tmp_path / "srv", ring)
    vault.change(5)
    point = vault.take(1)
    keys.run(
        ["qemu-img", "bitmap"], "--remove", *keys.opened(vault.disk, (vault.key,)), SEED, keys=(vault.key,),
        timeout_s=60,
    )  # fmt: skip
    assert ensure_seed(vault.disk, key=vault.key)
    assert bitmaps(vault.disk) == {SEED: True}
    disks.resize(vault.disk, 32 << 20, key=vault.key)
    assert layers.virtual_bytes(vault.disk) == 32 << 20
    blind = Repository(vault.root, KeyRing(tmp_path / "nothing"))
    blind.verify(point)
    with pytest.raises(NotFound, match="key vault is not on this server node"):
        blind.restore(point, tmp_path / "r.qcow2", image=vault.image)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "vault").touch(mode=0o600)
    (tmp_path / "wrong" / "vault").write_text("not the passphrase it was made with")
    with pytest.raises(HypervisorRefused, match="Invalid password"):
        Repository(vault.root, KeyRing(tmp_path / "wrong")).restore(point, tmp_path / "r.qcow2", image=vault.image)
    assert list(tmp_path.glob("*r.qcow2*")) == []


def test_a_chain_may_go_on_with_another_key_or_in_clear(tmp_path: Path, ring: KeyRing) -> None:
    """Also one whose base image lies in clear, by a manifest from before there were containers."""
    vault = Vault(tmp_path / "srv", ring)
    vault.change(5)
    first = vault.take(1, None)
    file = vault.repository.file(first).with_suffix(".json")
    manifest = json.loads(file.read_text())
    for name in ("key", "stored_sha256", "stored_bytes"):
        del manifest["base"][name]
    manifest.pop("manifest_sha256")
    file.write_text(json.dumps(manifest | {"manifest_sha256": manifests._seal(manifest)}))
    assert vault.repository.get(VM, "a-1") == first
    for seq, key in ((2, "vault"), (3, None)):
        vault.change(4 + seq)
        point = vault.take(seq, key)
    vault.repository.verify(point)
    merging.merge(vault.repository, point, vault.repository.get(VM, "a-2"), attempt="1")
    target = vault.root / "vms" / "r.qcow2"
    vault.repository.restore(point, target, image=vault.image)
    assert layers.same_content(target, vault.disk, (), (vault.key,))


def test_a_long_encrypted_chain_is_merged(tmp_path: Path, ring: KeyRing) -> None:
    """The keys of so many files, written out, are more than a header can hold."""
    vault = Vault(tmp_path / "srv", ring, base_key="vault", disk_key=None)
    vault.change(5)
    points, key = [vault.take(1)], ring.get("vault")
    first = vault.repository.file(points[0])
    for seq in range(2, 20):  # the same file again, each on the one before
        partial = vault.repository.partial(VM, "a", seq, "1")
        partial.write_bytes(first.read_bytes())
        layers.set_backing(partial, layers.Backing(points[-1].file_name), key)
        draft = replace(points[-1], id=f"a-{seq}", seq=seq, kind="inc", parent=points[-1].id, checkpoint=f"a-{seq}")
        points.append(vault.repository.publish(partial, draft))
    merged = merging.merge(vault.repository, points[18], points[16], attempt="1")
    assert merged.parent == points[16].id
    vault.repository.check_headers(vault.repository.links(merged))
    assert layers.same_content(vault.repository.file(merged), vault.disk, vault.repository.keys_of(merged))


def test_no_point_in_clear_comes_into_an_encrypted_repository(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.folder.mkdir()
    stay_encrypted(repository, "")  # it is in clear, and may stay so
    stay_encrypted(repository, "vault")
    stay_encrypted(repository, "another")
    with pytest.raises(Rejected, match="no HDCS_BACKUP_KEY"):
        stay_encrypted(repository, "")
    assert repository.vm_ids() == [] and list(repository.leftovers()) == []


def test_a_key_s_name_in_a_manifest_is_checked() -> None:
    point = Point(
        id="a-1", vm_id=VM, chain="a", seq=1, kind="full", parent=None, checkpoint="a-1", checkpoint_xml="<x/>",
        consistency="crash", definition={}, base=None, key="vault", sha256="0" * 64,
        created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    assert manifests.load(manifests.dump(point), "x").key == "vault"
    with pytest.raises(Rejected):
        manifests.dump(replace(point, key="../../etc/shadow"))


def test_a_base_image_lies_once_in_a_container_and_comes_back_byte_for_byte(tmp_path: Path, ring: KeyRing) -> None:
    vault = Vault(tmp_path / "srv", ring, base_key="vault", disk_key=None)
    bases, content = vault.repository.bases, vault.image.read_bytes()
    vault.change(5)
    point = vault.take(1, None)
    target = vault.root / "vms" / "r.qcow2"
    vault.repository.restore(point, target, image=vault.image)
    assert layers.same_content(target, vault.disk)
    assert bases.keep(vault.plain_base, vault.image, key=ring.get("vault")) == vault.base, "once per repository"
    other = bases.keep(vault.plain_base, vault.image, key=ring.get("disks"))
    assert sorted(p.name for p in bases.folder.glob("*.luks")) == sorted([vault.base.file_name, other.file_name])
    assert ring.folder is not None
    (ring.folder / "disks").write_text("what the key of this name is from now on")
    anew = bases.keep(vault.plain_base, vault.image, key=ring.get("disks"))
    assert bases.keep(vault.plain_base, vault.image, key=ring.get("disks")) == anew != other
    (bases.folder / ".dead.partial").touch()
    assert vault.repository.drop_unused_bases() == sorted([other.stored_sha256, anew.stored_sha256])
    left = sorted(p.name for p in bases.folder.iterdir() if not p.name.endswith(".lock"))
    assert left == sorted([vault.base.file_name, f"{vault.base.sha256}.vault.json"])
    vault.image.unlink()
    assert bases.bring_back(vault.base, vault.image)
    assert vault.image.read_bytes() == content
    assert not bases.bring_back(vault.base, vault.image)
    _changed_it_is_refused(vault, point)


def _changed_it_is_refused(vault: Vault, point: Point) -> None:
    file = vault.repository.bases.file(vault.base)
    good = file.read_bytes()
    file.write_bytes(bytes([*good[:-700], good[-700] ^ 1, *good[-699:]]))
    with pytest.raises(BackupBroken, match="has changed"):
        Repository(vault.root).verify(point)  # without the key, too
    vault.image.unlink()
    with pytest.raises(BackupBroken, match="does not hold image mini:1"):
        vault.repository.bases.bring_back(vault.base, vault.image)
    assert list(vault.image.parent.iterdir()) == []
    file.unlink()
    with pytest.raises(BackupBroken, match="is missing"):
        vault.repository.verify(point)
