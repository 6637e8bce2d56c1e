"""Server nodes join by themselves, are refused with a reason, are lost and come back; guests that end by themselves."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deploy.lab import SRV
from deploy.lab.center import Center, wait_for
from hdcs_tasks.errors import HdcsError, Unreachable
from hdcs_tasks.hypervisor import agent, networks
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.storage import KINDS
from tests.lab.data_center import BOOT_S, add_image, at_guest, data_center, kill_worker, libvirt_of, picture, wait_idle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
REFUSED = 78


@pytest.fixture
def whole(center: Center) -> Iterator[Center]:
    """The data center with all its server nodes in their pools, before the test and after it."""
    center.wait_for_nodes(center.lab.nodes)
    yield center
    center.wait_for_nodes(center.lab.nodes)


@pytest.fixture(scope="module")
def desk(center: Center) -> str:
    """A VM that runs on node2 and whose agent answers."""
    add_image(center)
    center.cloud.vms.clone("plain", name="desk", profile="tiny", domain_node="east").result(timeout_s=120)
    center.cloud.vms["desk"].start(node="node2").result(timeout_s=120)
    center.cloud.vms["desk"].wait_ready(timeout_s=BOOT_S)
    return "desk"


def server_node(center: Center, name: str) -> dict[str, Any]:
    return dict(center.cloud.server_nodes.show(name))


def pool(center: Center, name: str = "east") -> dict[str, Any]:
    return dict(center.cloud.domain_nodes.show(name))


def vms_that_fit(center: Center, domain_node: str = "east") -> int:
    return int(center.cloud.capacity("tiny")["domain_nodes"][domain_node]["vms"])


def network_of(center: Center, node: str) -> networks.NetworkSpec:
    with libvirt_of(center, node) as host:
        found = networks.read_network(host.conn.networkLookupByName("hdcs").XMLDesc(0))
    assert found is not None
    return found


# --- who is refused


def refusal(center: Center, on: str, tmp_path: Path, **env: str) -> str:
    """What the node program says when it is refused; it ends by itself, with the exit code that means refused."""
    own = {"HDCS_STATE_DIR": str(tmp_path / "state")} | env
    done = center.lab.run(on, [f"{SRV}/agent/hdcs-node"], center.env | own, timeout_s=90, check=False)
    assert done.returncode == REFUSED, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def unchanged(whole: Center) -> Iterator[Center]:
    """Who is refused changes nothing, and living nodes live on."""
    wait_idle(whole)
    before, instances = picture(whole), {n["name"]: n["joined_at"] for n in whole.cloud.server_nodes.list()}
    yield whole
    assert {n["name"]: n["joined_at"] for n in whole.cloud.server_nodes.list()} == instances
    assert picture(whole) == before


def test_a_wrong_token_is_refused(unchanged: Center, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("not-the-token\n")
    token = {"HDCS_JOIN_TOKEN_FILE": str(tmp_path / "token")}
    said = refusal(unchanged, "node2", tmp_path, HDCS_SERVER_NODE="node9", **token)
    assert "server node node9 was refused: its join token is not the one of domain node east" in said
    assert "hdcs domain token east" in said


def test_a_token_of_another_domain_node_is_refused(unchanged: Center, tmp_path: Path) -> None:
    token = {"HDCS_JOIN_TOKEN_FILE": str(unchanged.lab.join_token_file("west"))}
    said = refusal(unchanged, "node2", tmp_path, HDCS_SERVER_NODE="node9", **token)
    assert "its join token is not the one of domain node east" in said


def test_a_missing_token_is_refused(unchanged: Center, tmp_path: Path) -> None:
    token = {"HDCS_JOIN_TOKEN_FILE": str(tmp_path / "nowhere")}
    said = refusal(unchanged, "node2", tmp_path, HDCS_SERVER_NODE="node9", **token)
    assert "server node node9 has no join token" in said


def test_the_name_of_a_living_node_is_refused(unchanged: Center, tmp_path: Path) -> None:
    said = refusal(unchanged, "node2", tmp_path, HDCS_SERVER_NODE="node1")
    assert "server node node1 was refused: a living server node has that name" in said
    assert "HDCS_SERVER_NODE" in said


def test_a_domain_node_nobody_made_is_refused(unchanged: Center, tmp_path: Path) -> None:
    (tmp_path / ".hdcs-domain-node").write_text("north\n")
    for kind in KINDS:
        (tmp_path / kind).mkdir()
    north = {"HDCS_DOMAIN_NODE": "north", "HDCS_STORAGE_ROOT": str(tmp_path), "HDCS_SERVER_NODE": "node9"}
    said = refusal(unchanged, "node2", tmp_path, **north)
    assert "there is no domain node 'north'" in said


def test_a_storage_without_its_marker_is_refused(unchanged: Center, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    storage = {"HDCS_STORAGE_ROOT": str(tmp_path / "empty")}
    said = refusal(unchanged, "node2", tmp_path, HDCS_SERVER_NODE="node9", **storage)
    assert f"{tmp_path}/empty is not the storage of domain node east: no .hdcs-domain-node there" in said
    assert "Mount that of east there" in said


def test_the_storage_of_another_domain_node_is_refused(unchanged: Center, tmp_path: Path) -> None:
    east = {"HDCS_DOMAIN_NODE": "east", "HDCS_JOIN_TOKEN_FILE": str(unchanged.lab.join_token_file("east"))}
    said = refusal(unchanged, "node3", tmp_path, HDCS_SERVER_NODE="node9", **east)
    assert f"storage {SRV} belongs to domain node west, not east" in said


# --- what a node brings, and what goes with it


def test_every_node_has_its_subnet_as_a_libvirt_network(whole: Center) -> None:
    for node in whole.cloud.server_nodes.list():
        network = network_of(whole, node["name"])
        assert (network.name, network.subnet, network.forward) == ("hdcs", node["subnet"], "open")
        assert node["subnet"] == whole.cloud.control.reservations.dump().subnets[node["name"]]


def test_nat_by_setting(lab_possible: None, tmp_path: Path) -> None:
    with data_center(tmp_path / "solo", {"HDCS_NETWORK_FORWARD": "nat"}, {"solo": ["node1"]}) as center:
        network, subnet = network_of(center, "node1"), server_node(center, "node1")["subnet"]
        assert (network.forward, network.subnet) == ("nat", subnet)
        rules = center.lab.run("node1", ["iptables", "-t", "nat", "-S"]).stdout
        assert f"-s {subnet} ! -d {subnet}" in rules and "MASQUERADE" in rules
        assert pool(center, "solo")["storage_primary"] == "node1"


def test_the_storage_primary_is_the_lowest_ip_of_the_living(whole: Center) -> None:
    ips = {node["name"]: ipaddress.ip_address(node["ip"]) for node in whole.cloud.server_nodes.list()}
    assert ips["node1"] < ips["node2"]
    fit = vms_that_fit(whole)
    memory_mib = pool(whole)["memory_mib"]
    assert pool(whole)["storage_primary"] == "node1"
    whole.stop("node1")
    wait_for("node1 to leave", lambda: server_node(whole, "node1")["state"] == "left", 120)
    shrunk = pool(whole)
    assert shrunk["storage_primary"] == "node2"
    assert shrunk["memory_mib"] == memory_mib - server_node(whole, "node1")["memory_mib"]
    assert 0 < vms_that_fit(whole) < fit
    subnet = server_node(whole, "node1")["subnet"]
    whole.start_node("node1")
    whole.wait_for_nodes(whole.lab.nodes)
    assert pool(whole)["storage_primary"] == "node1"
    assert (pool(whole)["memory_mib"], vms_that_fit(whole)) == (memory_mib, fit)
    assert server_node(whole, "node1")["subnet"] == subnet


def test_a_killed_node_is_lost_after_its_lease_and_comes_back_the_same(whole: Center, desk: str) -> None:
    before, fit, memory_mib = server_node(whole, "node2"), vms_that_fit(whole), pool(whole)["memory_mib"]
    vm = whole.cloud.vms[desk].show()
    kill_worker(whole, "node2")
    assert server_node(whole, "node2")["state"] == "up", "nobody can know it yet"
    wait_for("node2 to be lost", lambda: server_node(whole, "node2")["state"] == "lost", 120)
    assert pool(whole)["memory_mib"] == memory_mib - before["memory_mib"]
    assert vms_that_fit(whole) < fit
    assert any(e["kind"] == "server_node.lost" and "its lease ran out" in e["message"] for e in whole.cloud.events())
    with pytest.raises(Unreachable, match="VM desk is on server node node2, which is lost") as caught:
        whole.cloud.vms[desk].stop()
    assert "Bring node2 back" in caught.value.next
    assert whole.cloud.vms[desk].show()["state"] == "running", "a lost node is an alarm, not an end of its guests"
    whole.start_node("node2")
    whole.wait_for_nodes(whole.lab.nodes)
    after = server_node(whole, "node2")
    for key in ("subnet", "ip", "memory_mib", "free_memory_mib", "free_vcpus"):
        assert after[key] == before[key], key
    assert (pool(whole)["memory_mib"], vms_that_fit(whole)) == (memory_mib, fit)
    for key in ("state", "server_node", "ip", "port"):
        assert whole.cloud.vms[desk].show()[key] == vm[key], key
    assert at_guest(whole, desk, agent.ping)


def _power_off(host: Host, vm_id: str) -> None:
    with suppress(HdcsError):  # the agent ends with its guest
        agent.exec_(host, vm_id, ["/bin/sh", "-c", "poweroff"], timeout_s=5)


def test_a_node_that_starts_while_the_reservations_are_closed_tells_what_it_holds(whole: Center, desk: str) -> None:
    """A rebuild waits for reports, a start for the rebuild: neither waits for the other."""

    def rebuilt() -> list[str]:
        lines = whole.lab.log("control").read_text().splitlines()
        return [line for line in lines if "reservations rebuilt" in line]

    before = len(rebuilt())
    kill_worker(whole, "node2")
    whole.cloud.control.reservations.epoch.close()
    whole.start_node("node2")
    wait_for("the reservations to open", whole.cloud.control.reservations.epoch.is_open, 90)
    told = wait_for("the rebuild to be told", lambda: rebuilt()[before:], 60)  # they open a moment before
    assert f"reports={len(whole.lab.nodes)}" in told[-1] and "silent=0" in told[-1], told
    whole.wait_for_nodes(whole.lab.nodes)
    assert whole.cloud.vms[desk].show()["state"] == "running"


def test_a_guest_that_ends_from_inside_is_settled(whole: Center, desk: str) -> None:
    vm = whole.cloud.vms[desk].show()
    claims = whole.cloud.control.reservations.pool.claims
    assert vm["id"] in {claim.vm for claim in claims("east")}
    free_mib = server_node(whole, "node2")["free_memory_mib"]
    at_guest(whole, desk, _power_off)
    wait_for("the VM to be stopped", lambda: whole.cloud.vms[desk].show()["state"] == "stopped", 90)
    wait_idle(whole)
    seen = whole.cloud.vms[desk].show()
    assert (seen["server_node"], seen["port"], seen["ip"]) == (None, None, None)
    assert vm["id"] not in {claim.vm for claim in claims("east")}
    assert server_node(whole, "node2")["free_memory_mib"] > free_mib
    wait_for("its port to be free", lambda: not pool(whole)["ports_used"] and not pool(whole)["ports_cooling"], 120)
    with libvirt_of(whole, "node2") as host:
        assert host.lookup(vm["id"]) is None, "no definition stays where no guest runs"
        assert vm["mac"] not in {entry.mac for entry in networks.dhcp_hosts(host, "hdcs")}
    (gone,) = [event for event in whole.cloud.events() if event["kind"] == "vm.gone"]
    assert "ended by itself on node2" in gone["message"]
    whole.cloud.vms[desk].start().result(timeout_s=120)
    whole.cloud.vms[desk].wait_ready(timeout_s=BOOT_S)
