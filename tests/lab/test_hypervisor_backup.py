"""Backups of real guests: points equal the disk of their moment, increments cost what changed, nothing is left over."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from deploy.lab import Lab
from hdcs_tasks.errors import BackupBroken, Cancelled, Conflict, HypervisorRefused
from hdcs_tasks.hypervisor import agent, checkpoints, disks, guests, jobs
from hdcs_tasks.hypervisor.backup import BackupResult, backup_running, backup_stopped, discard_left_behind
from hdcs_tasks.hypervisor.bitmaps import bitmaps, ensure_seed
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.manifests import BaseImage, Point
from hdcs_tasks.hypervisor.repository import Repository
from tests.lab.desks import MIB, Desk, image_file, image_info, open_host, put_image, running_desk

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def host(lab: Lab) -> Iterator[Host]:
    with open_host(lab, "node1") as opened:
        yield opened


@pytest.fixture(scope="module")
def image(lab: Lab, golden_image: Path) -> BaseImage:
    return put_image(golden_image, lab.storage("east"))


@pytest.fixture(scope="module")
def repository(lab: Lab) -> Repository:
    return Repository(lab.storage("east"))


@pytest.fixture(scope="module")
def shared_desk(lab: Lab, host: Host, image: BaseImage) -> Iterator[Desk]:
    with running_desk(lab, host, image, 21201) as made:
        yield made


@pytest.fixture
def desk(shared_desk: Desk, repository: Repository) -> Iterator[Desk]:
    """A running desk without backups, disturbed by its earlier users as little as a real one is."""
    yield shared_desk
    checkpoints.keep_checkpoints(shared_desk.host, shared_desk.vm_id)
    for chain in ("a", "b"):
        repository.delete_chain(shared_desk.vm_id, chain)
    shared_desk.sh("rm -f /root/*; sync; fstrim / 2>/dev/null; true")


@pytest.fixture
def own_desk(lab: Lab, host: Host, image: BaseImage) -> Iterator[Desk]:
    """For what a desk does not survive."""
    with running_desk(lab, host, image, 21202) as made:
        yield made


class Chain:
    """Takes point after point of a desk into the repository, as a backup step does."""

    def __init__(self, repository: Repository, desk: Desk, image: BaseImage, name: str) -> None:
        self.repository = repository
        self.desk = desk
        self.image = image
        self.name = name
        self.last: Point | None = None

    def take(self, **more: object) -> tuple[Point, BackupResult]:
        vm_id, last, seq = self.desk.vm_id, self.last, self.last.seq + 1 if self.last else 1
        partial = self.repository.partial(vm_id, self.name, seq, "1")
        point_id = f"{self.name}-{seq}"
        result = backup_running(
            self.desk.host, vm_id, target=partial, checkpoint=point_id,
            backing=self.repository.backing(last or self.image, vm_id, self.name),
            incremental_from=last.checkpoint if last else None, **more,  # type: ignore[arg-type]
        )  # fmt: skip
        self.last = self.repository.publish(partial, self.draft(seq, result))
        checkpoints.keep_checkpoints(self.desk.host, vm_id, point_id)
        return self.last, result

    def draft(self, seq: int, result: BackupResult) -> Point:
        point_id, parent = f"{self.name}-{seq}", self.last.id if self.last else None
        return Point(
            id=point_id, vm_id=self.desk.vm_id, chain=self.name, seq=seq, kind=result.kind, parent=parent,
            checkpoint=point_id, checkpoint_xml=result.checkpoint_xml, consistency=result.consistency,
            definition=self.desk.spec.to_dict(), base=self.image,
        )  # fmt: skip


def test_points_equal_their_moments_and_cost_what_changed(
    desk: Desk, repository: Repository, image: BaseImage, tmp_path: Path
) -> None:
    chain = Chain(repository, desk, image, "a")
    points: list[Point] = []
    sizes = []
    for mib in (8, 1, 0, 4):
        if mib:
            desk.write(f"data{mib}", mib)
        guests.suspend(desk.host, desk.vm_id)
        point, result = chain.take()
        desk.copy(tmp_path / f"{point.id}.qcow2")
        guests.resume(desk.host, desk.vm_id)
        points.append(point)
        sizes.append((mib, result.bytes, round(result.seconds, 3)))
        assert checkpoints.checkpoint_names(desk.host.guest(desk.vm_id)) == [SEED, point.id]
    print(f"(MiB changed, bytes of the point, seconds): {sizes}; base image {disks.probe(desk.disk).backing}")
    for number, (mib, size, _) in enumerate(sizes):
        # File system metadata, the cluster size and qcow2's own tables come on top; a full one also has the boot's
        # writes. Never the base image.
        assert mib * MIB <= size < (mib + (4 if number == 0 else 2)) * MIB, sizes
    for point in points:
        repository.verify(point)
        restored = tmp_path / f"restored-{point.id}.qcow2"
        image_path = image_file(desk.disk.parents[2])
        repository.restore(point, restored, image=image_path)
        assert disks.compare(restored, tmp_path / f"{point.id}.qcow2")
        assert repository.compare(point, tmp_path / f"{point.id}.qcow2")
        assert disks.probe(restored).backing == image_path
        assert bitmaps(restored) == {SEED: True}
    assert not disks.compare(tmp_path / "restored-a-1.qcow2", tmp_path / "restored-a-2.qcow2")
    assert repository.delete_chain(desk.vm_id, "a") == 4
    assert list(repository.folder.glob(f"{desk.vm_id}*")) == []


def test_a_second_chain_has_the_whole_layer_again(
    desk: Desk, repository: Repository, image: BaseImage, tmp_path: Path
) -> None:
    desk.write("one", 4)
    Chain(repository, desk, image, "a").take()
    desk.write("two", 4)
    guests.suspend(desk.host, desk.vm_id)
    point, result = Chain(repository, desk, image, "b").take(bandwidth_mib_s=8)
    desk.copy(tmp_path / "then.qcow2")
    guests.resume(desk.host, desk.vm_id)
    assert result.bytes > 8 * MIB
    assert result.seconds >= result.bytes / (8 * MIB), "what QEMU has under way before it hears of a limit counts, too"
    assert repository.compare(point, tmp_path / "then.qcow2")


def test_file_systems_are_frozen_for_the_moment_and_thawed(
    desk: Desk, repository: Repository, image: BaseImage
) -> None:
    desk.write("x", 1)
    point, result = Chain(repository, desk, image, "a").take()
    assert (result.consistency, point.consistency) == ("filesystem", "filesystem")
    desk.write("y", 1)  # a frozen file system would hang here
    _, result = Chain(repository, desk, image, "b").take(freeze=False)
    assert result.consistency == "crash"


def test_a_cancel_leaves_no_file_no_checkpoint_no_job(desk: Desk, repository: Repository, image: BaseImage) -> None:
    desk.write("big", 48)
    partial = repository.partial(desk.vm_id, "a", 1, "1")
    with pytest.raises(Cancelled):  # as soon as the job has begun
        Chain(repository, desk, image, "a").take(freeze=False, cancelled=partial.exists)
    clean(desk, repository)
    Chain(repository, desk, image, "a").take()


def clean(desk: Desk, repository: Repository) -> None:
    assert jobs.current_job(desk.host, desk.vm_id) is None
    assert checkpoints.checkpoint_names(desk.host.guest(desk.vm_id)) == [SEED]
    assert list(repository.leftovers(desk.vm_id)) == []
    desk.sh("echo alive > /root/alive; sync")


def test_what_is_in_the_way_is_left_alone(desk: Desk, repository: Repository, image: BaseImage) -> None:
    """A refused attempt deletes neither the file nor the checkpoint of the one before."""
    Chain(repository, desk, image, "a").take()
    taken = repository.partial(desk.vm_id, "b", 1, "1")
    taken.write_bytes(b"another's")
    with pytest.raises(Conflict):
        Chain(repository, desk, image, "b").take()
    assert taken.read_bytes() == b"another's"
    taken.unlink()
    with pytest.raises(Conflict):
        backup_running(
            desk.host, desk.vm_id, target=taken, checkpoint="a-1", backing=repository.backing(image, desk.vm_id, "b")
        )
    assert checkpoints.checkpoint_names(desk.host.guest(desk.vm_id)) == [SEED, "a-1"]
    assert not taken.exists()


def test_the_backup_of_a_dead_worker_is_undone(desk: Desk, repository: Repository, image: BaseImage) -> None:
    desk.write("big", 64)
    partial = repository.partial(desk.vm_id, "a", 1, "1")
    base = repository.backing(image, desk.vm_id, "a").path
    argv = [sys.executable, "-m", "tests.lab.dead_worker", "backup", desk.host.uri, desk.vm_id]
    worker = subprocess.Popen([*argv, str(partial), "a-1", base], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not partial.exists():
        assert time.monotonic() < deadline
    worker.kill()
    worker.wait()
    with suppress(HypervisorRefused):  # it may have died before the thaw; if not, as if it had
        agent.freeze(desk.host, desk.vm_id)
    discard_left_behind(desk.host, desk.vm_id, partial, "a-1")
    clean(desk, repository)


def test_after_a_killed_qemu_the_next_is_full(
    own_desk: Desk, repository: Repository, image: BaseImage, tmp_path: Path
) -> None:
    desk = own_desk
    chain = Chain(repository, desk, image, "a")
    desk.write("one", 4)
    chain.take()
    desk.kill_qemu()
    deadline = time.monotonic() + 60
    while desk.host.guest(desk.vm_id).isActive():
        assert time.monotonic() < deadline
    assert set(bitmaps(desk.disk).values()) == {False}
    guests.start(desk.host, replace(desk.spec, attempt=2))
    agent.wait_for_agent(desk.host, desk.vm_id, 90)
    assert not checkpoints.define_seed(desk.host.guest(desk.vm_id))
    with pytest.raises(BackupBroken):
        checkpoints.redefine_checkpoints(
            desk.host, desk.vm_id, [checkpoints.checkpoint_xml(SEED), chain.last.checkpoint_xml]
        )
    with pytest.raises(BackupBroken):
        chain.take()
    assert checkpoints.checkpoint_names(desk.host.guest(desk.vm_id)) == []
    guests.suspend(desk.host, desk.vm_id)
    point, result = Chain(repository, desk, image, "b").take()  # no seed: the base is taken out afterwards
    desk.copy(tmp_path / "then.qcow2")
    guests.resume(desk.host, desk.vm_id)
    assert result.bytes < 8 * MIB
    assert repository.compare(point, tmp_path / "then.qcow2")
    guests.stop(desk.host, desk.vm_id, force=True)
    assert ensure_seed(desk.disk, keep=[point.checkpoint])
    assert bitmaps(desk.disk) == {SEED: True, point.checkpoint: True}


def test_stopped_vms_by_a_guest_that_never_runs(
    lab: Lab, own_desk: Desk, repository: Repository, image: BaseImage
) -> None:
    desk = own_desk
    desk.write("one", 4)
    chain = Chain(repository, desk, image, "a")
    chain.take()
    last, _ = chain.take()
    assert "<name>a-1</name>" in last.checkpoint_xml, "its parent, which is dropped by now"
    desk.write("two", 2)
    guests.stop(desk.host, desk.vm_id)
    kept = (last.checkpoint_xml,)
    targets = [repository.partial(desk.vm_id, "a", 3, "1"), repository.partial(desk.vm_id, "b", 1, "1")]
    inc = backup_stopped(
        desk.host, desk.vm_id, disk=desk.disk, target=targets[0], checkpoint="a-3", checkpoints=kept,
        backing=repository.backing(last, desk.vm_id, "a"), incremental_from=last.checkpoint,
    )  # fmt: skip
    full = backup_stopped(
        desk.host, desk.vm_id, disk=desk.disk, target=targets[1], checkpoint="b-1",
        backing=repository.backing(image, desk.vm_id, "b"),
    )  # fmt: skip
    print(f"stopped: inc {inc.bytes} in {inc.seconds:.2f} s, full {full.bytes} in {full.seconds:.2f} s")
    assert inc.consistency == "filesystem"
    assert inc.bytes < full.bytes
    assert all(disks.compare(target, desk.disk) for target in targets)
    assert desk.host.lookup(desk.vm_id) is None
    assert bitmaps(desk.disk) == {SEED: True, "a-2": True, "a-3": True, "b-1": True}
    guests.start(desk.host, desk.spec)
    with open_host(lab, "node2") as other, pytest.raises(Conflict):
        backup_stopped(
            other, desk.vm_id, disk=desk.disk, target=targets[0].with_name(".x"), checkpoint="c",
            backing=repository.backing(image, desk.vm_id, "b"),
        )  # fmt: skip


def test_incomplete_bitmaps_are_seen(desk: Desk) -> None:
    """``image_info`` of a running guest shows in-use bitmaps: only QEMU knows them, so ensure_seed is refused."""
    assert "bitmaps" in str(image_info(desk.disk))
    with pytest.raises(Exception, match="lock"):
        ensure_seed(desk.disk, keep=[])
    assert desk.host.guest(desk.vm_id).state()[0] == libvirt.VIR_DOMAIN_RUNNING
