"""Live migration between real hosts: the guest's count goes on, a cancel leaves it where it was, nobody is lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from deploy.lab import Lab
from hdcs_tasks.errors import Cancelled, ClaimLost, HypervisorRefused
from hdcs_tasks.hypervisor import checkpoints, disks, guests, jobs, migration
from hdcs_tasks.hypervisor.backup import Backing, backup_running
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.migration import migrate_live
from hdcs_tasks.hypervisor.whereabouts import Presence, Whereabouts, observe
from tests.lab.desks import Desk, open_host, put_image, running_desk, uri

pytestmark = pytest.mark.lab

RAW_FLAGS = (
    libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    | libvirt.VIR_MIGRATE_UNSAFE
)


@pytest.fixture(scope="module")
def east(lab: Lab) -> Iterator[tuple[Host, Host]]:
    with open_host(lab, "node1") as one, open_host(lab, "node2") as two:
        yield one, two


@pytest.fixture(scope="module")
def desk(lab: Lab, golden_image: Path, east: tuple[Host, Host]) -> Iterator[Desk]:
    with running_desk(lab, east[0], put_image(golden_image, lab.storage("east")), 21101) as made:
        yield made


@pytest.fixture
def at_node1(desk: Desk, east: tuple[Host, Host]) -> Desk:
    assert desk.host is east[0], "an earlier test left the guest elsewhere"
    return desk


def raw_migration(guest: libvirt.virDomain, target: str, address: str) -> tuple[float, int]:
    """Milliseconds in all, and of downtime, of libvirt's own call: the baseline."""
    seen: list[int] = []
    conn = guest.connect()
    handle = conn.domainEventRegisterAny(
        guest, libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, lambda _c, _g, stats, _o: seen.append(stats["downtime"]), None
    )
    started = time.monotonic()
    guest.migrateToURI3(target, {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{address}"}, RAW_FLAGS)
    elapsed_ms = (time.monotonic() - started) * 1000
    time.sleep(0.3)
    conn.domainEventDeregisterAny(handle)
    return elapsed_ms, seen[0]


def test_the_count_goes_on_at_the_target(lab: Lab, at_node1: Desk, east: tuple[Host, Host]) -> None:
    """There with ours and back with raw libvirt calls, twice; the guest sees no gap worth the name."""
    one, two = east
    desk, told = at_node1, []
    ours, raw = [], []
    for _ in range(2):
        count, _ = desk.tick()
        kept = checkpoints.export_checkpoints(one, desk.vm_id)
        started = time.monotonic()
        result = migrate_live(
            one, desk.vm_id, target_uri=uri(lab, "node2"), target_address=lab.ip("node2"), unsafe=True,
            graphics_uri=f"spice://{lab.ip('node2')}", on_progress=lambda *seen: told.append(seen),
        )  # fmt: skip
        ours.append(((time.monotonic() - started) * 1000, result.downtime_ms))
        desk.host = two
        assert observe(one, two, desk.vm_id) == Whereabouts(Presence.ABSENT, Presence.RUNNING)
        assert desk.tick()[0] > count
        assert two.guest(desk.vm_id).isPersistent()
        assert result.memory_bytes > 0
        assert result.disk_bytes == 0
        assert result.downtime_ms >= 0
        assert checkpoints.export_checkpoints(two, desk.vm_id) == []
        checkpoints.redefine_checkpoints(two, desk.vm_id, kept)
        assert checkpoints.export_checkpoints(two, desk.vm_id) == kept != []
        raw.append(raw_migration(two.guest(desk.vm_id), uri(lab, "node1"), lab.ip("node1")))
        desk.host = one
        checkpoints.redefine_checkpoints(one, desk.vm_id, kept)
    _, gap_ms = desk.tick()
    print(f"ours (ms in all, downtime): {ours}; raw: {raw}; longest gap in the guest: {gap_ms} ms")
    assert told
    assert all(0 <= percent <= 100 for percent, _, _ in told)
    assert told[-1][0] == 100
    assert min(o[1] for o in ours) < 2 * min(r[1] for r in raw) + 300
    assert gap_ms < max(d for _, d in ours + raw) + 1500


def test_the_console_port_changes_on_the_way(lab: Lab, at_node1: Desk, east: tuple[Host, Host]) -> None:
    one, two = east
    migrate_live(
        one, at_node1.vm_id, target_uri=uri(lab, "node2"), target_address=lab.ip("node2"), unsafe=True,
        console_port=21199,
    )  # fmt: skip
    at_node1.host = two
    info = guests.info(two, at_node1.vm_id)
    assert info is not None
    assert info.console_port == 21199
    assert "21199" in two.guest(at_node1.vm_id).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    migrate_live(
        two, at_node1.vm_id, target_uri=uri(lab, "node1"), target_address=lab.ip("node1"), unsafe=True,
        console_port=21101,
    )  # fmt: skip
    at_node1.host = one
    checkpoints.define_seed(one.guest(at_node1.vm_id))


def slow(lab: Lab, desk: Desk, **more: object) -> None:
    migrate_live(
        desk.host, desk.vm_id, target_uri=uri(lab, "node2"), target_address=lab.ip("node2"), unsafe=True,
        bandwidth_mib_s=2, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def stays(desk: Desk, east: tuple[Host, Host]) -> None:
    seen = observe(*east, desk.vm_id)
    assert seen == Whereabouts(Presence.RUNNING, Presence.ABSENT)
    assert seen.verdict == "source"
    assert jobs.current_job(desk.host, desk.vm_id) is None
    desk.sh("true")


def test_a_cancel_leaves_the_guest_at_the_source(lab: Lab, at_node1: Desk, east: tuple[Host, Host]) -> None:
    seen: list[str] = []

    def on_progress(_percent: float, phase: str, _eta_s: float | None) -> None:
        seen.append(phase)

    with pytest.raises(Cancelled):
        slow(lab, at_node1, on_progress=on_progress, cancelled=lambda: any(s.startswith("memory") for s in seen))
    stays(at_node1, east)


def test_a_lost_claim_and_a_deadline_abort_it(lab: Lab, at_node1: Desk, east: tuple[Host, Host]) -> None:
    def lost() -> bool:
        raise ClaimLost("not ours any more")

    with pytest.raises(ClaimLost):
        slow(lab, at_node1, cancelled=lost)
    stays(at_node1, east)
    with pytest.raises(HypervisorRefused, match="deadline"):
        slow(lab, at_node1, deadline_s=1.5)
    stays(at_node1, east)


def test_a_refusal_is_not_a_cancel(lab: Lab, at_node1: Desk, east: tuple[Host, Host]) -> None:
    with pytest.raises(HypervisorRefused, match="HDCS_MIGRATE_UNSAFE"):
        migrate_live(
            east[0], at_node1.vm_id, target_uri=uri(lab, "node2"), target_address=lab.ip("node2"), unsafe=False
        )
    stays(at_node1, east)


@pytest.mark.parametrize("adopt", [False, True])
def test_the_migration_of_a_dead_worker_is_found(
    lab: Lab, at_node1: Desk, east: tuple[Host, Host], adopt: bool
) -> None:
    one, two = east
    argv = [sys.executable, "-m", "tests.lab.dead_worker", "migrate", one.uri, at_node1.vm_id]
    worker = subprocess.Popen([*argv, uri(lab, "node2"), lab.ip("node2")], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    while "memory" not in (line := worker.stdout.readline()):
        assert line, "the worker ended early"
    worker.kill()
    worker.wait()
    found = jobs.current_job(one, at_node1.vm_id)
    assert found is not None
    assert found.kind == "migration_out"
    assert observe(one, two, at_node1.vm_id).verdict == "source"
    if adopt:
        one.guest(at_node1.vm_id).migrateSetMaxSpeed(0, 0)  # it was slow enough to be seen
    end = jobs.adopt_or_abort_job(one, at_node1.vm_id, adopt=adopt, deadline_s=60)
    assert (end.kind, end.ended) == ("migration_out", "completed" if adopt else "aborted")
    if not adopt:
        stays(at_node1, east)
        return
    assert observe(one, two, at_node1.vm_id).verdict == "target"
    at_node1.host = two
    migrate_live(two, at_node1.vm_id, target_uri=one.uri, target_address=lab.ip("node1"), unsafe=True)
    at_node1.host = one


def test_with_storage_to_another_domain_node(lab: Lab, golden_image: Path) -> None:
    """Only the VM's own layer travels, its bitmaps with it, and what the guest wrote is there."""
    east, west = lab.storage("east"), lab.storage("west")
    image = put_image(golden_image, east)
    put_image(golden_image, west)
    # Storage has one path on all server nodes; here that is the east one, which node3 sees the west storage at.
    lab.run("node3", ["mount", "--bind", str(west), str(east)])
    try:
        with (
            open_host(lab, "node1") as source,
            open_host(lab, "node3") as target,
            running_desk(lab, source, image, 21102) as desk,
        ):
            empty_overlay(desk.disk, west / desk.disk.relative_to(east))
            desk.write("data", 8)
            count, _ = desk.tick()
            sums = desk.sh("md5sum /root/data")
            told: list[tuple[float, str]] = []
            result = migration.migrate_with_storage(
                source, desk.vm_id, target_uri=uri(lab, "node3"), target_address=lab.ip("node3"),
                on_progress=lambda percent, phase, _eta_s: told.append((percent, phase)),
            )  # fmt: skip
            assert all(percent < 50 for percent, phase in told if phase.startswith("disk")), "its memory is to come"
            desk.host = target
            print(f"with storage: {result}")
            assert observe(source, target, desk.vm_id).verdict == "target"
            assert desk.tick()[0] > count
            assert desk.sh("echo 3 > /proc/sys/vm/drop_caches; md5sum /root/data") == sums
            assert 8 << 20 < result.disk_bytes < 16 << 20
            assert checkpoints.define_seed(target.guest(desk.vm_id)), "the bitmap did not travel"
            assert migration.disk_paths(target, desk.vm_id) == [desk.disk]
    finally:
        lab.run("node3", ["umount", str(east)])


def empty_overlay(like: Path, target: Path) -> None:
    """What the target of a migration with storage must hold beforehand."""
    target.parent.mkdir(parents=True)
    base = disks.probe(like).backing
    assert base is not None
    disks.create_overlay(base, target, base_format="qcow2")


def test_an_increment_after_a_migration(lab: Lab, at_node1: Desk, east: tuple[Host, Host]) -> None:
    one, two = east
    base = Backing(str(disks.probe(at_node1.disk).backing))
    folder = at_node1.disk.parent
    backup_running(one, at_node1.vm_id, target=folder / "full.qcow2", checkpoint="m1", backing=base)
    kept = checkpoints.export_checkpoints(one, at_node1.vm_id)
    migrate_live(one, at_node1.vm_id, target_uri=two.uri, target_address=lab.ip("node2"), unsafe=True)
    at_node1.host = two
    checkpoints.redefine_checkpoints(two, at_node1.vm_id, kept)
    at_node1.write("more", 1)
    guests.suspend(two, at_node1.vm_id)
    result = backup_running(
        two, at_node1.vm_id, target=folder / "inc.qcow2", checkpoint="m2", backing=Backing("full.qcow2"),
        incremental_from="m1",
    )  # fmt: skip
    then = at_node1.copy(folder / "then.qcow2")
    guests.resume(two, at_node1.vm_id)
    assert result.bytes < 4 << 20
    assert disks.compare(folder / "inc.qcow2", then)
