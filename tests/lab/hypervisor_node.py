"""A server node of the lab as the hypervisor tests need it. Used as a plugin: ``pytest_plugins`` in conftest.py."""

from __future__ import annotations

import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from deploy.lab import Lab, free_net
from deploy.lab.golden_image import build
from hdcs_tasks.errors import Invalid
from hdcs_tasks.hypervisor import disks, guests, networks, storage
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.spec import GuestSpec

SUBNET = "10.92.128.0/24"


@dataclass
class HypervisorNode:
    """One server node: its ``uri``, a Host on it, and its storage (seen under the same path from here and there)."""

    lab: Lab
    name: str
    uri: str
    layout: storage.StorageLayout
    host: Host
    image: Path
    made: list[str] = field(default_factory=list)

    def spec(self, **changes: object) -> GuestSpec:
        """A guest of its own, on an empty disk that boots nothing; nobody else has its port, MAC or name."""
        number = len(self.made) + 1
        vm_id = str(uuid.uuid4())
        self.made.append(vm_id)
        self.layout.vm_dir(vm_id).mkdir()
        disks.create_blank(self.layout.disk(vm_id), 8 << 20)
        base = GuestSpec(
            vm_id=vm_id, name=f"desk-{number:03d}", vcpus=1, memory_mib=64, disks=(str(self.layout.disk(vm_id)),),
            mac=f"52:54:00:92:00:{number:02x}", network="hdcs", console_port=21000 + number, operation="op-1",
            step=f"step-{number}", attempt=1,
        )  # fmt: skip
        return replace(base, **changes)  # type: ignore[arg-type]

    def booting(self, **changes: object) -> GuestSpec:
        """A guest that boots the golden image, with a reserved address."""
        spec = self.spec(memory_mib=128, **changes)
        self.layout.disk(spec.vm_id).unlink()
        disks.create_overlay(self.image, self.layout.disk(spec.vm_id))
        networks.add_dhcp_host(self.host, "hdcs", spec.mac, self.address(spec), spec.name)
        return spec

    @staticmethod
    def address(spec: GuestSpec) -> str:
        return f"10.92.128.{10 + int(spec.mac[-2:], 16)}"

    def pids(self, program: str, needle: str = "") -> list[int]:
        """Pids of this node's processes that run ``program`` and have ``needle`` in their command line."""
        lines = ((pid, line) for pid, line in self.lab.space(self.name).processes() if needle in line)
        return [pid for pid, line in lines if Path(line.split()[0]).name == program]

    def signal(self, number: signal.Signals, program: str, needle: str = "") -> None:
        pids = self.pids(program, needle)
        assert pids, f"no {program} {needle} on {self.name}"
        for pid in pids:
            os.kill(pid, number)

    def signal_guest(self, number: signal.Signals, spec: GuestSpec) -> None:
        self.signal(number, "qemu-system-x86_64", f"guest={spec.name},")


def wait_until(done: Callable[[], object], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def hypervisor_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab of one server node of its own."""
    root = tmp_path_factory.mktemp("hypervisor") / "hypervisor"  # two sessions at once each have theirs
    lab = Lab("hypervisor", root, net=free_net("10.92"), domain_nodes={"east": ["node1"]})
    try:
        lab.up()
    except Invalid as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    try:
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="session")
def hypervisor_session(hypervisor_lab: Lab) -> HypervisorNode:
    uri = f"qemu+tcp://{hypervisor_lab.ip('node1')}/system"
    layout = storage.prepare(hypervisor_lab.storage("east"), "east")
    image = layout.path("images", "mini.qcow2")
    shutil.copyfile(build().path, image)
    host = Host.open(uri)
    networks.ensure_network(host, networks.NetworkSpec("hdcs", SUBNET))
    return HypervisorNode(hypervisor_lab, "node1", uri, layout, host, image)


@pytest.fixture
def node(hypervisor_session: HypervisorNode) -> Iterator[HypervisorNode]:
    """The server node; every guest of the test is gone after it."""
    if not hypervisor_session.host.alive():
        hypervisor_session.host = Host.open(hypervisor_session.uri)
    before = len(hypervisor_session.made)
    yield hypervisor_session
    host = hypervisor_session.host
    if not host.alive():
        host = hypervisor_session.host = Host.open(hypervisor_session.uri)
    for vm_id in hypervisor_session.made[before:]:
        try:
            guests.stop(host, vm_id, force=True)
        finally:
            shutil.rmtree(hypervisor_session.layout.vm_dir(vm_id), ignore_errors=True)


__all__ = ["HypervisorNode", "hypervisor_lab", "hypervisor_session", "node", "wait_until"]
