"""Storms, warm pools, rebalancing and admission on real server nodes: what the record says is what runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab.center import Center, wait_for
from hdcs_tasks.hypervisor import agent
from tests.lab.data_center import BOOT_S, add_image, at_guest, data_center, wait_idle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def east(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Center]:
    """One domain node of two server nodes, whose sweeps come often."""
    env = {"HDCS_POLICY_SWEEP_S": "2"}
    with data_center(tmp_path_factory.mktemp("storms") / "storms", env, {"east": ("node1", "node2")}) as made:
        add_image(made)
        yield made


def where(center: Center, *names: str) -> Counter[str]:
    return Counter(vm["server_node"] for vm in center.cloud.vms.list(names=names))


def answers(center: Center, name: str) -> bool:
    return bool(at_guest(center, name, lambda host, vm_id: agent.ping(host, vm_id, 5)))


def test_a_saved_warm_desktop_is_there_sooner_than_a_cold_one(east: Center) -> None:
    cloud = east.cloud
    began = time.monotonic()
    cloud.vms.clone("plain", name="cold", profile="tiny", start=True).result(timeout_s=BOOT_S)
    cloud.vms["cold"].wait_ready(timeout_s=BOOT_S)
    cold_s = time.monotonic() - began
    cloud.warm_pools.create("lab", image="plain", profile="tiny", size=1, saved=True)
    wait_for("the warm pool to be ready", lambda: cloud.warm_pools.show("lab")["ready"] == 1, BOOT_S)
    (kept,) = cloud.warm_pools.show("lab")["desktops"]
    vm_id = cloud.vms[kept].show()["id"]
    began = time.monotonic()
    operation = cloud.vms.clone("plain", name="mine", profile="tiny", owner="ann", warm=True)
    operation.result(timeout_s=BOOT_S)
    warm_s = time.monotonic() - began
    print(f"cold {cold_s:.2f} s until its agent answers, warm {warm_s:.2f} s until it runs")
    shown = cloud.vms["mine"].show()
    assert (shown["id"], shown["owner"], shown["warm_pool"], shown["state"]) == (vm_id, "ann", None, "running")
    assert [step["name"] for step in operation.show()["steps"]] == ["vm.start_on_node"]
    decision = operation.show()["decision"]
    taken = decision["best"][0]
    assert decision["node"] == taken["node"] == shown["server_node"]
    assert decision["mix"], "both of the order and of the mix the choice was made by, the operation tells"
    assert {node["node"] for node in decision["best"]} == {"node1", "node2"}
    assert answers(east, "mine"), "it goes on where it was saved: its agent need not come up anew"
    wait_for("another one in its place", lambda: cloud.warm_pools.show("lab")["ready"] == 1, BOOT_S)
    cloud.warm_pools.delete("lab")
    wait_for("its desktops to go", lambda: {vm["name"] for vm in cloud.vms.list()} == {"cold", "mine"}, BOOT_S)
    for name in ("cold", "mine"):
        cloud.vms[name].delete().result(timeout_s=60)
    wait_idle(east)


def test_a_storm_has_its_desktops_ready_and_the_pool_is_evened(east: Center) -> None:
    cloud = east.cloud
    clone = {"image": "plain", "count": 4, "name": "a-{:02d}", "profile": "tiny"}
    cloud.storms.create("class-a", schedule="daily 09:00", clone=clone)
    cloud.storms.run("class-a")
    wait_for("the storm to be over", lambda: cloud.storms.show("class-a")["runs"][0]["closed"], BOOT_S)
    run = cloud.storms.show("class-a")["runs"][0]
    names = [f"a-{n:02d}" for n in range(1, 5)]
    assert (run["ready"], run["wanted"], sorted(run["ready_at"])) == (4, 4, names)
    for name in names:
        if cloud.vms[name].show()["server_node"] == "node2":
            cloud.vms[name].migrate("node1").result(timeout_s=120)
    assert where(east, *names) == {"node1": 4}
    plan = cloud.rebalance("east", dry_run=True).explain()
    assert len(plan["moves"]) == 2
    cloud.rebalance("east", concurrency=1).result(timeout_s=240)
    assert where(east, *names) == {"node1": 2, "node2": 2}
    wait_for("the agents after their moves", lambda: all(answers(east, name) for name in names), 120)


def test_a_server_node_tells_what_its_bound_is_made_of(east: Center) -> None:
    def shown() -> dict[str, object]:
        return dict(east.cloud.server_nodes.show("node1")["starts"])

    wait_for("a look", lambda: "storage_ms" in shown(), 60)
    starts = shown()
    assert isinstance(starts["bound"], int)
    assert 8 <= starts["bound"] <= 64
    assert "cpu_pressure" in starts
    assert starts["why"]
    probes = [p.name for p in (Path(east.lab.storage("east")) / "state").iterdir() if p.name.startswith(".probe")]
    assert len(probes) <= 2  # one of each server node at the very moment of its look
