"""Images in and out through a whole data center: guests that boot from what came back, and workers that die."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.lab import Lab, free_net
from deploy.lab.center import Center, wait_for
from deploy.lab.lab import SRV
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.hypervisor import agent
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.disks import compare
from tests.lab.data_center import kill_worker
from tests.lab.loops import loop_device, tool

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]

LONG_S = 400.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def center(lab_possible: None, golden_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Center]:
    """east (node1) and west (node2); the golden image lies in east's import folder, as a VMDK."""
    root = tmp_path_factory.mktemp("lab") / "images"
    lab = Lab("images", root, net=free_net("10.98"), domain_nodes={"east": ["node1"], "west": ["node2"]})
    made = Center(lab, flower=False)
    try:
        made.up()
        target = lab.storage("east") / "import" / "golden.vmdk"
        tool("qemu-img", "convert", "-f", "qcow2", "-O", "vmdk", golden_image, target)
        yield made
    finally:
        made.down()


def sh(center: Center, vm: str, command: str) -> str:
    shown = center.cloud.vms[vm].show()
    with Host.open(f"qemu+tcp://{center.lab.ip(shown['server_node'])}/system") as host:
        done = agent.exec_(host, shown["id"], ["/bin/sh", "-c", command], timeout_s=120)
    assert done.exit_code == 0, (command, done)
    return done.stdout.decode().strip()


def boot(center: Center, image: str, name: str, **more: Any) -> None:
    center.cloud.vms.clone(image, name=name, profile=more.pop("profile", "tiny"), start=True, **more).result(
        timeout_s=LONG_S
    )
    center.cloud.vms[name].wait_ready(timeout_s=LONG_S)


def halves(center: Center) -> list[str]:
    """What is half made in any storage."""
    return [
        str(path) for name in center.lab.domain_nodes for path in center.lab.storage(name).rglob("*")
        if path.suffix in (".partial", ".v2v") or path.name.startswith(("export-", "refreshed-", "replaced-"))
    ]  # fmt: skip


def test_a_disk_of_another_hypervisor_runs_leaves_and_runs_again(center: Center, golden_image: Path) -> None:
    """VMDK in → a desktop that works → OVA out while it runs → OVA in → its twin boots with what it had written."""
    cloud, east = center.cloud, center.lab.storage("east")
    result = cloud.images.import_("mini", "golden.vmdk").result(timeout_s=LONG_S)
    assert result["format"] == "vmdk"
    assert compare(golden_image, east / "images" / "mini" / "1.qcow2")
    boot(center, "mini", "desk", owner="alice")
    sh(center, "desk", "echo from-the-desk > /root/note; sync")
    before = int(sh(center, "desk", "cut -d' ' -f1 /run/tick"))
    plan = cloud.vms["desk"].export("desk.ova", dry_run=True).explain()
    assert plan["fits"] and not plan["found"]["replaces"]
    operation = cloud.vms["desk"].export("desk.ova")
    manifest = operation.result(timeout_s=LONG_S)
    assert int(sh(center, "desk", "cut -d' ' -f1 /run/tick")) > before, "it ran on"
    assert manifest["origin"]["consistency"] == "filesystem"
    assert json.loads((east / "export" / "desk.ova.json").read_text())["machine"]["vcpus"] == 1
    (east / "export" / "desk.ova").rename(east / "import" / "desk.ova")
    cloud.images.import_("twin", "desk.ova", profile="twin").result(timeout_s=LONG_S)
    boot(center, "twin", "twin-1", profile="twin")
    assert sh(center, "twin-1", "cat /root/note") == "from-the-desk"
    assert (cloud.vms["twin-1"].show()["vcpus"], cloud.vms["twin-1"].show()["memory_mib"]) == (1, 128)
    cloud.vms["twin-1"].delete().result(timeout_s=LONG_S)
    assert halves(center) == []


