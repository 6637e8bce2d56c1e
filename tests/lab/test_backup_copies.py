"""Two domain nodes: second copies, restores elsewhere, and all of it encrypted, disks and repositories."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.lab import Lab, free_net
from deploy.lab.center import Center, wait_for
from hdcs_tasks.errors import BackupBroken, WrongState
from hdcs_tasks.hypervisor import layers
from hdcs_tasks.hypervisor.keys import KeyRing
from hdcs_tasks.hypervisor.repository import Repository
from tests.lab.desks import image_info
from tests.lab.test_backups import Desk

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]

LONG_S = 400.0
MARK = "what-nobody-may-read-from-a-stolen-disk"


@pytest.fixture(scope="module")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("vault", "disks"):
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(f"the passphrase of {name}\n")
    return folder


@pytest.fixture(scope="module")
def center(
    lab_possible: None, golden_image: Path, keys_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Center]:
    root = tmp_path_factory.mktemp("lab") / "copies"
    lab = Lab("copies", root, net=free_net("10.96"), domain_nodes={"east": ["node1"], "west": ["node2"]})
    made = Center(lab, {"HDCS_KEYS_DIR": str(keys_dir), "HDCS_BACKUP_KEY": "vault"}, flower=False)
    try:
        made.up()
        made.cloud.profiles.create("locked", vcpus=1, memory_mib=128, disk_key="disks")
        made.cloud.images.add("mini", str(golden_image), domain_nodes=["east"]).result(timeout_s=LONG_S)
        yield made
    finally:
        made.down()


def test_a_second_copy_outlives_the_first(center: Center, keys_dir: Path) -> None:
    cloud = center.cloud
    cloud.vms.clone("mini", name="desk-01", profile="locked", start=True).result(timeout_s=LONG_S)
    desk = Desk(center, "desk-01")
    desk.vm.wait_ready(timeout_s=LONG_S)
    desk.sh(f"for i in $(seq 2000); do echo {MARK}; done > /root/secret; sync")
    cloud.policies.create("safe", schedule="hourly", selector={"names": ["desk-01"]}, last=5, copy_to="west")
    points = [_policy_run(desk, 1)]
    desk.note("second")
    points.append(_policy_run(desk, 2))
    ring = KeyRing(keys_dir)
    west = Repository(center.lab.storage("west"), ring)
    for point in points:
        assert [(c["domain_node"], c["state"]) for c in point["copies"]] == [("west", "ready")]
        west.verify(west.get(desk.id, point["id"]))
    _nothing_in_clear(center, desk)
    _bad_copy_is_replaced(center, desk, points)
    # Into another domain node that has no copy: a full one, taken to east only.
    _restored_elsewhere(desk, desk.backup(full=True), ring)
    # The first is gone: its storage is another one, its record says broken.
    shutil.rmtree(desk.repository.folder / desk.id)
    with pytest.raises(BackupBroken):
        cloud.backups.verify(points[1]["id"]).result(timeout_s=LONG_S)
    assert cloud.backups.show(points[1]["id"])["state"] == "broken"
    _restored_elsewhere(desk, points[1], ring, say_where=False)
    with pytest.raises(WrongState, match="no good copy"):
        desk.vm.stop().result(timeout_s=LONG_S)
        cloud.backups.restore(points[1]["id"], in_place=True)
    cloud.backups.copy(points[1]["id"], "west").result(timeout_s=LONG_S)  # it is there
    cloud.backups.copy(points[1]["id"], "east").result(timeout_s=LONG_S)  # and from there the first is made good
    assert cloud.backups.show(points[1]["id"])["state"] == "ready"
    desk.repository.verify(desk.repository.get(desk.id, points[1]["id"]))
    _moved_encrypted(desk)


def _moved_encrypted(desk: Desk) -> None:
    """Running, to the other domain node: the disk stays encrypted, the next point is a full one there, and restored it
    is what was written."""
    desk.start()
    desk.note("moved")
    written = desk.sh("md5sum /root/moved")
    desk.vm.migrate(to="west").result(timeout_s=LONG_S)
    shown = desk.vm.show()
    assert (shown["home"], shown["state"], shown["disk_key"]) == ("west", "running", "disks")
    disk = desk.center.lab.storage("west") / "vms" / desk.id / "disk0.qcow2"
    assert image_info(disk)["encrypted"] is True
    assert MARK.encode() not in disk.read_bytes()
    assert desk.sh(f"echo 3 > /proc/sys/vm/drop_caches; md5sum /root/moved; grep -c {MARK} /root/secret") == (
        f"{written}\n2000"
    )
    point = desk.backup()
    assert (point["kind"], point["domain_node"], point["manifest"]["key"]) == ("full", "west", "vault")
    following = desk.backup()
    assert (following["kind"], following["parent_id"]) == ("increment", point["id"])
    desk.cloud.backups.restore(following["id"], name="back-01").result(timeout_s=LONG_S)
    back = Desk(desk.center, "back-01")
    back.vm.wait_ready(timeout_s=LONG_S)
    assert back.sh("md5sum /root/moved") == written
    back.vm.delete().result(timeout_s=LONG_S)


def _policy_run(desk: Desk, count: int) -> dict[str, Any]:
    """The point a policy takes, once its copy is there."""
    desk.cloud.policies.run("safe")

    def copied() -> bool:
        found = desk.cloud.backups.list("desk-01")
        return len(found) == count and bool(found[-1]["copies"])

    wait_for("the point and its copy", copied, LONG_S)
    return desk.cloud.backups.list("desk-01")[-1]


def _nothing_in_clear(center: Center, desk: Desk) -> None:
    """Neither storage holds the mark in clear, no repository the image, no log the keys."""
    for domain_node in ("east", "west"):
        root = center.lab.storage(domain_node)
        own = [*(root / "vms").rglob("*"), *(root / "backups").rglob("*"), *(root / "state").rglob("*")]
        assert [p for p in own if p.is_file() and MARK.encode() in p.read_bytes()] == []
        bases = sorted(p.name for p in (root / "backups" / "bases").iterdir() if p.suffix in (".luks", ".qcow2"))
        assert [Path(name).suffix for name in bases] == [".luks"], "the one image, encrypted"
        of_image = _sample(center.lab.storage("east") / "images" / "mini" / "1.qcow2")
        assert [p for p in (root / "backups").rglob("*") if p.is_file() and of_image in p.read_bytes()] == []
    logs = [p for p in center.lab.root.rglob("*.log") if p.is_file()]
    assert logs
    assert [p for p in logs if b"the passphrase of" in p.read_bytes()] == []


def _sample(image: Path) -> bytes:
    """64 bytes of an image that nothing else has by chance."""
    content = image.read_bytes()
    windows = (content[at : at + 64] for at in range(len(content) // 2, len(content), 64))
    return next(window for window in windows if len(set(window)) > 40)


def _bad_copy_is_replaced(center: Center, desk: Desk, points: list[dict[str, Any]]) -> None:
    west = Repository(center.lab.storage("west"))
    file = west.file(west.get(desk.id, points[1]["id"]))
    good = file.read_bytes()
    file.write_bytes(bytes([*good[:-1], good[-1] ^ 1]))
    with pytest.raises(BackupBroken):
        desk.cloud.backups.verify(points[1]["id"], domain_node="west").result(timeout_s=LONG_S)
    shown = desk.cloud.backups.show(points[1]["id"])
    assert (shown["state"], shown["copies"][0]["state"]) == ("ready", "broken"), "only the copy is"
    desk.cloud.backups.copy(points[1]["id"], "west").result(timeout_s=LONG_S)
    assert file.read_bytes() == good
    assert desk.cloud.backups.show(points[1]["id"])["copies"][0]["state"] == "ready"


def _restored_elsewhere(desk: Desk, point: dict[str, Any], ring: KeyRing, *, say_where: bool = True) -> None:
    cloud, where = desk.cloud, "west" if say_where else None
    cloud.backups.restore(point["id"], name="back-01", domain_node=where).result(timeout_s=LONG_S)
    shown = cloud.vms["back-01"].show()
    assert (shown["home"], shown["state"], shown["disk_key"]) == ("west", "running", "disks")
    if not say_where:  # once is enough
        cloud.vms["back-01"].wait_ready(timeout_s=LONG_S)
    cloud.vms["back-01"].delete().result(timeout_s=LONG_S)
    west = Repository(desk.center.lab.storage("west"), ring)
    found = west.get(desk.id, point["id"])
    assert layers.header(west.file(found))["encrypted"] is True
