"""Every kind of long operation in a data center: it shows how far it is, and ends when it is called off; nothing of it
is left then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.center import Center, wait_for
from deploy.lab.lab import SRV
from hdcs_tasks.handles.operation import Operation
from tests.lab.data_center import data_center, picture, wait_idle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

MIB = 1 << 20
BIG_MIB = 1536
CALLED_OFF_S = 60.0
MANY = 16
"""As many as fit."""
RESTING = ("vms", "images", "backups", "storage", "libvirt")


@pytest.fixture(scope="module")
def center(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Center]:
    """east with two server nodes, a big image, and a VM that has a whole disk of its own."""
    root = tmp_path_factory.mktemp("long") / "long"
    with data_center(root, domain_nodes={"east": ["node1", "node2"]}) as made:
        raw = made.lab.storage("east") / "import" / "big.raw"
        fill(raw, BIG_MIB)
        made.cloud.images.import_("big", "big.raw").result(timeout_s=120)
        made.cloud.vms.clone("big", name="desk", profile="tiny").result(timeout_s=60)
        disk = f"{SRV}/vms/{made.cloud.vms['desk'].show()['id']}/disk0.qcow2"
        writes = [word for at in range(0, BIG_MIB // 2, 64) for word in ("-c", f"write -P 7 {at}M 64M")]
        made.lab.run("node1", ["qemu-io", "-f", "qcow2", *writes, disk])
        yield made


def fill(path: Path, mib: int) -> None:
    """Data that does not compress and is nowhere zero, cheaply."""
    with open("/dev/urandom", "rb") as source:
        block = source.read(64 * MIB)
    with path.open("wb") as file:
        for _ in range(mib // 64):
            file.write(block)


def resting(center: Center) -> dict[str, Any]:
    wait_idle(center)
    seen = picture(center)
    return {key: seen[key] for key in RESTING}


def call_off(center: Center, ask: Callable[[], Operation]) -> list[dict[str, Any]]:
    """Ask, wait until it is under way, call it off; everything it showed. What was before is so again."""
    before = resting(center)
    operation = ask()
    shown: list[dict[str, Any]] = []

    def under_way() -> bool:
        shown.append(operation.show())
        assert shown[-1]["state"] in ("queued", "running"), [
            (o["phase"], o["percent"], o["eta_s"], o["error"]) for o in shown
        ][-1:]
        return 0 < shown[-1]["percent"] < 100 and shown[-1]["eta_s"] is not None

    wait_for("it to be under way and to tell when it ends", under_way, 60, every_s=0.02)
    asked = time.monotonic()
    operation.cancel()
    shown += operation.watch(timeout_s=CALLED_OFF_S)
    took_s = time.monotonic() - asked
    assert shown[-1]["state"] == "cancelled", shown[-1]
    assert shown[-1]["requested_by"] and shown[-1]["ended_at"]
    percents = [seen["percent"] for seen in shown]
    assert percents == sorted(percents), "what was shown is never taken back"
    print(f"{shown[-1]['kind']}: called off at {percents[-1]:.0f} %, ended {took_s:.1f} s later")
    assert resting(center) == before
    return shown


def test_converting_an_image(center: Center) -> None:
    shown = call_off(center, lambda: center.cloud.images.import_("again", "big.raw"))
    assert all(step["node"] for step in shown[-1]["steps"])


def test_exporting_an_image(center: Center) -> None:
    call_off(center, lambda: center.cloud.images.export("big", "big.vmdk"))


def test_cloning_many(center: Center) -> None:
    """Those that are there stay, running or, where the start was called off, stopped; of the others nothing is left.
    Each is started, so that all of them take a while."""
    before = picture(center)
    operation = center.cloud.vms.clone("big", name="c-{}", count=MANY, profile="tiny", start=True)

    def are_there() -> list[str]:
        return [child["subject"] for child in operation.show()["children"] if child["state"] == "done"]

    wait_for("the first to be there", are_there, 60, every_s=0.02)
    operation.cancel()
    *_, seen = operation.watch(timeout_s=CALLED_OFF_S)
    assert seen["state"] in ("cancelled", "failed"), seen
    done = are_there()
    assert 0 < len(done) < MANY
    wait_idle(center)
    there = {vm["name"]: vm["state"] for vm in center.cloud.vms.list() if vm["name"] not in before["vms"]}
    assert {name for name, state in there.items() if state == "running"} == set(done)
    assert set(there.values()) <= {"running", "stopped"}
    for name in there:
        center.cloud.vms[name].delete()
    assert resting(center) == {key: before[key] for key in RESTING}


@pytest.fixture(scope="module")
def point(center: Center) -> str:
    """A backup of the big VM: its id."""
    center.cloud.backups.create("desk").result(timeout_s=120)
    return str(center.cloud.backups.list("desk")[0]["id"])


def test_a_backup(center: Center, point: str) -> None:
    call_off(center, lambda: center.cloud.backups.create("desk", full=True))
    center.cloud.backups.create("desk").result(timeout_s=120)
    assert center.cloud.backups.list("desk")[-1]["kind"] == "increment", "the chain there was goes on"
    assert all(found["state"] == "ready" for found in center.cloud.backups.list("desk"))


def test_a_restore(center: Center, point: str) -> None:
    call_off(center, lambda: center.cloud.backups.restore(point, name="restored", start=False))


def test_a_live_migration(center: Center) -> None:
    vm = center.cloud.vms["desk"]
    vm.start().result(timeout_s=60)
    try:
        call_off(center, lambda: vm.migrate(bandwidth_mib_s=1))
        assert vm.show()["state"] == "running"
    finally:
        vm.stop(force=True).result(timeout_s=60)


def test_a_boot_storm(center: Center) -> None:
    """Those that run already stay; of the others nothing is left."""
    names = [f"storm-{number}" for number in range(1, 13)]
    center.cloud.vms.clone("big", name="storm-{}", count=len(names), profile="tiny").result(timeout_s=120)
    operation = center.cloud.vms.start_all(names)
    wait_for("the first to run", lambda: 0 < operation.show()["percent"] < 100, 60, every_s=0.02)
    operation.cancel()
    *_, seen = operation.watch(timeout_s=CALLED_OFF_S)
    assert seen["state"] in ("cancelled", "failed"), seen
    wait_idle(center)
    ended = {child["subject"]: child["state"] for child in seen["children"]}
    shown = {vm["name"]: vm for vm in center.cloud.vms.list() if vm["name"] in names}
    assert {name: "running" if state == "done" else "stopped" for name, state in ended.items()} == {
        name: vm["state"] for name, vm in shown.items()
    }
    assert "stopped" in {vm["state"] for vm in shown.values()}
    claimed = {claim.vm for pool in picture(center)["reservations"].pools.values() for claim in pool.claims}
    assert claimed == {vm["id"] for vm in shown.values() if vm["state"] == "running"}
    for name in names:
        center.cloud.vms[name].delete().result(timeout_s=60)
