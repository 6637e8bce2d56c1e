"""Backups through the whole data center: chains that go on, restores, drills, full disks and killed workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.lab import Lab, free_net
from deploy.lab.center import Center, wait_for
from deploy.lab.lab import SRV
from hdcs_tasks.errors import HypervisorRefused, Unreachable
from hdcs_tasks.hypervisor import agent, checkpoints
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.repository import Repository
from tests.lab.data_center import kill_worker

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]

LONG_S = 400.0
MIB = 1 << 20


class Desk:
    """A running desktop of the data center, its repository, and what its user would see."""

    def __init__(self, center: Center, name: str) -> None:
        self.center = center
        self.cloud = center.cloud
        self.name = name
        self.vm = center.cloud.vms[name]
        self.repository = Repository(center.lab.storage("east"))

    @property
    def id(self) -> str:
        return str(self.vm.show()["id"])

    @property
    def node(self) -> str:
        return str(self.vm.show()["server_node"])

    def host(self) -> Host:
        return Host.open(f"qemu+tcp://{self.center.lab.ip(self.node)}/system")

    def sh(self, command: str) -> str:
        with self.host() as host:
            done = agent.exec_(host, self.id, ["/bin/sh", "-c", command], timeout_s=120)
        assert done.exit_code == 0, (command, done)
        return done.stdout.decode().strip()

    def note(self, text: str, mib: int = 1) -> None:
        self.sh(f"echo {text} > /root/note; dd if=/dev/urandom of=/root/{text} bs=1M count={mib} 2>/dev/null; sync")

    def backup(self, **more: Any) -> dict[str, Any]:
        """Take a point; its view."""
        operation = self.cloud.backups.create(self.name, **more)
        operation.result(timeout_s=LONG_S)
        return self.cloud.backups.list(self.name)[-1]

    def start(self) -> None:
        self.vm.start().result(timeout_s=LONG_S)
        self.vm.wait_ready(timeout_s=LONG_S)

    def checkpoints(self) -> list[str]:
        with self.host() as host:
            return checkpoints.checkpoint_names(host.guest(self.id))

    def clean(self) -> None:
        """No partial file, and of checkpoints only the seed and the newest point's."""
        assert list(self.repository.leftovers(self.id)) == []
        newest = self.cloud.backups.list(self.name)[-1]
        assert set(self.checkpoints()) <= {checkpoints.SEED, f"hdcs-{newest['id']}"}


@pytest.fixture(scope="module")
def center(lab_possible: None, golden_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Center]:
    root = tmp_path_factory.mktemp("lab") / "backups"
    lab = Lab("backups", root, net=free_net("10.98"), domain_nodes={"east": ["node1", "node2"]})
    made = Center(lab, {"HDCS_POLICY_SWEEP_S": "2"}, flower=False)
    try:
        made.up()
        made.cloud.images.add("mini", str(golden_image)).result(timeout_s=LONG_S)
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def desk(center: Center) -> Desk:
    center.cloud.vms.clone("mini", name="desk-01", profile="tiny", start=True).result(timeout_s=LONG_S)
    found = Desk(center, "desk-01")
    found.vm.wait_ready(timeout_s=LONG_S)
    return found


def test_the_chain_goes_on_and_every_point_comes_back(desk: Desk) -> None:
    """Over live migration, a killed libvirtd, stop and start; then set back in place, proven by a drill, pruned."""
    desk.note("full")
    points = [desk.backup()]
    desk.note("moved")
    desk.vm.migrate(to="node2" if desk.node == "node1" else "node1").result(timeout_s=LONG_S)
    points.append(desk.backup())
    desk.note("libvirtd")
    kill_libvirtd(desk)
    points.append(desk.backup())
    node = desk.node
    desk.vm.stop().result(timeout_s=LONG_S)
    points.append(desk.backup())
    same_as_disk(desk, node, points[-1])
    desk.start()
    desk.note("started")
    points.append(desk.backup(bandwidth_mib_s=50))
    _grows(desk, points)
    assert [p["kind"] for p in points] == ["full", *["increment"] * 4]
    assert len({p["chain"] for p in points}) == 1
    sizes = [p["file_bytes"] for p in points]
    print(f"bytes of the points: {sizes}")
    assert all(size < 4 * MIB for size in sizes[1:]), sizes
    desk.clean()
    _set_back(desk, points[1])
    _drill(desk, points[4])
    _prune(desk)


def _grows(desk: Desk, points: list[dict[str, Any]]) -> None:
    """Under the running guest, which sees it; the chain of the smaller disk is not gone on with."""
    size = int(desk.vm.show()["disk_bytes"]) + 64 * MIB
    desk.vm.grow(size).result(timeout_s=LONG_S)
    wait_for("the guest to see it", lambda: int(desk.sh("cat /sys/block/vda/size")) * 512 == size, LONG_S)
    grown = desk.backup()
    assert (grown["kind"], grown["chain"] != points[-1]["chain"], grown["manifest"]["disk_bytes"]) == (
        "full",
        True,
        size,
    )
    assert desk.backup()["kind"] == "increment"


