"""What is watched on real server nodes: use adds up, drift is settled, the alarm of a lost server node arrives."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import psutil
import pytest
import redis
from sqlalchemy import select

from deploy.lab.center import Center, wait_for
from hdcs_tasks.hypervisor import guests, networks
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Vm, now
from hdcs_tasks.store.models_watch import UsageSpan
from hdcs_tasks.store.transitions import move
from tests.contract.test_alarms import web_hook
from tests.lab.data_center import add_image, at_guest, data_center, kill_worker, libvirt_of

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
SLACK_S = 6.0
"""Between the start of a QEMU process and the moment its server node calls the VM started: a slow machine's."""


@pytest.fixture(scope="module")
def hooked(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Center, list[Any]]]:
    """A data center of one domain node with two server nodes, whose alarms go to a web hook; what arrived there."""
    root = tmp_path_factory.mktemp("watched")
    with web_hook() as (url, posted):
        file = root / "alarm-urls"
        file.write_text(url + "\n")
        env = {
            "HDCS_ALARM_URLS_FILE": str(file), "HDCS_ALARM_PERIOD_S": "1", "HDCS_ALARM_CLEAR_FOR_S": "6",
            "HDCS_ALARM_FOR_S": "1",
            "HDCS_ALARM_CPU_PERCENT": "1000", "HDCS_ALARM_MEMORY_PERCENT": "1000",
        }  # fmt: skip
        with data_center(root / "center", env, {"east": ["node1", "node2"]}) as center:
            add_image(center)
            yield center, posted


@pytest.fixture(scope="module")
def desk(hooked: tuple[Center, list[Any]]) -> str:
    center, _ = hooked
    center.cloud.vms.clone("plain", name="desk", profile="tiny", owner="alice").result(timeout_s=120)
    center.cloud.vms["desk"].start(node="node1").result(timeout_s=120)
    return "desk"


def spans(center: Center) -> list[UsageSpan]:
    with center.cloud.control.store.read() as session:
        return list(session.scalars(select(UsageSpan).where(UsageSpan.kind == "vm").order_by(UsageSpan.id)))


def qemu_began(center: Center, node: str, name: str) -> float:
    """When the guest's QEMU was started, by the kernel."""
    (pid,) = [pid for pid, line in center.lab.space(node).processes() if f"guest={name}," in line]
    return psutil.Process(pid).create_time()


def test_a_metered_time_with_a_migration_and_a_killed_worker_adds_up(
    hooked: tuple[Center, list[Any]], desk: str
) -> None:
    center, _ = hooked
    cloud = center.cloud
    began = qemu_began(center, "node1", desk)
    cloud.vms[desk].migrate(to="node2").result(timeout_s=180)
    kill_worker(center, "node2")
    wait_for("node2 to be lost", lambda: cloud.server_nodes.show("node2")["state"] == "lost", 120)
    center.start_node("node2")
    wait_for("node2 to be back", lambda: cloud.server_nodes.show("node2")["state"] == "up", 120)
    wait_for("its guest to be in sight again", lambda: spans(center)[-1].observed, 60)
    center.stop("control", signal.SIGKILL)
    center.start_control()
    cloud.vms[desk].stop(force=True).result(timeout_s=180)
    ended = time.time()
    found = spans(center)
    for one, following in pairwise(found):
        assert one.closed_at == following.opened_at
    assert [(s.level, s.server_node, s.observed) for s in found] == [
        ("off", None, True), ("on", "node1", True), ("on", "node2", True), ("on", "node2", False),
        ("on", "node2", True), ("off", None, True),
    ]  # fmt: skip
    (row,) = cloud.usage(owner="alice", start=datetime.fromtimestamp(began - 60, UTC))["rows"]
    assert 0 <= ended - began - row["running_s"] < SLACK_S + 60, "stopping may take that long"
    on = [s for s in found if s.level == "on"]
    assert on[-1].closed_at and row["running_s"] == (on[-1].closed_at - on[0].opened_at).total_seconds()
    assert on[0].opened_at.timestamp() - began < SLACK_S * 10
    assert 0 < row["unobserved_s"] < row["running_s"]


def test_a_guest_paused_and_killed_by_hand_is_drift(hooked: tuple[Center, list[Any]], desk: str) -> None:
    center, _ = hooked
    cloud = center.cloud
    cloud.vms[desk].start(node="node1").result(timeout_s=120)
    time.sleep(6)  # what changed just now is left to operations

    def by_hand(verb: str) -> None:
        at_guest(center, desk, lambda host, vm_id: getattr(host.guest(vm_id), verb)())

    def state() -> str:
        return str(cloud.vms[desk].show()["state"])

    by_hand("suspend")
    wait_for("the pause to be seen", lambda: state() == "suspended", 60)
    by_hand("resume")
    wait_for("the resume to be seen", lambda: state() == "running", 60)
    by_hand("destroy")
    wait_for("the end to be seen and settled", lambda: state() == "stopped", 120)
    kinds = [event["kind"] for event in cloud.events(200) if event["subject"] == desk]
    assert (kinds.count("vm.paused"), kinds.count("vm.resumed"), kinds.count("vm.gone")) == (1, 1, 1)
    assert [s.level for s in spans(center)][-4:] == ["on", "paused", "on", "off"]


