"""Samples on a real Redis and a real record: what is kept of them, and what they say against the record."""

from __future__ import annotations

import time
from typing import Any

import pytest

from hdcs_tasks.monitor.control import list_events
from hdcs_tasks.monitor.control_samples import take_sample
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.recovery import sweep_once
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Vm
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control as vms
from tests.contract.test_tidy import TOKEN, join_request, place, stopped_vm

pytestmark = pytest.mark.contract
HOST = {"cpu_percent": 12.5, "memory_total_mib": 16000, "memory_available_mib": 8000}


def sample_of(node: str, at: float, *guests: str, **more: Any) -> dict[str, Any]:
    seen = {"state": "running", "cpu_percent": 50.0, "console_clients": 0} | more
    return {"node": node, "at": at, "host": HOST, "storage": {}, "guests": [{"vm_id": g, **seen} for g in guests]}


@pytest.fixture
def pool(control: Control) -> Control:
    pool_control.create_domain_node(control, "east", TOKEN)
    pool_control.join(control, join_request())
    return control


def running(control: Control, placed: bool = True) -> str:
    """A VM that runs on node1 and holds its place there."""
    vm_id = stopped_vm(control)
    found = place(control, vm_id)
    with control.transaction() as tx:
        vm = tx.session.get_one(Vm, vm_id)
        vm.server_node, vm.port, vm.ip = "node1", found.port, found.ip
        move(vm, VmState.RUNNING)
    return vm_id


def vm_of(control: Control, vm_id: str) -> Vm:
    with control.store.read() as session:
        return session.get_one(Vm, vm_id)


def events(control: Control, kind: str) -> list[str]:
    return [event["message"] for event in list_events(control, 100) if event["kind"] == kind]


def test_a_short_history_is_kept_and_nothing_more(reservations: Reservations) -> None:
    samples = reservations.samples
    for number in range(10):
        samples.write(sample_of("node1", 1000.0 + number, "a", "b", cpu_percent=number), kept=4, ttl_s=60)
    assert [row["at"] for row in samples.vm_history("a")] == [1009.0, 1008.0, 1007.0, 1006.0]
    assert samples.vms(["a", "b", "gone"])["b"] | {"at": 0} == {
        "at": 0, "node": "node1", "state": "running", "cpu_percent": 9, "console_clients": 0, "memory_mib": None,
        "unused_mib": None, "rss_mib": None, "disk_bytes_s": None, "net_bytes_s": None, "partial": None, "looked": None,
    }  # fmt: skip
    assert set(samples.vms(["a", "gone"])) == {"a"}
    assert samples.hosts(["node1", "node2"]) == {"node1": {"at": 1009.0, **HOST}}
    assert len(samples.host_history("node1")) == 4
    assert samples.nodes(["node1"])["node1"]["guests"][1]["vm_id"] == "b"
    link = reservations._link
    keys = link.scan("sample:*")
    assert len(keys) == 4
    assert all(0 < link.do("PTTL", key) <= 60_000 for key in keys), "all of it ends by itself"


def test_a_sample_is_taken_from_redis_and_an_older_one_is_dropped(pool: Control) -> None:
    vm_id = running(pool)
    at = time.time() + 60
    pool.reservations.samples.write(sample_of("node1", at, vm_id), kept=4, ttl_s=60)
    take_sample(pool, {"node": "node1", "at": at})
    seen = vm_of(pool, vm_id)
    assert (seen.observed_state, seen.observed_at and seen.observed_at.timestamp()) == ("running", pytest.approx(at))
    assert seen.active_at == seen.observed_at, "it is busy"
    take_sample(pool, sample_of("node1", at - 30))
    assert vm_of(pool, vm_id).state is VmState.RUNNING, "an older sample says nothing"


def test_a_guest_that_is_gone_is_settled_once_no_operation_is_at_work(pool: Control) -> None:
    vm_id = running(pool)
    take_sample(pool, sample_of("node1", time.time()))
    assert vm_of(pool, vm_id).state is VmState.RUNNING, "it may have begun to run after the sample was taken"
    take_sample(pool, sample_of("node1", time.time() + 60))
    assert vm_of(pool, vm_id).state is VmState.STOPPING
    assert events(pool, "vm.gone") == ["VM desk-1: its guest not seen on node1"]
    take_sample(pool, sample_of("node1", time.time() + 70))
    assert len(events(pool, "vm.gone")) == 1


def test_a_guest_paused_and_resumed_behind_our_back(pool: Control) -> None:
    vm_id = running(pool)
    take_sample(pool, sample_of("node1", time.time() + 60, vm_id, state="paused"))
    assert vm_of(pool, vm_id).state is VmState.SUSPENDED
    take_sample(pool, sample_of("node1", time.time() + 120, vm_id))
    assert vm_of(pool, vm_id).state is VmState.RUNNING
    assert len(events(pool, "vm.paused")) == len(events(pool, "vm.resumed")) == 1
    vms.command(pool, "suspend", "desk-1", Asked())
    take_sample(pool, sample_of("node1", time.time() + 180, vm_id, state="paused"))
    assert vm_of(pool, vm_id).state is VmState.SUSPENDING, "that is an operation's to settle"


def test_a_guest_started_behind_our_back_gets_its_place_back(pool: Control) -> None:
    vm_id = stopped_vm(pool)
    port = pool.reservations.ports.take("east", vm_id)
    take_sample(pool, sample_of("node1", time.time() + 60, vm_id, console_port=port))
    seen = vm_of(pool, vm_id)
    assert (seen.state, seen.server_node, seen.port) == (VmState.RUNNING, "node1", port)
    (claim,) = pool.reservations.pool.claims("east")
    assert (claim.vm, claim.node, claim.port, claim.ip) == (vm_id, "node1", port, seen.ip)
    assert len(events(pool, "vm.started")) == 1 and not events(pool, "guest.unrecorded")


def test_a_guest_started_behind_our_back_on_anothers_port_is_only_told(pool: Control) -> None:
    vm_id = stopped_vm(pool)
    take_sample(pool, sample_of("node1", time.time() + 60, vm_id, console_port=1))
    assert vm_of(pool, vm_id).state is VmState.STOPPED
    assert pool.reservations.pool.claims("east") == []
    assert len(events(pool, "guest.unrecorded")) == 1


def test_a_sweep_that_ran_to_its_end_says_so(control: Control) -> None:
    assert sweep_once(control, "leases", 3600.0, pool_control.lease_sweep) == []

    def broken(_: Control) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        sweep_once(control, "tidy", 3600.0, broken)
    found = control.reservations.samples.sweeps()
    assert set(found) == {"leases"}
    assert found["leases"]["period_s"] == 3600.0 and found["leases"]["took_s"] < 60
