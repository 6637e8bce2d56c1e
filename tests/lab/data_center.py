"""A whole data center for the tests: control worker, beat, Flower, and four server nodes that joined."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from deploy.lab import Lab, free_net
from deploy.lab.center import Center, wait_for
from deploy.lab.golden_image import build
from deploy.lab.lab import DOMAIN_NODES, LOCAL
from deploy.lab.node_files import PKI
from hdcs_tasks.hypervisor import guests, networks
from hdcs_tasks.hypervisor.connection import Host
from tests.lab.traces import NOTHING, left_by, namespaces

SETTLE_S = 60.0
BOOT_S = 240.0


@contextmanager
def data_center(
    root: Path, env: Mapping[str, str] | None = None, domain_nodes: Mapping[str, Sequence[str]] = DOMAIN_NODES, *,
    tls: bool = False, flower: bool = False,
) -> Iterator[Center]:  # fmt: skip
    """A running data center for the length of the block, of which nothing is left afterwards. ``tls``: its server nodes
    reach each other by that alone."""
    over_tls = {"HDCS_MIGRATE_TLS": "true", "HDCS_MIGRATE_TLS_PKI": PKI} if tls else {}
    lab = Lab(root.name, root, free_net("10.97"), domain_nodes, tls=tls)
    made = Center(lab, over_tls | dict(env or {}), flower=flower)
    inside: set[str] = set()
    try:
        made.up()
        inside = namespaces(made.lab)
        yield made
    finally:
        made.down()
    left = left_by(made.lab, inside)
    assert left == NOTHING, left


@pytest.fixture(scope="module")
def center(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Center]:
    """The module's own data center: east (node1, node2), west (node3)."""
    nodes = {"east": ("node1", "node2"), "west": ("node3",)}
    with data_center(tmp_path_factory.mktemp("center") / "center", domain_nodes=nodes) as made:
        yield made


def add_image(center: Center, name: str = "plain") -> str:
    """Add the golden image to both domain nodes; its name."""
    center.cloud.images.add(name, str(build().path)).result(timeout_s=120)
    return name


def wait_idle(center: Center) -> None:
    """Wait until no operation is under way."""
    wait_for("every operation to end", lambda: not center.cloud.operations.list(live=True), SETTLE_S)


def kill_worker(center: Center, node: str) -> None:
    """kill -9 of the node program with all its workers; libvirtd and the guests live on."""
    found: set[int] = set()
    # all are stopped first, so that none sees another's end and still says goodbye or starts it anew
    while new := {pid for pid, line in center.lab.space(node).processes() if "workers.server_node" in line} - found:
        for pid in new:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        found |= new
    assert found, f"no node program runs on {node}"
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    center.pids.pop(node)


@contextmanager
def locked(center: Center, node: str, vm_id: str) -> Iterator[None]:
    """What is to be done to the VM on this server node waits inside the block (up to 10 s), as for an older attempt."""
    file = f"{LOCAL}/locks/{vm_id}"
    center.lab.run(node, ["mkdir", "-p", f"{LOCAL}/locks"])  # nothing was locked there yet
    pid = center.lab.spawn(node, ["flock", "--close", file, "sleep", "60"])

    def held() -> bool:
        return center.lab.run(node, ["flock", "--nonblock", file, "true"], check=False).returncode != 0

    wait_for("the lock", held, every_s=0.05)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def libvirt_of(center: Center, node: str) -> Iterator[Host]:
    """The libvirt of a server node, seen from outside HDCS."""
    with Host.open(f"qemu+tcp://{center.lab.ip(node)}/system") as host:
        yield host


def at_guest(center: Center, vm: str, look: Callable[[Host, str], Any]) -> Any:
    """Look at a running guest from outside HDCS: ``look(host, vm_id)``."""
    shown = center.cloud.vms[vm].show()
    with libvirt_of(center, shown["server_node"]) as host:
        return look(host, shown["id"])


def picture(center: Center) -> dict[str, Any]:
    """Everything a request could leave half-made: records, reservations, guests, DHCP hosts, files in the storage."""
    cloud, lab = center.cloud, center.lab
    return {
        "vms": {
            vm["name"]: (vm["id"], vm["state"], vm["server_node"], vm["port"], vm["ip"]) for vm in cloud.vms.list()
        },
        "images": {f"{i['name']}:{i['version']}": i["copies"] for i in cloud.images.list()},
        "backups": {backup["id"]: backup["state"] for backup in cloud.backups.list()},
        "live": [operation["id"] for operation in cloud.operations.list(live=True)],
        "domain_nodes": sorted(d["name"] for d in cloud.domain_nodes.list()),
        "profiles": sorted(p["name"] for p in cloud.profiles.list()),
        "reservations": cloud.control.reservations.dump(),
        "libvirt": {node: _world(center, node) for node in lab.nodes},
        "storage": {name: _files(lab.storage(name)) for name in lab.domain_nodes},
    }


def _world(center: Center, node: str) -> tuple[list[tuple[str, str]], list[str]]:
    with libvirt_of(center, node) as host:
        hosts = sorted(entry.mac for entry in networks.dhcp_hosts(host, "hdcs"))
        return sorted((guest.vm_id, guest.state) for guest in guests.list_guests(host)), hosts


def _files(root: Path) -> list[str]:
    """Files and folders below the storage; not what the node program itself keeps there."""
    found = (path.relative_to(root) for path in root.rglob("*"))
    return sorted(str(path) for path in found if path.parts[0] != "agent")