def kill_libvirtd(desk: Desk) -> None:
    pids = [pid for pid, line in desk.center.lab.space(desk.node).processes() if line.startswith("libvirtd")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert pids

    def back() -> bool:
        try:
            with desk.host() as host:
                return host.alive()
        except Unreachable:
            return False

    wait_for("libvirtd to be back", back, 60)


def same_as_disk(desk: Desk, node: str, point: dict[str, Any]) -> None:
    """The stopped VM's disk is what the whole chain up to the point gives, whatever happened between its points."""
    file = f"{SRV}/backups/{desk.id}/{point['chain']}/{point['seq']:04d}.qcow2"
    desk.center.lab.run(node, ["qemu-img", "compare", file, f"{SRV}/vms/{desk.id}/disk0.qcow2"])


def _set_back(desk: Desk, point: dict[str, Any]) -> None:
    desk.note("grown")
    node = desk.node
    desk.vm.stop().result(timeout_s=LONG_S)
    same_as_disk(desk, node, desk.backup())
    desk.cloud.backups.restore(point["id"], in_place=True).result(timeout_s=LONG_S)
    desk.vm.wait_ready(timeout_s=LONG_S)
    assert desk.sh("cat /root/note") == "moved"
    folder = desk.center.lab.storage("east") / "vms" / desk.id
    assert sorted(p.name for p in folder.glob("re*.qcow2")) == []
    desk.note("again")
    new = desk.backup()
    assert (new["kind"], new["chain"] != point["chain"]) == ("full", True)
    assert desk.backup()["kind"] == "increment"


def _drill(desk: Desk, point: dict[str, Any]) -> None:
    result = desk.cloud.backups.drill(point["id"], timeout_s=LONG_S).result(timeout_s=2 * LONG_S)
    print(f"drill: {result}")
    assert desk.cloud.backups.show(point["id"])["proven_at"]
    assert [vm["name"] for vm in desk.cloud.vms.list()] == ["desk-01"]


def _prune(desk: Desk) -> None:
    desk.cloud.backups.prune("desk-01", last=1, merge=True).result(timeout_s=LONG_S)
    (left,) = desk.cloud.backups.list("desk-01")
    assert left["kind"] == "full", "merged with what it stood on"
    desk.cloud.backups.verify(left["id"]).result(timeout_s=LONG_S)
    assert desk.backup()["kind"] == "increment", "and increments go on from it"


def test_a_killed_worker_s_backup_is_done_by_the_next(desk: Desk) -> None:
    # More than QEMU has in flight when the limit is set: what is left of it takes seconds.
    desk.note("before", 100)
    node = desk.node
    operation = desk.cloud.backups.create(desk.name, bandwidth_mib_s=4)
    wait_for("the copy to begin", lambda: list(desk.repository.leftovers(desk.id)), LONG_S, every_s=0.01)
    kill_worker(desk.center, node)
    desk.center.start_node(node)
    operation.result(timeout_s=LONG_S)
    step = operation.show()["steps"][-1]
    assert step["attempt"] > 1, "it was killed too late"
    desk.clean()
    desk.cloud.backups.verify(desk.cloud.backups.list(desk.name)[-1]["id"]).result(timeout_s=LONG_S)
    desk.sh("rm /root/before; sync")  # its file systems are not frozen


def test_a_full_disk_in_mid_backup_leaves_nothing(desk: Desk) -> None:
    if not desk.cloud.backups.list(desk.name):
        desk.backup()  # it has a folder to be mounted over
    before = desk.cloud.backups.list(desk.name)
    desk.note("big", 24)
    node = desk.node
    lab = desk.center.lab
    # over the repository's folder of this VM: its base image stays in reach, its files do not
    folder = f"{SRV}/backups/{desk.id}"
    used = sum(p.stat().st_size for p in (desk.repository.folder / desk.id).rglob("*") if p.is_file())
    small = f"mount -t tmpfs -o size={used + 6 * MIB} small {folder} && cp -a /run/old/. {folder}/"
    lab.run(node, ["sh", "-c", f"mkdir -p /run/old && mount --bind {folder} /run/old && {small}"])
    try:
        with pytest.raises(HypervisorRefused) as caught:
            desk.cloud.backups.create(desk.name).result(timeout_s=LONG_S)
        print(f"full disk: {caught.value}")
        assert caught.value.message.startswith("backup of guest"), "the copy says so, not what comes after it"
        left = lab.run(node, ["find", folder, "-name", ".*partial*"]).stdout
        assert left == ""
    finally:
        lab.run(node, ["sh", "-c", f"umount {folder}; umount /run/old"])
    assert [b["id"] for b in desk.cloud.backups.list(desk.name)] == [b["id"] for b in before]
    desk.sh("echo alive")
    desk.clean()
    assert desk.backup()["kind"] == "increment"


def test_a_policy_runs_by_itself(desk: Desk) -> None:
    count = len(desk.cloud.backups.list(desk.name))
    desk.cloud.policies.create("hourly", schedule="hourly", selector={"names": [desk.name]}, last=50)
    desk.cloud.policies.run("hourly")
    wait_for("the policy's backup", lambda: len(ready(desk)) > count, LONG_S)
    desk.cloud.policies.delete("hourly")


def ready(desk: Desk) -> list[dict[str, Any]]:
    return [b for b in desk.cloud.backups.list(desk.name) if b["state"] == "ready"]


def test_what_sql_has_lost_is_adopted(desk: Desk) -> None:
    from sqlalchemy import delete

    from hdcs_tasks.store.models import Backup

    before = {b["id"] for b in ready(desk)}
    with desk.cloud.control.store.session() as session:
        session.execute(delete(Backup))
    result = desk.cloud.backups.adopt("east").result(timeout_s=LONG_S)
    assert (result["adopted"], result["damaged"]) == (len(before), [])
    assert {b["id"] for b in ready(desk)} == before
    assert desk.backup()["kind"] == "increment"