def test_a_vm_follows_to_the_next_version(center: Center) -> None:
    """The desk's disk becomes version 2; published, a refreshed VM boots from it, and its next backup is a full one."""
    cloud = center.cloud
    cloud.vms.clone("mini", name="office", profile="tiny", tags=["disposable"], domain_node="east").result(timeout_s=60)
    cloud.backups.create("office").result(timeout_s=LONG_S)
    cloud.vms["desk"].stop().result(timeout_s=LONG_S)
    manifest = cloud.vms["desk"].export("desk.qcow2").result(timeout_s=LONG_S)
    east = center.lab.storage("east")
    assert manifest["files"][0]["bytes"] == (east / "export" / "desk.qcow2").stat().st_size
    vm_id = cloud.vms["desk"].show()["id"]
    (east / "export" / "desk.qcow2").rename(east / "import" / "desk.qcow2")
    cloud.images.import_("mini", "desk.qcow2", domain_nodes=["east", "west"]).result(timeout_s=LONG_S)
    compared = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", f"{SRV}/vms/{vm_id}/disk0.qcow2"]
    center.lab.run("node1", [*compared, f"{SRV}/images/mini/2.qcow2"])
    assert (east / "images" / "mini" / "2.qcow2").read_bytes() == (
        center.lab.storage("west") / "images" / "mini" / "2.qcow2"
    ).read_bytes()
    cloud.images.publish("mini", 2).result(timeout_s=LONG_S)
    cloud.vms["office"].refresh().result(timeout_s=LONG_S)
    cloud.vms["office"].start().result(timeout_s=LONG_S)
    cloud.vms["office"].wait_ready(timeout_s=LONG_S)
    assert sh(center, "office", "cat /root/note; ls /root").split() == ["from-the-desk", "note"]
    cloud.backups.create("office").result(timeout_s=LONG_S)
    assert [point["kind"] for point in cloud.backups.list("office")] == ["full", "full"]
    with pytest.raises(HdcsError, match="used by VM desk"):
        cloud.images.delete("mini:1")
    assert halves(center) == []


def test_a_physical_disk_goes_out_and_comes_in(center: Center, tmp_path: Path) -> None:
    """V2P of a stopped VM onto node1's device, P2V of the same by node2 into the other domain node."""
    cloud = center.cloud
    size = int(json.loads(tool("qemu-img", "info", "-U", "--output=json", _golden(center)))["virtual-size"])
    with loop_device(tmp_path, size) as device:
        cloud.vms["desk"].export(str(device), node="node1").result(timeout_s=LONG_S)
        result = cloud.images.import_("p2v", str(device), node="node2").result(timeout_s=LONG_S)
        made = center.lab.storage("west") / "images" / "p2v" / "1.qcow2"
        tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", device, made)
        assert result["domain_node"] == "west"
        with pytest.raises(HdcsError, match="--force"):
            cloud.vms["desk"].export(str(device), node="node1").result(timeout_s=LONG_S)


def _golden(center: Center) -> Path:
    return center.lab.storage("east") / "images" / "mini" / "1.qcow2"


def test_a_worker_killed_in_mid_import(center: Center) -> None:
    """The next attempt sweeps what the dead one left, and makes the image."""
    east = center.lab.storage("east")
    folder, source = east / "images" / "big", east / "import" / "big.img"
    with source.open("wb") as file:
        for _ in range(40):
            file.write(os.urandom(8 * MIB))
    operation = center.cloud.images.import_("big", "big.img", domain_nodes=["east"])
    wait_for("the conversion to begin", lambda: list(folder.glob("*.1.partial")), LONG_S, every_s=0.02)
    kill_worker(center, "node1")
    assert list(folder.glob("*.1.partial")), "killed in the middle"
    center.start_node("node1")
    operation.result(timeout_s=LONG_S)
    assert operation.show()["steps"][-1]["attempt"] > 1
    assert sorted(path.name for path in folder.iterdir()) == ["1.qcow2"]
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, folder / "1.qcow2")
    assert halves(center) == []
