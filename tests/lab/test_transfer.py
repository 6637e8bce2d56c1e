"""Files between two storages that share nothing, over real libvirt: sparse, resumed, whole or without a name."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab import Lab
from deploy.lab.lab import SRV
from hdcs_tasks.errors import Cancelled, Conflict, HypervisorRefused, NotFound, Unavailable, Unreachable
from hdcs_tasks.hypervisor import storage, transfer
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.transfer import RemoteFile, fetch
from tests.lab.desks import uri

pytestmark = pytest.mark.lab

MIB = 1 << 20
NAME = "images/odd/1.qcow2"


@pytest.fixture(scope="module")
def source(lab: Lab) -> Iterator[Host]:
    """node1's libvirt, with the storage pools a node makes when it joins."""
    (lab.storage("east") / "images").mkdir(exist_ok=True)
    (lab.storage("east") / "vms").mkdir(exist_ok=True)
    with Host.open(uri(lab, "node1")) as host:
        storage.ensure_pools(host, storage.StorageLayout(SRV))
        yield host


@pytest.fixture
def odd(lab: Lab, source: Host) -> RemoteFile:
    """64 MiB, of which 9 MiB and a bit are data: a hole in front, in the middle and at the end."""
    path = lab.storage("east") / NAME
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        for at, size in ((3 * MIB, 5 * MIB), (30 * MIB, 4 * MIB), (50 * MIB + 4096, 12345)):
            file.seek(at)
            file.write(os.urandom(size))
        file.truncate(64 * MIB)
    seen = transfer.describe(path, NAME)
    assert seen["size_bytes"] == 64 * MIB
    assert seen["allocated_bytes"] < 10 * MIB
    return RemoteFile(seen["path"], seen["size_bytes"], seen["sha256"])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "here.qcow2"


class Stop(Exception):
    pass


def until(percent: float) -> transfer.Progress:
    def told(seen: float, _phase: str, _eta_s: float | None) -> None:
        if seen >= percent:
            raise Stop

    return told


def test_only_data_travels(source: Host, odd: RemoteFile, target: Path, lab: Lab) -> None:
    told: list[tuple[float, str, float | None]] = []
    got = fetch([source.uri], odd, target, on_progress=lambda *seen: told.append(seen))
    assert target.read_bytes() == (lab.storage("east") / NAME).read_bytes()
    assert 9 * MIB <= got.bytes < 10 * MIB
    assert target.stat().st_blocks * 512 < 11 * MIB
    assert told[-1][:2] == (100.0, "copy 64/64 MiB")
    assert os.listdir(target.parent) == [target.name]
    assert fetch([source.uri], odd, target).bytes == 0, "there already"
    assert [p.name() for p in source.conn.listAllStoragePools(0) if p.name().startswith(transfer.POOL_PREFIX)] == []


def test_it_goes_on_where_it_was(source: Host, odd: RemoteFile, target: Path) -> None:
    with pytest.raises(Stop):
        fetch([source.uri], odd, target, on_progress=until(30))
    (partial,) = target.parent.glob("*.transfer")
    came = partial.stat().st_size
    got = fetch(["qemu+tcp://127.0.0.1:1/system", source.uri], odd, target)  # the first source is off
    assert got.resumed_at == came >= 0.3 * odd.size_bytes
    assert got.bytes < 5 * MIB
    assert transfer.describe(target, NAME)["sha256"] == odd.sha256


def test_what_was_damaged_on_the_way_is_read_again(source: Host, odd: RemoteFile, target: Path) -> None:
    with pytest.raises(Stop):
        fetch([source.uri], odd, target, on_progress=until(30))
    (partial,) = target.parent.glob("*.transfer")
    with partial.open("r+b") as file:
        file.seek(4 * MIB)
        file.write(b"rot")
    got = fetch([source.uri], odd, target)
    assert (got.resumed_at, transfer.describe(target, NAME)["sha256"]) == (0, odd.sha256)


def test_another_file_never_gets_the_name(source: Host, odd: RemoteFile, target: Path) -> None:
    with pytest.raises(HypervisorRefused, match="another hash"):
        fetch([source.uri], RemoteFile(NAME, odd.size_bytes, "0" * 64), target)
    with pytest.raises(HypervisorRefused, match="another hash"):
        fetch([source.uri], RemoteFile(NAME, odd.size_bytes + 7, odd.sha256), target)
    with pytest.raises(NotFound, match="images/odd/2"):
        fetch([source.uri], RemoteFile("images/odd/2.qcow2", 7, odd.sha256), target)
    with pytest.raises(Unreachable, match="no source"):
        fetch(["qemu+tcp://127.0.0.1:1/system"], odd, target)
    assert not target.exists()
    target.write_bytes(b"mine")
    with pytest.raises(Conflict, match="another file"):
        fetch([source.uri], odd, target)
    assert target.read_bytes() == b"mine"


def test_a_cancel_leaves_nothing_and_two_at_once_do_not_mix(source: Host, odd: RemoteFile, target: Path) -> None:
    seen: list[float] = []
    begun = threading.Event()

    def told(percent: float, *_: object) -> None:
        seen.append(percent)
        begun.set()

    def first() -> None:
        with pytest.raises(Cancelled):
            fetch([source.uri], odd, target, bandwidth_mib_s=2, on_progress=told, cancelled=lambda: done.is_set())

    done = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert begun.wait(30)
        with pytest.raises(Unavailable, match="already"):
            fetch([source.uri], odd, target)
    finally:
        done.set()
        thread.join(30)
    assert os.listdir(target.parent) == []


def test_a_cut_link_is_told_and_the_next_attempt_goes_on(source: Host, odd: RemoteFile, target: Path, lab: Lab) -> None:
    def told(percent: float, *_: object) -> None:
        if percent > 10 and not cut:
            cut.append(time.monotonic())
            lab.cut("node1")

    cut: list[float] = []
    try:
        with pytest.raises(Unreachable):
            fetch([uri(lab, "node1")], odd, target, bandwidth_mib_s=4, on_progress=told)
    finally:
        lab.mend("node1")
    assert not target.exists()
    got = fetch([uri(lab, "node1")], odd, target)
    assert got.resumed_at > 0
    assert transfer.describe(target, NAME)["sha256"] == odd.sha256
