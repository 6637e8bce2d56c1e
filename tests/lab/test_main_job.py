"""The main job as the demo tells it, on a data center of its own: what every step's evidence must hold."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from deploy.lab.center import Center
from deploy.lab.demo import DESKS, Demo
from tests.lab.data_center import data_center, picture, wait_idle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def center(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Center]:
    """As the demo has it, with Flower: east (node1, node2), west (node3, node4)."""
    with data_center(tmp_path_factory.mktemp("demo") / "demo", flower=True) as made:
        yield made


@pytest.fixture(scope="module")
def demo(center: Center) -> Demo:
    """The story, told once to its end."""
    told = Demo(center, Console())
    told.run()
    wait_idle(center)
    return told


def evidence(demo: Demo, words: str) -> dict[str, Any]:
    """The evidence of the one step with these words in its name."""
    (step,) = [step for step in demo.steps if words in step.name]
    assert step.seconds >= 0
    return step.evidence


def queue_of(found: dict[str, Any], name: str) -> tuple[str, str]:
    """Queue and server node of the one attempt of a step."""
    (step,) = [step for step in found["steps"] if step["name"] == name]
    assert step["attempt"] == 1
    return step["queue"], step["node"]


def test_every_server_node_joined_with_a_subnet_of_its_own(demo: Demo) -> None:
    found = evidence(demo, "joined by themselves")
    homes = {node: found[node].split() for node in demo.center.lab.nodes}
    assert {node: home for node, (home, _) in homes.items()} == {
        "node1": "east", "node2": "east", "node3": "west", "node4": "west",
    }  # fmt: skip
    subnets = [ipaddress.ip_network(subnet) for _, subnet in homes.values()]
    supernet = ipaddress.ip_network(demo.cloud.control.settings.supernet)
    assert len(set(subnets)) == 4
    assert all(subnet.prefixlen == 22 and subnet.subnet_of(supernet) for subnet in subnets)
    assert found["storage_primary"] == {"east": "node1", "west": "node3"}
    assert found["capacity_tiny"] >= DESKS


def test_every_desk_has_port_mac_and_ip_of_its_own(demo: Demo) -> None:
    desks = evidence(demo, "desktops cloned and started")["vms"]
    assert [desk["name"] for desk in desks] == [f"desk-{number:03d}" for number in range(1, DESKS + 1)]
    ranges = {d["name"]: range(d["port_first"], d["port_last"] + 1) for d in demo.cloud.domain_nodes.list()}
    assert not set(ranges["east"]) & set(ranges["west"])
    nodes = {node["name"]: node for node in demo.cloud.server_nodes.list()}
    for desk in desks:
        node = nodes[desk["server_node"]]
        assert node["domain_node"] == desk["home"]
        assert desk["port"] in ranges[desk["home"]]
        assert ipaddress.ip_address(desk["ip"]) in ipaddress.ip_network(node["subnet"])
        assert desk["mac"].startswith(demo.cloud.control.settings.mac_prefix)
    for key in ("port", "mac", "ip"):
        assert len({desk[key] for desk in desks}) == DESKS, f"two desks share a {key}"
    assert {desk["server_node"] for desk in desks} == set(nodes), "all four server nodes take part"


def test_every_guest_answered_with_the_address_it_was_given(demo: Demo) -> None:
    given = {desk["name"]: desk["ip"] for desk in evidence(demo, "desktops cloned and started")["vms"]}
    assert evidence(demo, "guest agents answer") == given


def test_the_short_commands_went_straight_to_the_desks_server_node(demo: Demo) -> None:
    where = {desk["name"]: desk for desk in evidence(demo, "desktops cloned and started")["vms"]}
    for name, verb, state in (
        ("desk-001", "suspend", "suspended"), ("desk-001", "resume", "running"),
        ("desk-001", "reboot", "running"), ("desk-002", "stop", "stopped"),
    ):  # fmt: skip
        found = evidence(demo, f"{name}: {verb}")
        home, node = where[name]["home"], where[name]["server_node"]
        assert queue_of(found, f"vm.{verb}_on_node") == (f"{home}.quick@{node}.dq2", node)
        assert found["state"] == state


def test_the_guests_clock_ran_on_through_the_migration(demo: Demo) -> None:
    found = evidence(demo, "live migration")
    assert (found["from"], found["to"]) == ("node1", "node2")
    assert queue_of(found, "vm.migrate_on_node") == ("east", "node1")
    assert queue_of(found, "vm.migrate_prepare_on_node") == ("east", "node2")
    assert 0 <= found["downtime_ms"] <= found["total_ms"]
    assert found["bytes"] > 0
    before, after = (int(ticks) for ticks in found["guest_ticks"].split(" → "))
    before_s, after_s = (float(seconds) for seconds in found["guest_uptime_s"].split(" → "))
    assert after > before > 0, "the counter in its memory went on"
    assert after_s - before_s >= found["total_ms"] / 1000 * 0.5, "it was not booted again"
    subnet = next(node["subnet"] for node in demo.cloud.server_nodes.list() if node["name"] == "node2")
    assert ipaddress.ip_address(found["ip"]) in ipaddress.ip_network(subnet)
    desks = {desk["name"]: desk for desk in evidence(demo, "desktops cloned and started")["vms"]}
    assert found["port"] == desks[found["vm"]]["port"]


def test_the_backups_and_what_was_restored_from_them(demo: Demo) -> None:
    full, increment = evidence(demo, "full backup"), evidence(demo, "incremental backup")
    for found in (full, increment):
        assert queue_of(found, "backup.create_on_node")[0] == "east"
        assert found["consistency"] == "filesystem", "frozen by the guest agent"
        assert 0 < found["bytes"] < 64 << 20, "its own layer only"
    points = demo.cloud.backups.list("desk-003")
    assert [(point["kind"], point["state"], point["file_bytes"]) for point in points] == [
        ("full", "ready", full["bytes"]), ("increment", "ready", increment["bytes"]),
    ]  # fmt: skip
    restored = evidence(demo, "restored as a new desktop")
    assert restored["note"] == "written-before-the-increment"
    assert queue_of(restored, "backup.restore_on_node")[0] == "east"
    vm = demo.cloud.vms["restored-001"].show()
    assert (vm["state"], vm["ip"]) == ("running", restored["ip"])
    assert vm["mac"] not in {d["mac"] for d in evidence(demo, "desktops cloned and started")["vms"]}


def test_the_idle_desk_was_reclaimed_and_its_port_came_back(demo: Demo) -> None:
    found = evidence(demo, "idle desktop")
    assert found["why"].startswith(f"VM {found['vm']} was stopped: nobody used it for ")
    before, after = (int(number) for number in found["ports_used"].split(" → "))
    assert after == before - 1
    desk = demo.cloud.vms[found["vm"]].show()
    assert (desk["state"], desk["port"], desk["ip"], desk["server_node"]) == ("stopped", None, None, None)
    (operation,) = demo.cloud.operations.list(vm=found["vm"], kind="vm.stop")
    assert operation["requested_by"] == "idle policy demo"


def test_the_pool_shrank_and_grew(demo: Demo) -> None:
    full, shrunk = (int(mib) for mib in evidence(demo, "the pool of west shrinks")["memory_mib"].split(" → "))
    node = next(node for node in demo.cloud.server_nodes.list() if node["name"] == "node4")
    assert shrunk == full - node["memory_mib"]
    assert evidence(demo, "it grows")["memory_mib"] == full


def test_the_long_steps_travelled_by_the_domain_nodes_queues(demo: Demo) -> None:
    steps = evidence(demo, "desktops cloned and started")["steps"]
    for name in ("vm.clone_on_node", "vm.start_on_node"):
        assert {step["queue"] for step in steps if step["name"] == name} == {"east", "west"}
    # Flower has the queue each went by last: of one that was handed on to another server node that one's own
    found = evidence(demo, "Flower")
    homes = {name: {queue.partition("@")[0] for queue in queues.split(", ")} for name, queues in found.items()}
    assert homes == {
        "vm.clone_on_node": {"east", "west"}, "vm.start_on_node": {"east", "west"},
        "vm.migrate_on_node": {"east"}, "backup.create_on_node": {"east"},
    }  # fmt: skip


def test_record_reservations_and_world_agree_afterwards(demo: Demo) -> None:
    seen = picture(demo.center)
    assert seen["live"] == []
    assert all(check["ok"] for check in demo.cloud.doctor()), demo.cloud.doctor()
    running = {i: node for i, state, node, *_ in seen["vms"].values() if state == "running"}
    assert {vm_id: node for node, (found, _) in seen["libvirt"].items() for vm_id, _ in found} == running
    pools = seen["reservations"].pools.values()
    assert {claim.vm: claim.node for pool in pools for claim in pool.claims} == running
    assert {vm for pool in pools for vm in pool.disks} == {i for i, *_ in seen["vms"].values()}
    assert set(seen["reservations"].macs) == {i for i, *_ in seen["vms"].values()}
    disks = {path.split("/")[1] for files in seen["storage"].values() for path in files if path.startswith("vms/")}
    assert disks == {i for i, *_ in seen["vms"].values()}
    partial = [path for files in seen["storage"].values() for path in files if "partial" in path]
    assert partial == []
