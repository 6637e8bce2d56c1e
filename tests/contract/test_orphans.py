"""What loses its owner is freed, what has one is never: the orphan sweep, the rebuild, and starts that fail badly."""

from __future__ import annotations

import base64
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from hdcs_tasks.errors import OutcomeUnknown, WrongState
from hdcs_tasks.hypervisor.connection import HostPool
from hdcs_tasks.monitor.control import list_events
from hdcs_tasks.monitor.control_doctor import doctor
from hdcs_tasks.monitor.control_samples import take_sample
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.node import HandOver, NodeContext, Run
from hdcs_tasks.operations.recovery import recovery_sweep, settle
from hdcs_tasks.operations.spool import Spool
from hdcs_tasks.operations.views import show
from hdcs_tasks.pool import rebuild
from hdcs_tasks.pool.tidy import dhcp_sweep, tidy_sweep
from hdcs_tasks.reservations import PlaceRequest, PoolNode
from hdcs_tasks.routing import direct_queue, quick_queue
from hdcs_tasks.states import ServerNodeState, VmState
from hdcs_tasks.store.models import DomainNode, ServerNode, Step, Vm, new_id, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control as vm_control
from hdcs_tasks.vm import control_migrate, node_start

pytestmark = pytest.mark.contract

SUBNETS = {"node1": "10.9.0.0/24", "node2": "10.9.1.0/24"}
NEED = 307
FACTS = {
    "cpu_mhz": 2000,
    "sockets": 1,
    "cores_per_socket": 4,
    "threads_per_core": 2,
    "max_vcpus": 64,
    "memory_mib": 9000,
}


@pytest.fixture
def center(control: Control) -> Control:
    """East with node1 and node2, both up and in the pool."""
    control.reservations.ports.allot_range("east", 20000, 20999, 1000)
    with control.store.session() as session:
        session.add(DomainNode(name="east", token_key="k", port_first=20000, port_last=20999))
        session.flush()
        for name, subnet in SUBNETS.items():
            session.add(ServerNode(
                name=name, domain_node="east", state=ServerNodeState.UP, ip="127.0.0.1", subnet=subnet,
                instance="i", facts=FACTS, vcpus=8, memory_mib=8192,
            ))  # fmt: skip
    for name, subnet in SUBNETS.items():
        control.reservations.pool.put_node("east", PoolNode(name, 8, 8192, subnet))
    return control


def add_vm(control: Control, name: str, state: VmState, **more: Any) -> Vm:
    vm_id = new_id()
    mac = control.reservations.macs.take(vm_id)
    control.reservations.disks.claim("east", vm_id, 1024, 10**9)
    with control.store.session() as session:
        vm = Vm(id=vm_id, name=name, state=state, home="east", profile="p", vcpus=1, memory_mib=64, disk_bytes=1024,
                mac=mac, **more)  # fmt: skip
        session.add(vm)
    return vm


def place(control: Control, vm_id: str, node: str, step: str = "s1") -> Any:
    return control.reservations.pool.place(PlaceRequest("east", vm_id, step, 1, NEED, pin=node))


def running(control: Control, name: str, node: str) -> Vm:
    vm = add_vm(control, name, VmState.RUNNING, server_node=node)
    placed = place(control, vm.id, node)
    with control.store.session() as session:
        row = session.get(Vm, vm.id)
        assert row is not None
        row.port, row.ip = placed.port, placed.ip
    return vm


def messages(control: Control, queue: str) -> list[dict[str, Any]]:
    """The keyword arguments of every message that waits in a queue, oldest first."""
    raw = control.reservations.macs._link.do("LRANGE", f"hdcs:{queue}", 0, -1)
    return [json.loads(base64.b64decode(json.loads(text)["body"]))[1] for text in reversed(raw)]


def only_step(control: Control, operation: str) -> Step:
    with control.store.read() as session:
        return session.query(Step).filter_by(operation_id=operation).one()


def claims(control: Control) -> set[tuple[str, str, str]]:
    return {(c.vm, c.node, c.ip) for c in control.reservations.pool.claims("east")}


