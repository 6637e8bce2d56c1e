"""A desk whose disk is encrypted, backed up into an encrypted repository, running and stopped, by real libvirt."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.lab import Lab
from hdcs_tasks.hypervisor import agent, checkpoints, disks, guests, keys, layers
from hdcs_tasks.hypervisor.backup import BackupResult, backup_running, backup_stopped
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.keys import KeyRing
from hdcs_tasks.hypervisor.manifests import BaseImage, Point
from hdcs_tasks.hypervisor.repository import Repository
from tests.lab.desks import Desk, image_file, open_host, put_image, spec_for

pytestmark = pytest.mark.lab

MARK = "a-secret-nobody-shall-find-in-a-file"


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("vault", "disks"):
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(f"the passphrase of {name}")
    return KeyRing(folder)


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    with open_host(lab, "node1") as opened:
        yield opened


@pytest.fixture
def image(lab: Lab, golden_image: Path) -> BaseImage:
    return put_image(golden_image, lab.storage("east"))


@pytest.fixture
def desk(lab: Lab, host: Host, image: BaseImage, ring: KeyRing) -> Iterator[Desk]:
    """A booted desk with an encrypted disk."""
    vm_id, key = str(uuid.uuid4()), ring.get("disks")
    disk = lab.storage("east") / "vms" / vm_id / "disk0.qcow2"
    disk.parent.mkdir(parents=True)
    disks.create_overlay(image_file(lab.storage("east")), disk, bitmap=SEED, base_format="qcow2", key=key)
    made = Desk(vm_id, disk, replace(spec_for(vm_id, str(disk), 21401), disk_key="disks"), host)
    try:
        keys.give_to_libvirt(host, key)
        guests.start(host, made.spec)
        agent.wait_for_agent(host, vm_id, 120)
        yield made
    finally:
        guests.stop(host, vm_id, force=True)
        shutil.rmtree(disk.parent)


def publish(
    repository: Repository, desk: Desk, image: BaseImage, last: Point | None, seq: int, r: BackupResult
) -> Point:
    partial = repository.partial(desk.vm_id, "e", seq, "1")
    draft = Point(
        id=f"e-{seq}", vm_id=desk.vm_id, chain="e", seq=seq, kind="full" if last is None else "inc",
        parent=last.id if last else None, checkpoint=f"e-{seq}", checkpoint_xml=r.checkpoint_xml,
        consistency=r.consistency, definition=desk.spec.to_dict(), base=image, key="vault",
    )  # fmt: skip
    return repository.publish(partial, draft)


def test_nothing_of_an_encrypted_desk_is_written_in_clear(
    lab: Lab, desk: Desk, image: BaseImage, ring: KeyRing, tmp_path: Path
) -> None:
    repository, disk_key = Repository(lab.storage("east"), ring), ring.get("disks")
    moments, points, last = [], [], None
    for seq in (1, 2, 3):
        if seq < 3:
            desk.sh(f"for i in $(seq 2000); do echo {MARK}; done > /root/{seq}; sync")
            guests.suspend(desk.host, desk.vm_id)
        else:
            desk.sh("echo stopped > /root/3; sync")
            guests.stop(desk.host, desk.vm_id)
        how = {
            "target": repository.partial(desk.vm_id, "e", seq, "1"), "checkpoint": f"e-{seq}", "key": ring.get("vault"),
            "backing": repository.backing(last or image, desk.vm_id, "e"),
            "incremental_from": last.checkpoint if last else None,
        }  # fmt: skip
        if seq < 3:
            result = backup_running(desk.host, desk.vm_id, freeze=False, **how)  # type: ignore[arg-type]
        else:
            assert last is not None
            kept = (last.checkpoint_xml,)
            result = backup_stopped(
                desk.host, desk.vm_id, disk=desk.disk, disk_key=disk_key, checkpoints=kept, **how  # type: ignore[arg-type]
            )  # fmt: skip
        last = publish(repository, desk, image, last, seq, result)
        points.append(last)
        moments.append(Path(shutil.copy(desk.disk, tmp_path / f"{seq}.qcow2")))
        if seq < 3:
            checkpoints.keep_checkpoints(desk.host, desk.vm_id, last.checkpoint)
            guests.resume(desk.host, desk.vm_id)
    print(f"bytes of the points: {[p.file_bytes for p in points]}")
    for point, moment in zip(points, moments, strict=True):
        repository.verify(point)
        restored = desk.disk.with_name(f"{point.id}.qcow2")
        repository.restore(point, restored, image=image_file(lab.storage("east")), key=disk_key)
        assert layers.same_content(restored, moment, (disk_key,), (disk_key,)), point.id
        restored.unlink()
    folders = (desk.disk.parent, repository.folder / desk.vm_id)
    clear = [f for folder in folders for f in folder.rglob("*") if f.is_file() and MARK.encode() in f.read_bytes()]
    assert clear == []
    repository.delete_chain(desk.vm_id, "e")
    secrets = [s.XMLDesc(0) for s in desk.host.conn.listAllSecrets(0)]
    assert len(secrets) == 2
    assert all("ephemeral='yes' private='yes'" in text for text in secrets), "libvirt keeps none and shows none"
