"""The hypervisor package against real libvirtd and QEMU: lifecycle, console, network, storage, faults."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace
from datetime import UTC, datetime

import libvirt
import pytest

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import (
    Conflict,
    HypervisorRefused,
    Invalid,
    NotFound,
    Rejected,
    Unavailable,
    Unreachable,
    WrongState,
)
from hdcs_tasks.hypervisor import agent, connection, facts, guests, networks, stats, storage
from hdcs_tasks.hypervisor.connection import Host, HostPool
from hdcs_tasks.hypervisor.errors import libvirt_errors
from tests.lab.hypervisor_node import SUBNET, HypervisorNode, wait_until

pytestmark = pytest.mark.lab


def defined(node: HypervisorNode) -> set[str]:
    return {guest.UUIDString() for guest in node.host.conn.listAllDomains(0)}


# -- life of a guest


def test_start_is_idempotent_within_its_step(node: HypervisorNode) -> None:
    spec = node.spec()
    first = guests.start(node.host, spec)
    assert (first.state, first.memory_mib, first.console_port) == ("running", 64, spec.console_port)
    number = node.host.guest(spec.vm_id).ID()
    assert guests.start(node.host, replace(spec, attempt=2)) == first
    assert node.host.guest(spec.vm_id).ID() == number, "it was started anew"
    with pytest.raises(Conflict, match=f"started by step {spec.step} attempt 1"):
        guests.start(node.host, replace(spec, step="another"))
    assert [g.vm_id for g in guests.list_guests(node.host)] == [spec.vm_id]
    assert not node.host.guest(spec.vm_id).autostart()


def test_stop_leaves_no_definition(node: HypervisorNode) -> None:
    spec = node.spec()
    guests.start(node.host, spec)
    assert guests.stop(node.host, spec.vm_id, force=True)
    assert spec.vm_id not in defined(node)
    assert not guests.stop(node.host, spec.vm_id, force=True)
    assert not guests.stop(node.host, spec.vm_id)
    assert guests.info(node.host, spec.vm_id) is None
    with pytest.raises(NotFound):
        guests.suspend(node.host, spec.vm_id)


def test_leftover_definition_is_redefined_and_removed(node: HypervisorNode) -> None:
    spec = node.spec()
    guests.start(node.host, replace(spec, memory_mib=48))
    node.host.guest(spec.vm_id).destroy()
    left = guests.info(node.host, spec.vm_id)
    assert left is not None
    assert left.state == "shutoff"
    assert guests.start(node.host, replace(spec, step="next")).memory_mib == 64
    node.host.guest(spec.vm_id).destroy()
    assert not guests.stop(node.host, spec.vm_id), "it did not run"
    assert spec.vm_id not in defined(node)


def test_failed_start_leaves_nothing(node: HypervisorNode) -> None:
    runs = node.spec()
    guests.start(node.host, runs)
    same_port = replace(node.spec(), console_port=runs.console_port)
    with pytest.raises(Conflict, match="port"):
        guests.start(node.host, same_port)
    same_disk = replace(node.spec(), disks=runs.disks)
    with pytest.raises(Conflict, match="lock"):
        guests.start(node.host, same_disk)
    no_disk = replace(node.spec(), disks=("/no/such/disk.qcow2",))
    with pytest.raises(NotFound, match="does not exist"):
        guests.start(node.host, no_disk)
    no_network = replace(node.spec(), network="nowhere")
    with pytest.raises(NotFound, match="nowhere"):
        guests.start(node.host, no_network)
    assert defined(node) == {runs.vm_id}


def test_suspend_and_resume(node: HypervisorNode) -> None:
    spec = node.spec()
    assert guests.start(node.host, spec, paused=True).state == "paused"
    guests.resume(node.host, spec.vm_id)
    guests.resume(node.host, spec.vm_id)
    guests.suspend(node.host, spec.vm_id)
    guests.suspend(node.host, spec.vm_id)
    seen = guests.info(node.host, spec.vm_id)
    assert seen is not None
    assert seen.state == "paused"
    with pytest.raises(WrongState, match="suspended"):
        guests.stop(node.host, spec.vm_id, timeout_s=1)
    with pytest.raises(WrongState):
        guests.reboot(node.host, spec.vm_id, timeout_s=1)


def test_guest_that_does_not_listen_must_be_forced(node: HypervisorNode) -> None:
    spec = node.spec()
    guests.start(node.host, spec)
    with pytest.raises(Unavailable, match="did not shut down within 1 s"):
        guests.stop(node.host, spec.vm_id, timeout_s=1)
    assert guests.info(node.host, spec.vm_id) is not None


def test_saved_memory_is_used_once(node: HypervisorNode) -> None:
    spec = node.booting()
    guests.start(node.host, spec)
    agent.wait_for_agent(node.host, spec.vm_id, 120)
    agent.write_file(node.host, spec.vm_id, "/run/mark", b"in memory only")
    saved = node.layout.path("state", spec.vm_id)
    guests.save(node.host, spec.vm_id, saved)
    assert spec.vm_id not in defined(node)
    guests.save(node.host, spec.vm_id, saved)  # asked again: still saved
    back = replace(spec, step="restore-1", attempt=4, console_port=spec.console_port + 500)
    seen = guests.start(node.host, back, saved=saved)
    assert (seen.step, seen.attempt, seen.console_port) == ("restore-1", 4, back.console_port)
    assert not saved.exists()
    assert agent.read_file(node.host, spec.vm_id, "/run/mark") == b"in memory only"
    guests.stop(node.host, spec.vm_id, force=True)
    with pytest.raises(NotFound, match="no saved memory"):
        guests.start(node.host, back, saved=saved)
    with pytest.raises(NotFound, match="neither runs nor was saved"):
        guests.save(node.host, spec.vm_id, saved)
    assert spec.vm_id not in defined(node)


def test_half_written_memory_is_not_taken(node: HypervisorNode) -> None:
    spec = node.spec()
    saved = node.layout.path("state", spec.vm_id)
    saved.with_name(saved.name + ".partial").write_bytes(b"LibvirtQemudPart" + bytes(4096))
    with pytest.raises(NotFound):
        guests.save(node.host, spec.vm_id, saved)
    assert not saved.exists()


@pytest.mark.parametrize("usb", ["on", "0x08,-1,-1,-1,1|-1,-1,-1,-1,0"])
def test_usb_policies_start(node: HypervisorNode, usb: str) -> None:
    spec = node.spec(usb=usb)
    guests.start(node.host, spec)
    assert node.host.guest(spec.vm_id).XMLDesc(0).count("<redirdev") == 2


def test_console_ticket_expires(node: HypervisorNode) -> None:
    spec = node.spec()
    guests.start(node.host, spec)
    assert 'passwdValidTo="1970' in secure_xml(node, spec.vm_id)
    until = guests.set_console_password(node.host, spec.vm_id, "s3cret<&>'\"", 60)
    assert 55 < (until - datetime.now(UTC)).total_seconds() <= 60
    assert f'passwdValidTo="{until:%Y-%m-%dT%H:%M:%S}"' in secure_xml(node, spec.vm_id)
    assert "s3cret" not in node.host.guest(spec.vm_id).XMLDesc(0)
    with pytest.raises(Invalid):
        guests.set_console_password(node.host, spec.vm_id, "x" * 61, 60)


def secure_xml(node: HypervisorNode, vm_id: str) -> str:
    return node.host.guest(vm_id).XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE).replace("'", '"')


# -- network


def test_network_is_replaced_only_when_free(node: HypervisorNode) -> None:
    name = "office"
    try:
        assert networks.ensure_network(node.host, networks.NetworkSpec(name, "10.92.130.0/24"))
        assert not networks.ensure_network(node.host, networks.NetworkSpec(name, "10.92.130.0/24"))
        assert networks.ensure_network(node.host, networks.NetworkSpec(name, "10.92.131.0/24", "isolated"))
        spec = node.spec(network=name)
        guests.start(node.host, spec)
        with pytest.raises(Conflict, match="1 guests"):
            networks.ensure_network(node.host, networks.NetworkSpec(name, "10.92.130.0/24"))
        assert node.host.conn.networkLookupByName(name).isActive()
        guests.stop(node.host, spec.vm_id, force=True)
    finally:
        assert networks.remove_network(node.host, name)
    assert not networks.remove_network(node.host, name)


def test_dhcp_hosts_replace_stale_ones(node: HypervisorNode) -> None:
    mac, other = "52:54:00:92:ff:01", "52:54:00:92:ff:02"
    try:
        assert networks.add_dhcp_host(node.host, "hdcs", mac, "10.92.128.201", "old")
        assert not networks.add_dhcp_host(node.host, "hdcs", mac.upper(), "10.92.128.201", "old")
        assert networks.add_dhcp_host(node.host, "hdcs", other, "10.92.128.201", "new")
        assert networks.add_dhcp_host(node.host, "hdcs", other, "10.92.128.202", "new")
        wanted = networks.DhcpHost(other, "10.92.128.202", "new")
        assert [h for h in networks.dhcp_hosts(node.host, "hdcs") if h.mac in (mac, other)] == [wanted]
        for wrong in ("10.92.129.1", "10.92.128.1", "x"):
            with pytest.raises(Invalid):
                networks.add_dhcp_host(node.host, "hdcs", mac, wrong)
    finally:
        assert networks.remove_dhcp_host(node.host, "hdcs", other)
    assert not networks.remove_dhcp_host(node.host, "hdcs", other)
    assert not networks.ensure_network(node.host, networks.NetworkSpec("hdcs", SUBNET)), "entries changed the network"
    with pytest.raises(NotFound):
        networks.add_dhcp_host(node.host, "nowhere", mac, "10.92.128.201")


# -- storage


def test_pools_show_the_storage(node: HypervisorNode) -> None:
    storage.ensure_pools(node.host, node.layout)
    storage.ensure_pools(node.host, node.layout)
    seen = storage.volumes(node.host, "images")
    assert [(v.name, v.path) for v in seen] == [("mini.qcow2", str(node.image))]
    assert seen[0].capacity_bytes > seen[0].allocation_bytes > 0
    total, free = storage.disk_usage(node.layout.root)
    assert total > free > 0
    with pytest.raises(Rejected):
        storage.check(node.layout.root, "west")


# -- facts and statistics


def test_facts(node: HypervisorNode) -> None:
    seen = facts.facts(node.host, Settings(virt_type="qemu", host_memory_mib=4096))
    assert (seen.hostname, seen.virt_type, seen.memory_mib, seen.kvm_usable) == ("node1", "qemu", 4096, False)
    assert min(seen.sockets, seen.cores_per_socket, seen.threads_per_core, seen.max_vcpus) >= 1
    assert seen.libvirt_version.startswith("9.")
    assert seen.emulator_version.startswith("7.")
    with open("/proc/meminfo") as file:
        total_mib = int(file.readline().split()[1]) // 1024
    assert facts.facts(node.host, Settings(virt_type="qemu")).memory_mib == total_mib


def test_one_hung_guest_does_not_hide_the_others(node: HypervisorNode) -> None:
    well, hung = node.spec(), node.spec()
    guests.start(node.host, well)
    guests.start(node.host, hung)
    seen = stats.sample(node.host)
    assert [(s.vm_id, s.partial) for s in seen] == [(well.vm_id, False), (hung.vm_id, False)]
    assert all(s.cpu_ns > 0 and s.memory_mib == 64 and s.rss_mib > 0 for s in seen)
    node.signal_guest(signal.SIGSTOP, hung)
    try:
        for _ in range(2):
            seen = stats.sample(node.host, timeout_s=1)
            assert {s.vm_id for s in seen if s.partial} == {well.vm_id, hung.vm_id}
        assert len(guests.list_guests(node.host)) == 2
    finally:
        node.signal_guest(signal.SIGCONT, hung)
    wait_until(lambda: not any(s.partial for s in stats.sample(node.host)))


# -- faults of libvirtd


def test_restarted_libvirtd_heals_by_itself(node: HypervisorNode) -> None:
    spec = node.spec()
    guests.start(node.host, spec)
    pool = HostPool(node.uri)
    first = pool.get()
    assert pool.get() is first
    node.signal(signal.SIGKILL, "libvirtd")
    wait_until(lambda: not first.alive(), 60)
    with pytest.raises(Unreachable), libvirt_errors("ask the dead"):
        first.conn.listAllDomains(0)
    second = pool.get()
    assert second is not first
    seen = guests.info(second, spec.vm_id)
    assert seen is not None
    assert (seen.state, seen.step) == ("running", spec.step), "guests live on"
    pool.close()


def test_hung_libvirtd_is_given_up_on(node: HypervisorNode) -> None:
    node.signal(signal.SIGSTOP, "libvirtd")
    try:
        with pytest.raises(Unreachable, match="did not answer within 1"):
            Host.open(node.uri, timeout_s=1)
    finally:
        node.signal(signal.SIGCONT, "libvirtd")
    Host.open(node.uri).close()


def test_current_host_is_one_per_process(node: HypervisorNode) -> None:
    settings = Settings(libvirt_uri=node.uri)
    found: list[Host] = []
    threads = [threading.Thread(target=lambda: found.append(connection.current_host(settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_refusals_keep_libvirts_words(node: HypervisorNode) -> None:
    with (
        pytest.raises(HypervisorRefused, match=r"cannot define nonsense: .*Premature end") as caught,
        libvirt_errors("define nonsense"),
    ):
        node.host.conn.defineXML("<domain>")
    assert caught.value.details["libvirt_code"] > 0