# --- the sweeps


def test_what_nobody_owns_goes_at_the_second_sweep(center: Control) -> None:
    ghost = new_id()
    center.reservations.macs.take(ghost)
    center.reservations.disks.claim("east", ghost, 1024, 10**9)
    center.reservations.ports.take("east", ghost)
    vm = running(center, "desk", "node1")
    assert tidy_sweep(center) == 0, "a VM's first reservations are older than its record"
    assert ghost in center.reservations.macs.all()
    assert tidy_sweep(center) == 3
    assert list(center.reservations.macs.all()) == [vm.id]
    assert list(center.reservations.disks.all("east")) == [vm.id]
    assert center.reservations.ports.cooling("east") == {ghost}


def test_a_resting_vm_gives_its_claim_back_and_one_at_work_does_not(center: Control) -> None:
    rests, works = add_vm(center, "rests", VmState.STOPPED), add_vm(center, "works", VmState.STOPPED)
    vm_control.start(center, "works", Asked())
    for vm in (rests, works):
        place(center, vm.id, "node2", step=vm.id)
    tidy_sweep(center)
    assert {vm_id for vm_id, _, _ in claims(center)} == {works.id}


def test_a_claim_is_released_for_the_step_that_made_it(center: Control) -> None:
    vm = add_vm(center, "desk", VmState.STOPPED)
    place(center, vm.id, "node2", step="old")
    place(center, vm.id, "node2", step="new")
    assert not center.reservations.pool.release("east", vm.id, "node2", 60, step="old")
    assert center.reservations.pool.release("east", vm.id, "node2", 60, step="new")


def test_server_nodes_are_asked_to_tidy_unless_lost(center: Control) -> None:
    with center.store.session() as session:
        row = session.get(ServerNode, "node2")
        assert row is not None
        move(row, ServerNodeState.LOST)
    assert dhcp_sweep(center) == 1
    assert messages(center, quick_queue("east", "node1")) == [{}]


def test_a_guest_without_record_is_told_once(center: Control) -> None:
    vm = running(center, "desk", "node1")
    at_work = add_vm(center, "starting", VmState.STOPPED)
    vm_control.start(center, "starting", Asked())
    later = time.time() + 60
    for seconds in (0, 1):
        for name in SUBNETS:
            guests = [{"vm_id": vm_id, "state": "running", "cpu_percent": 0.0, "console_clients": 0}
                      for vm_id in (vm.id, at_work.id)]  # fmt: skip
            take_sample(center, {"node": name, "at": later + seconds, "guests": guests})
    told = [e for e in list_events(center, 50) if e["kind"] == "guest.unrecorded"]
    assert [(e["subject"], e["data"]["node"]) for e in told] == [("desk", "node2")]


def test_what_runs_of_a_deleted_vm_is_ended(center: Control) -> None:
    vm = add_vm(center, "desk", VmState.STOPPED)
    with center.transaction() as tx:
        row = tx.session.get_one(Vm, vm.id)
        move(row, VmState.DELETING)
        move(row, VmState.DELETED)
        row.deleted_at = now()
    guest = {"vm_id": vm.id, "state": "running", "cpu_percent": 0.0, "console_clients": 0}
    take_sample(center, {"node": "node1", "at": time.time() + 0.1, "guests": [guest]})
    assert messages(center, quick_queue("east", "node1")) == [], "its deletion may have ended it since"
    for seconds in (60, 61):
        take_sample(center, {"node": "node1", "at": time.time() + seconds, "guests": [guest]})
    assert messages(center, quick_queue("east", "node1")) == [{"vm_id": vm.id, "mac": vm.mac}] * 2
    assert [e["subject"] for e in list_events(center, 50) if e["kind"] == "guest.left"] == ["desk"]


# --- the rebuild


