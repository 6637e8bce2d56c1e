"""A guest that boots: its agent, its address, its shutdown and reboot."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from hdcs_tasks.errors import HypervisorRefused, Unavailable
from hdcs_tasks.hypervisor import agent, guests, networks
from hdcs_tasks.hypervisor.spec import GuestSpec
from tests.lab.hypervisor_node import HypervisorNode, wait_until

pytestmark = pytest.mark.lab


def boot(node: HypervisorNode) -> GuestSpec:
    spec = node.booting()
    guests.start(node.host, spec)
    agent.wait_for_agent(node.host, spec.vm_id, 120)
    return spec


@pytest.fixture(scope="module")
def booted(hypervisor_session: HypervisorNode) -> Iterator[GuestSpec]:
    """One booted guest for all tests that leave it running."""
    spec = boot(hypervisor_session)
    yield spec
    guests.stop(hypervisor_session.host, spec.vm_id, force=True)


def uptime(node: HypervisorNode, spec: GuestSpec) -> float:
    return float(agent.read_file(node.host, spec.vm_id, "/proc/uptime").split()[0])


def test_programs_and_files(node: HypervisorNode, booted: GuestSpec) -> None:
    done = agent.exec_(node.host, booted.vm_id, ["/bin/sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.exit_code, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert agent.exec_(node.host, booted.vm_id, ["/bin/sh", "-c", "kill -9 $$"]).exit_code == 137
    with pytest.raises(Unavailable, match="did not end within"):
        agent.exec_(node.host, booted.vm_id, ["/bin/sleep", "30"], timeout_s=0.5)
    with pytest.raises(HypervisorRefused):
        agent.exec_(node.host, booted.vm_id, ["/no/such/program"])
    content = bytes(range(256)) * 600
    agent.write_file(node.host, booted.vm_id, "/tmp/x", content)
    assert agent.read_file(node.host, booted.vm_id, "/tmp/x") == content
    with pytest.raises(HypervisorRefused, match="over 1000 bytes"):
        agent.read_file(node.host, booted.vm_id, "/tmp/x", max_bytes=1000)
    assert agent.users(node.host, booted.vm_id) == []


def test_address_is_the_reserved_one(node: HypervisorNode, booted: GuestSpec) -> None:
    want = (node.address(booted),)
    wait_until(lambda: agent.addresses(node.host, booted.vm_id) == {"agent": want, "lease": want})
    seen = guests.info(node.host, booted.vm_id)
    assert seen is not None
    assert seen.addresses == want
    assert want[0] in [lease.ip for lease in networks.leases(node.host, "hdcs")]


def test_bounced_link_brings_a_new_address(node: HypervisorNode, booted: GuestSpec) -> None:
    wait_until(lambda: agent.addresses(node.host, booted.vm_id)["agent"] == (node.address(booted),))
    networks.add_dhcp_host(node.host, "hdcs", booted.mac, "10.92.128.222", booted.name)
    agent.renew_network(node.host, booted.vm_id)
    wait_until(lambda: agent.addresses(node.host, booted.vm_id)["agent"] == ("10.92.128.222",), 120)
    with pytest.raises(HypervisorRefused, match="no network interface"):
        agent.renew_network(node.host, booted.vm_id, "52:54:00:00:00:00")


def test_thaw_always_happens(node: HypervisorNode, booted: GuestSpec) -> None:
    def status() -> object:
        return agent._call(node.host.guest(booted.vm_id), "guest-fsfreeze-status")

    with agent.frozen(node.host, booted.vm_id) as held:
        assert held
        assert status() == "frozen"
    assert status() == "thawed"
    with pytest.raises(ZeroDivisionError), agent.frozen(node.host, booted.vm_id):
        raise ZeroDivisionError
    assert status() == "thawed"


def test_frozen_goes_on_without_an_agent(node: HypervisorNode) -> None:
    spec = node.spec()
    guests.start(node.host, spec)
    with agent.frozen(node.host, spec.vm_id) as held:
        assert not held
    assert not agent.ping(node.host, spec.vm_id, 1)
    with pytest.raises(Unavailable, match="did not answer within"):
        agent.wait_for_agent(node.host, spec.vm_id, 0.5)


def test_reboot_and_the_power_button_of_a_guest_whose_agent_is_silent(node: HypervisorNode) -> None:
    booted = boot(node)
    before = node.host.guest(booted.vm_id).ID()
    mark = uptime(node, booted)
    begun = time.monotonic()
    guests.reboot(node.host, booted.vm_id, timeout_s=60)
    agent.wait_for_agent(node.host, booted.vm_id, 90)
    assert uptime(node, booted) < mark + time.monotonic() - begun
    assert node.host.guest(booted.vm_id).ID() == before, "QEMU, and so console and claim, stay"
    guests.reboot(node.host, booted.vm_id, force=True, timeout_s=10)
    agent.wait_for_agent(node.host, booted.vm_id, 90)
    # in a moment, so that it still answers this
    agent.exec_(node.host, booted.vm_id, ["/bin/sh", "-c", "(sleep 1; killall -STOP qemu-ga) >/dev/null 2>&1 &"])
    wait_until(lambda: not agent.ping(node.host, booted.vm_id, 1))
    assert guests.stop(node.host, booted.vm_id, timeout_s=60)
    assert guests.info(node.host, booted.vm_id) is None