def test_samples_of_real_guests(hooked: tuple[Center, list[Any]], desk: str) -> None:
    center, _ = hooked
    cloud, samples = center.cloud, center.cloud.control.reservations.samples
    cloud.vms[desk].start(node="node1").result(timeout_s=120)
    vm_id = cloud.vms[desk].show()["id"]
    seen = wait_for("two samples", lambda: [s for s in samples.vm_history(vm_id) if s["cpu_percent"] is not None], 60)
    assert seen[0]["node"] == "node1" and seen[0]["memory_mib"] >= 64 and seen[0]["disk_bytes_s"] is not None
    host = samples.hosts(["node1"])["node1"]
    assert host["memory_total_mib"] > 0 and abs(host["clock_skew_s"]) < 5
    assert set(samples.sweeps()) >= {"sample", "recovery", "alarms", "notices"}


def test_what_runs_of_a_deleted_vm_is_ended_where_it_runs(hooked: tuple[Center, list[Any]]) -> None:
    """As it may be left by a start that Redis lost sight of; here its record is deleted while it runs. Then only its
    definition is left, as by a libvirtd that died between definition and start."""
    center, _ = hooked
    center.cloud.vms.clone("plain", name="left", profile="tiny").result(timeout_s=120)
    center.cloud.vms["left"].start(node="node2").result(timeout_s=120)
    shown = center.cloud.vms["left"].show()
    with center.cloud.control.transaction() as tx:
        vm = tx.session.get_one(Vm, shown["id"])
        for state in (VmState.STOPPING, VmState.STOPPED, VmState.DELETING, VmState.DELETED):
            move(vm, state)
        vm.server_node, vm.deleted_at = None, now()
    with libvirt_of(center, "node2") as host:
        definition = host.guest(shown["id"]).XMLDesc(0)
        wait_for("its guest to end", lambda: guests.info(host, shown["id"]) is None, 60)
        wait_for(
            "its address to go", lambda: shown["mac"] not in {e.mac for e in networks.dhcp_hosts(host, "hdcs")}, 60
        )
        host.conn.defineXML(definition)
        wait_for("its definition to go", lambda: guests.info(host, shown["id"]) is None, 60)
    wait_for("its claim to go", lambda: not center.cloud.control.reservations.pool.claim_of(shown["id"]), 60)
    shutil.rmtree(center.lab.storage("east") / "vms" / shown["id"])


def test_a_lost_server_node_raises_one_alarm_that_arrives_and_is_cleared(
    hooked: tuple[Center, list[Any]],
) -> None:
    center, posted = hooked
    cloud = center.cloud
    earlier = [alarm["id"] for alarm in cloud.alarms.history(500)]

    def lost() -> list[dict[str, Any]]:
        found = cloud.alarms.history(500)
        return [a for a in found if (a["kind"], a["subject"]) == ("node_lost", "node2") and a["id"] not in earlier]

    def told(what: str) -> list[Any]:
        return [post for post in posted if post["title"] == f"HDCS {what}: node_lost node2"]

    wait_for("earlier alarms to be told", lambda: len(told("critical")) == len(told("cleared")), 60)
    before = len(told("critical"))
    kill_worker(center, "node2")
    flapped = _flaps(center)  # meanwhile
    wait_for("the alarm", lambda: [a for a in lost() if a["state"] == "raised"], 120)
    wait_for("the notice", lambda: len(told("critical")) == before + 1, 60)
    (alarm,) = cloud.alarms.list()[:1]
    assert cloud.alarms.acknowledge(alarm["id"], note="on it")["state"] == "acknowledged"
    center.start_node("node2")
    wait_for("it to be cleared", lambda: [a for a in lost() if a["state"] == "cleared"], 120)
    wait_for("the notice of that", lambda: len(told("cleared")) == before + 1, 60)
    assert len(lost()) == 1 and len(told("critical")) == before + 1
    for what in ("warning", "cleared"):
        wait_for(f"{what} of the queue", lambda what=what: _titles(posted, what, flapped), 60)
        assert len(_titles(posted, what, flapped)) == 1
    (alarm,) = [a for a in cloud.alarms.history(500) if a["subject"] == flapped]
    assert alarm["state"] == "cleared"
    center.wait_for_nodes(center.lab.nodes)


def _titles(posted: list[Any], what: str, subject: str) -> list[str]:
    return [post["title"] for post in posted if post["title"] == f"HDCS {what}: queue_backlog {subject}"]


def _flaps(center: Center) -> str:
    """A queue nobody reads now is long and empty in turn, from one alarm sweep to the next, and empty in the end; its
    name."""
    control, queue = center.cloud.control, quick_queue("east", "node2")
    server, key = redis.Redis.from_url(control.settings.redis_url), control.settings.key_prefix + queue

    def measured(changed: float) -> bool:
        last = control.reservations.samples.sweeps()["alarms"]
        return last["at"] - last["took_s"] > changed

    def be(long: bool) -> None:
        """For one measurement: two of an empty queue, far enough apart on a slow machine, would clear it."""
        server.delete(key)
        if long:
            server.rpush(key, *["x"] * 600)
        changed = time.time()
        wait_for("an alarm sweep", lambda: measured(changed), 60)

    server.delete(key)
    server.rpush(key, *["x"] * 600)
    wait_for("its alarm", lambda: queue in {alarm["subject"] for alarm in center.cloud.alarms.list()}, 60)
    for long in (False, True, False, True, False):
        be(long)
    server.delete(key)
    return queue