def test_after_a_rebuild_a_start_goes_on_where_its_guest_was_seen(center: Control) -> None:
    """Redis alone knew that node2 does it: anywhere else a second attempt would find neither guest nor claim."""
    vm = add_vm(center, "desk", VmState.STOPPED)
    operation = vm_control.start(center, "desk", Asked())
    center.reservations.epoch._link.client.flushall()
    with center.store.session() as session:
        (step,) = session.scalars(select(Step).where(Step.operation_id == operation.id))
        step.published_at = now() - timedelta(minutes=1)
    run_id = center.reservations.epoch.run_id()
    seen = {"vm_id": vm.id, "state": "running", "console_port": 20000, "ip": "10.9.1.2", "step": step.id}
    rebuild.take_report(center, {"run_id": run_id, "node": "node1", "guests": []})
    rebuild.take_report(center, {"run_id": run_id, "node": "node2", "guests": [seen]})
    assert rebuild.reservation_sweep(center) == "rebuilt"
    assert recovery_sweep(center)["new_attempt"] == 1
    with center.store.read() as session:
        again = session.get_one(Step, step.id)
        assert (again.attempt, again.node, again.sent_to) == (2, "node2", direct_queue("east", "node2"))
    assert claims(center) == {(vm.id, "node2", "10.9.1.2")}


def test_a_rebuild_keeps_what_a_silent_or_left_node_holds(center: Control) -> None:
    there = running(center, "there", "node1")
    gone = running(center, "gone", "node2")
    before = claims(center)
    with center.store.session() as session:
        row = session.get(ServerNode, "node2")
        assert row is not None
        move(row, ServerNodeState.LEFT)  # its worker was stopped in order; its guests run on
    port = {c.vm: c.port for c in center.reservations.pool.claims("east")}[there.id]
    report = {"node": "node1", "guests": [{"vm_id": there.id, "state": "running", "console_port": port, "ip": ""}]}
    center.reservations.rebuild(rebuild.snapshot(center, {"node1": report}))
    assert claims(center) == before, "also the IP of a guest whose DHCP host entry was not reported"
    assert {c.vm for c in center.reservations.pool.claims("east")} == {there.id, gone.id}


def test_a_rebuild_keeps_the_claim_of_a_vm_that_is_just_starting(center: Control) -> None:
    """Redis restarted and lost its epoch, not the step: the executor goes on, and must go on owning its IP."""
    vm = add_vm(center, "desk", VmState.STOPPED)
    vm_control.start(center, "desk", Asked())
    placed = place(center, vm.id, "node1")
    idle = add_vm(center, "idle", VmState.STOPPED)
    place(center, idle.id, "node1", step="forgotten")
    empty: dict[str, Any] = {name: {"node": name, "guests": []} for name in SUBNETS}
    center.reservations.rebuild(rebuild.snapshot(center, empty))
    assert claims(center) == {(vm.id, "node1", placed.ip)}


# --- starts and migrations


def start_without_libvirt(center: Control, tmp_path: Path, step: Step) -> None:
    """Run the start's step as node1, whose libvirtd is gone."""
    config = center.settings.model_copy(update={"storage_root": tmp_path, "state_dir": tmp_path})
    hosts = HostPool("qemu+tcp://127.0.0.1:1/system", timeout_s=0.3)
    ctx = NodeContext(config, center.celery, center.reservations, hosts, Spool(tmp_path / "spool"))
    center.reservations.steps.claim(step.id, 1, "me", "node1", 9)
    run = Run(
        ctx,
        step.id,
        1,
        step.operation_id,
        "me",
        lambda _text: None,
        time.monotonic() + 60,
        "east",
        time.monotonic() + 600,
    )
    node_start.start(run, step.spec)


def test_a_start_that_cannot_look_what_it_left_is_unknown(center: Control, tmp_path: Path) -> None:
    """libvirtd is gone: the claim stays, since a guest may run under it."""
    vm = add_vm(center, "desk", VmState.STOPPED)
    step = only_step(center, vm_control.start(center, "desk", Asked(), pin="node1").id)
    with pytest.raises(OutcomeUnknown):
        start_without_libvirt(center, tmp_path, step)
    assert [c.node for c in center.reservations.pool.claim_of(vm.id)] == ["node1"]


