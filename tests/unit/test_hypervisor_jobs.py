"""What is concluded from what libvirt says of jobs and guests: pure parts of jobs and migration."""

from __future__ import annotations

import time
from xml.etree import ElementTree

import libvirt
import pytest

from hdcs_tasks.errors import Cancelled, ClaimLost, HypervisorRefused
from hdcs_tasks.hypervisor.checkpoints import checkpoint_xml
from hdcs_tasks.hypervisor.errors import translate
from hdcs_tasks.hypervisor.jobs import JobInfo, job_of, stop_reason
from hdcs_tasks.hypervisor.migration import _Console, _params
from hdcs_tasks.hypervisor.whereabouts import Presence, Whereabouts
from hdcs_tasks.vm.node_move import _told

MIB = 1 << 20
A, R, P, S, U = Presence.ABSENT, Presence.RUNNING, Presence.PAUSED, Presence.SHUTOFF, Presence.UNKNOWN


@pytest.mark.parametrize(
    ("source", "target", "busy", "verdict"),
    [
        (R, A, False, "source"),
        (P, A, False, "source"),
        (R, S, False, "source"),
        (R, P, True, "source"),
        (P, P, True, "source"),
        (R, P, False, "source"),
        (A, R, False, "target"),
        (A, P, False, "target"),
        (S, R, False, "target"),
        (P, R, False, "target"),
        (R, R, False, "both"),
        (P, P, False, "both"),
        (A, A, False, "neither"),
        (S, S, False, "neither"),
        (U, R, False, "unknown"),
        (A, U, False, "unknown"),
    ],
)
def test_where_the_guest_is(source: Presence, target: Presence, busy: bool, verdict: str) -> None:
    assert Whereabouts(source, target, busy).verdict == verdict


def job(elapsed_s: float = 10, disk: tuple[int, int] = (0, 0), memory: tuple[int, int] = (0, 0)) -> JobInfo:
    return JobInfo("migration_out", elapsed_s, disk[0] * MIB, disk[1] * MIB, memory[0] * MIB, memory[1] * MIB, 0)


class Guest:
    """libvirt's, as it answers while a backup begins or ends."""

    def __init__(self, code: int, message: str) -> None:
        self.error = libvirt.libvirtError(message)
        self.error.err = (code, 10, message, 2, None, None, None, 0, 0)

    def jobStats(self) -> None:
        raise self.error


def test_a_backup_that_just_begins_or_ends_is_a_job() -> None:
    missing = "internal error: backup job data missing"
    found = job_of(Guest(libvirt.VIR_ERR_INTERNAL_ERROR, missing))
    assert found is not None and (found.kind, found.phase) == ("backup", "prepare")
    with pytest.raises(HypervisorRefused):
        job_of(Guest(libvirt.VIR_ERR_INTERNAL_ERROR, "internal error: something else"))


def test_progress_of_disk_then_memory() -> None:
    begun = job(disk=(30, 15), memory=(0, 0))
    assert (begun.percent, begun.phase, begun.eta_s) == (50, "disk 15/30 MiB", 10)
    later = job(disk=(30, 30), memory=(90, 30))
    assert (later.percent, later.phase) == (75, "memory 60/90 MiB")
    nothing = job()
    assert (nothing.percent, nothing.eta_s) == (0, None)


class Moving:
    """libvirt's, as it answers while a guest of 128 MiB moves with its disk: it tells of the memory when it begins."""

    def __init__(self, disk: tuple[int, int], memory: tuple[int, int]) -> None:
        self.stats = {
            "type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED, "operation": libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT,
            "time_elapsed": 1000, "disk_total": disk[0] * MIB, "disk_processed": disk[1] * MIB,
            "memory_total": memory[0] * MIB, "memory_remaining": memory[1] * MIB,
        }  # fmt: skip

    def jobStats(self) -> dict[str, int]:
        return self.stats

    def maxMemory(self) -> int:
        return 128 * 1024


def test_a_move_is_not_over_with_its_disk() -> None:
    looks = [((0, 0), (0, 0)), ((32, 16), (0, 0)), ((32, 32), (0, 0)), ((32, 32), (152, 140)), ((32, 32), (152, 76))]
    found = [job_of(Moving(*look)) for look in looks]
    percents = [seen.percent for seen in found if seen is not None]
    assert percents == [0, 10, 20, *percents[3:]] and percents == sorted(percents)
    assert [seen.phase for seen in found if seen is not None][2:4] == ["disk 32/32 MiB", "memory 12/152 MiB"]
    assert found[2] is not None and found[2].eta_s == 4, "of the whole move"


def test_a_job_that_has_not_begun_does_not_claim_figures() -> None:
    assert job().phase == "prepare"


def test_why_to_stop() -> None:
    later, past = time.monotonic() + 60, time.monotonic() - 1

    def lost() -> bool:
        raise ClaimLost("gone")

    assert stop_reason("x", None, later) is None
    assert stop_reason("x", lambda: False, later) is None
    assert isinstance(stop_reason("x", lambda: True, past), Cancelled)
    assert isinstance(stop_reason("x", None, past), HypervisorRefused)
    with pytest.raises(ClaimLost):
        stop_reason("x", lost, later)


def test_the_console_of_the_target() -> None:
    xml = (
        "<domain><devices><graphics type='spice' port='1' autoport='yes' listen='0.0.0.0'>"
        "<listen type='address' address='0.0.0.0'/></graphics><graphics type='vnc' port='2'/></devices></domain>"
    )
    root = ElementTree.fromstring(_Console(7000, "10.0.0.1").apply(xml))
    spice, vnc = root.findall("./devices/graphics")
    assert (spice.get("port"), spice.get("autoport"), spice.get("listen")) == ("7000", "no", "10.0.0.1")
    assert spice.find("listen").get("address") == "10.0.0.1"  # type: ignore[union-attr]
    assert vnc.get("port") == "2"


def test_ipv6_addresses_are_bracketed() -> None:
    assert _params("fd00::1", None, None) == {"migrate_uri": "tcp://[fd00::1]"}
    assert _params("10.0.0.1", "spice://x", 5) == {
        "migrate_uri": "tcp://10.0.0.1", "graphics_uri": "spice://x", "bandwidth": 5,
    }  # fmt: skip


def test_names_in_checkpoints_are_escaped() -> None:
    root = ElementTree.fromstring(checkpoint_xml("<a>&'\"", others=["vdb"]))
    assert root.findtext("name") == "<a>&'\""
    assert [d.get("checkpoint") for d in root.findall("./disks/disk")] == ["bitmap", "no"]
    assert int(root.findtext("creationTime") or 0) > 0


def test_a_full_storage_is_said_to_be_full_and_whose_it_is() -> None:
    words = "operation failed: migration of disk vda failed: No space left on device"
    refused = Guest(libvirt.VIR_ERR_OPERATION_FAILED, words).error
    error = translate(refused, "migrate guest a to b")
    assert error.message == f"cannot migrate guest a to b: {words}" and "storage is full" in error.next
    assert _told(error, {"domain_node": "west"}).message.startswith("the storage of domain node west is full: cannot")
    other = translate(Guest(libvirt.VIR_ERR_OPERATION_FAILED, "no").error, "migrate guest a to b")
    assert _told(other, {"domain_node": "west"}) is other