@pytest.mark.parametrize("alive", [True, False])
def test_a_start_handed_to_a_node_that_died_goes_elsewhere(center: Control, tmp_path: Path, alive: bool) -> None:
    vm = add_vm(center, "desk", VmState.STOPPED)
    step = only_step(center, vm_control.start(center, "desk", Asked()).id)
    place(center, vm.id, "node2", step=step.id)  # by the executor that handed it over
    if alive:
        center.reservations.leases.grant("node", "node2", "i", 60)
    with pytest.raises(HandOver if alive else OutcomeUnknown):
        start_without_libvirt(center, tmp_path, step)
    where = [c.node for c in center.reservations.pool.claim_of(vm.id)]
    assert where == (["node2"] if alive else ["node1"])


def test_a_start_called_off_after_its_hand_over_gives_its_claim_back(center: Control) -> None:
    vm = add_vm(center, "desk", VmState.STOPPED)
    operation = vm_control.start(center, "desk", Asked())
    step = only_step(center, operation.id)
    place(center, vm.id, "node2", step=step.id)
    error = {"code": "cancelled", "message": "cancelled before it began", "next": "", "details": {}}
    at = time.time()
    settle(center, {"step": step.id, "attempt": 1, "node": "node2", "started_at": at, "ended_at": at, "error": error})
    assert show(center, operation.id)["state"] == "cancelled"
    assert center.reservations.pool.claim_of(vm.id) == []


def test_a_vm_without_another_server_node_does_not_migrate(center: Control) -> None:
    running(center, "desk", "node1")
    with center.store.session() as session:
        row = session.get(ServerNode, "node2")
        assert row is not None
        move(row, ServerNodeState.LOST)
    with pytest.raises(WrongState, match="no other server node"):
        control_migrate.migrate(center, "desk", Asked())


def test_a_migration_does_not_wait_long_for_room(center: Control) -> None:
    running(center, "desk", "node1")
    operation = control_migrate.migrate(center, "desk", Asked())
    step = only_step(center, operation.id)
    assert (step.deadline_at - step.created_at).total_seconds() <= control_migrate.PATIENCE_S


def sampled(control: Control, *guests: tuple[str, str, str]) -> None:
    """Both server nodes were sampled just now; ``guests``: (server node, VM's id, state)."""
    for name in SUBNETS:
        seen = [{"vm_id": vm_id, "state": state} for node, vm_id, state in guests if node == name]
        sample = {"node": name, "at": time.time() + 1, "host": {}, "storage": {}, "guests": seen}
        control.reservations.samples.write(sample, kept=5, ttl_s=60)


def repaired(control: Control, check: str) -> dict[str, Any]:
    return next(row for row in doctor(control, repair=True) if row["check"] == check)


def test_doctor_settles_failed_vms_by_what_their_server_nodes_see(center: Control) -> None:
    there, gone, unseen = (running(center, name, "node1") for name in ("there", "gone", "unseen"))
    with center.store.session() as session:
        for vm in (there, gone, unseen):
            record = session.get(Vm, vm.id)
            assert record is not None
            move(record, VmState.MIGRATING)
            move(record, VmState.FAILED)
    assert not next(row for row in doctor(center) if row["check"] == "VMs")["ok"]
    assert "left alone" in repaired(center, "VMs")["repaired"], "nobody has looked yet"
    sampled(center, ("node1", there.id, "running"), ("node2", unseen.id, "running"))
    row = repaired(center, "VMs")
    assert not row["ok"], "a guest elsewhere than recorded is for an operator"
    assert "unseen" in row["message"] and "there" not in row["message"].split("operator")[1]
    with center.store.read() as session:
        states = {vm.name: vm.state for vm in session.query(Vm)}
    assert states == {"there": VmState.RUNNING, "gone": VmState.STOPPING, "unseen": VmState.FAILED}


def test_doctor_gives_back_what_nobody_owns(center: Control) -> None:
    center.reservations.macs.take("nobody")
    assert not next(row for row in doctor(center) if row["check"] == "reservations")["ok"]
    row = repaired(center, "reservations")
    assert (row["ok"], row["repaired"]) == (True, "given back: 1")
