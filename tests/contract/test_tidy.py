"""What the simulation found: leaks and lost claims, each on a real Redis and a real database."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from hdcs_tasks.clock import new_id, now, now_s
from hdcs_tasks.errors import Conflict
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool.proof import JoinRequest
from hdcs_tasks.pool.rebuild import snapshot
from hdcs_tasks.pool.rooms import vm_shape
from hdcs_tasks.pool.rules import need_of
from hdcs_tasks.pool.tidy import tidy_sweep
from hdcs_tasks.reservations import PlaceRequest
from hdcs_tasks.states import ServerNodeState, VmState
from hdcs_tasks.store.models import Event, ServerNode, Vm
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control_clone import Shape, new_vm

pytestmark = pytest.mark.contract
TOKEN = "token"
FACTS = {"cpu_mhz": 3000, "sockets": 1, "cores_per_socket": 4, "threads_per_core": 1, "max_vcpus": 64,
         "memory_mib": 16000}  # fmt: skip


def join_request(name: str = "node1") -> JoinRequest:
    storage = {"total_bytes": 10**12, "free_bytes": 10**12}
    return JoinRequest("east", name, "10.0.0.1", f"instance-{name}", FACTS, storage, now_s()).signed(TOKEN)


@pytest.fixture
def pool(control: Control) -> Control:
    pool_control.create_domain_node(control, "east", TOKEN)
    pool_control.join(control, join_request())
    return control


def stopped_vm(control: Control, name: str = "desk-1") -> str:
    with control.transaction() as tx:
        vm = new_vm(tx, name, Shape("tiny", 1, 128, 10**9, "off"), "east", image_id=None)
        move(vm, VmState.STOPPED)
        return vm.id


def place(control: Control, vm_id: str) -> Any:
    return control.reservations.pool.place(PlaceRequest("east", vm_id, "step", 1, 400))


def test_a_deleted_vm_leaves_nothing_though_control_died_after_the_commit(pool: Control) -> None:
    vm_id = stopped_vm(pool)
    with pool.transaction() as tx:
        vm = tx.session.get_one(Vm, vm_id)
        move(vm, VmState.DELETING)
        move(vm, VmState.DELETED)
        vm.deleted_at = now()
    assert tidy_sweep(pool) == 2
    assert pool.reservations.macs.all() == {} and pool.reservations.disks.all("east") == {}


def test_what_an_open_transaction_took_is_not_given_back_in_the_first_sweep(pool: Control) -> None:
    stranger = new_id()
    mac = pool.reservations.macs.take(stranger)
    assert tidy_sweep(pool) == 0
    assert pool.reservations.macs.all() == {stranger: mac}
    assert tidy_sweep(pool) == 1
    assert pool.reservations.macs.all() == {}


def test_claims_of_a_resting_vm_go_but_not_while_an_operation_lives(pool: Control) -> None:
    vm_id = stopped_vm(pool)
    place(pool, vm_id)
    with pool.transaction() as tx:
        operation = tx.open("backup.verify", asked=Asked(), vm=tx.session.get_one(Vm, vm_id))
    assert tidy_sweep(pool) == 0
    with pool.transaction() as tx:
        tx.finish(tx.session.merge(operation))
    assert tidy_sweep(pool) == 2
    assert pool.reservations.pool.claims("east") == []
    assert pool.reservations.ports.cooling("east") == {vm_id}


def test_a_rebuild_keeps_the_claim_of_a_start_under_way(pool: Control) -> None:
    vm_id = stopped_vm(pool)
    placed = place(pool, vm_id)
    with pool.transaction() as tx:
        tx.open("vm.start", asked=Asked(), vm=tx.session.get_one(Vm, vm_id))
    reports = {"node1": {"guests": []}}
    found = snapshot(pool, reports).pools["east"]
    assert [(c.vm, c.node, c.port, c.ip) for c in found.claims] == [(vm_id, "node1", placed.port, placed.ip)]


def test_a_rebuild_counts_what_began_to_run_after_the_report(pool: Control) -> None:
    vm_id = stopped_vm(pool)
    placed = place(pool, vm_id)
    with pool.transaction() as tx:
        vm = tx.session.get_one(Vm, vm_id)
        move(vm, VmState.RUNNING)
        vm.server_node, vm.port, vm.ip = "node1", placed.port, placed.ip
    found = snapshot(pool, {"node1": {"guests": []}}).pools["east"]
    assert [(c.vm, c.ip) for c in found.claims] == [(vm_id, placed.ip)]


def test_a_join_that_broke_off_after_its_lease_is_made_again(pool: Control) -> None:
    leases = pool.reservations.leases
    leases.drop("node", "node1", "instance-node1")
    assert pool_control.lease_sweep(pool) == ["node1"]
    leases.grant("node", "node1", "instance-node1", 60)  # the half of a join that came before the record
    assert pool_control.lease_sweep(pool) == []
    assert leases.holder("node", "node1") is None, "the node renews for ever, and is never in the pool again"
    pool_control.join(pool, join_request())
    with pool.store.read() as session:
        assert session.get_one(ServerNode, "node1").state is ServerNodeState.UP


def test_of_two_rebuilds_the_slower_one_writes_nothing(pool: Control) -> None:
    vm_id = stopped_vm(pool)
    reservations = pool.reservations
    reservations.epoch.close()
    run_id = reservations.epoch.run_id()
    slow = reservations.epoch.take_rebuild(run_id)
    old = snapshot(pool, {})
    quick = reservations.epoch.take_rebuild(run_id)
    reservations.rebuild(snapshot(pool, {}), token=quick)
    placed = place(pool, vm_id)
    with pytest.raises(Conflict, match="another control worker"):
        reservations.rebuild(old, token=slow)
    assert reservations.epoch.take_rebuild(run_id) is None
    assert reservations.epoch.is_open()
    assert [claim.ip for claim in reservations.pool.claims("east")] == [placed.ip]


def test_a_rebuild_knows_where_a_migrating_vm_goes_though_redis_is_empty(pool: Control) -> None:
    vm_id = stopped_vm(pool)
    target = {"node": "node1", "port": 20007, "ip": "10.128.0.9", "address": "10.0.0.1"}
    with pool.transaction() as tx:
        tx.open("vm.clone", asked=Asked(), vm=tx.session.get_one(Vm, vm_id), request={"target": target})
    claims = snapshot(pool, {}).pools["east"].claims
    assert [(c.vm, c.node, c.port, c.ip) for c in claims] == [(vm_id, "node1", 20007, "10.128.0.9")]


def test_addresses_held_on_a_lost_server_node_are_not_given_again_when_it_is_back(pool: Control) -> None:
    vm_id = stopped_vm(pool)
    placed = place(pool, vm_id)
    with pool.transaction() as tx:
        tx.open("vm.start", asked=Asked(), vm=tx.session.get_one(Vm, vm_id))
    pool.reservations.leases.drop("node", "node1", "instance-node1")
    pool_control.lease_sweep(pool)
    pool.reservations.rebuild(snapshot(pool, {}))
    pool_control.join(pool, join_request())
    assert place(pool, new_id()).ip != placed.ip


def running_vm(control: Control, name: str = "desk-1") -> tuple[str, Any]:
    vm_id = stopped_vm(control, name)
    with control.transaction() as tx:
        vm = tx.session.get_one(Vm, vm_id)
        need = need_of(vm_shape(vm), control.settings.capacity)
        placed = control.reservations.pool.place(PlaceRequest("east", vm_id, "step", need.vcpus, need.memory_mib))
        move(vm, VmState.RUNNING)
        vm.server_node, vm.port, vm.ip = "node1", placed.port, placed.ip
    return vm_id, placed


def lose(control: Control, vm_id: str) -> None:
    """As a rebuild does that knew of the VM nothing but its record as stopped."""
    empty = control.reservations.dump()
    pool = replace(empty.pools["east"], claims=(), ports={})
    control.reservations.rebuild(replace(empty, pools={"east": pool}))
    assert control.reservations.pool.claim_of(vm_id) == []


def test_a_running_vm_gets_the_place_back_it_lost(pool: Control) -> None:
    vm_id, placed = running_vm(pool)
    before = pool.reservations.dump()
    lose(pool, vm_id)
    with pool.transaction() as tx:
        operation = tx.open("backup.verify", asked=Asked(), vm=tx.session.get_one(Vm, vm_id))
    tidy_sweep(pool)
    assert pool.reservations.pool.claim_of(vm_id) == [], "an operation is at work on it"
    with pool.transaction() as tx:
        tx.finish(tx.session.merge(operation))
    tidy_sweep(pool)
    after = pool.reservations.dump()
    assert after.pools["east"].ports == before.pools["east"].ports
    assert [claim._replace(step="") for claim in before.pools["east"].claims] == list(after.pools["east"].claims)
    (after_claim,) = after.pools["east"].claims
    node = pool.reservations.pool.nodes("east")[0]
    assert (node.vcpus - node.free_vcpus, node.memory_mib - node.free_memory_mib) == (1, after_claim.memory_mib)
    other = place(pool, "another")
    assert other.port != placed.port and other.ip != placed.ip


def test_a_place_that_is_anothers_by_now_is_told_once(pool: Control) -> None:
    vm_id, placed = running_vm(pool)
    lose(pool, vm_id)
    _, other = running_vm(pool, "desk-2")
    assert other.port == placed.port, "nobody knew that it is taken"
    for _ in range(2):
        tidy_sweep(pool)
    assert pool.reservations.pool.claim_of(vm_id) == []
    with pool.store.read() as session:
        told = list(session.scalars(select(Event).where(Event.kind == "vm.conflict")))
    assert [event.subject for event in told] == ["desk-1"]
    assert f"port {placed.port}" in told[0].message


def test_a_rebuild_with_two_on_one_port_leaves_it_to_who_runs(pool: Control) -> None:
    vm_id, placed = running_vm(pool)
    second_id, third_id = stopped_vm(pool, "desk-2"), stopped_vm(pool, "desk-0")
    with pool.transaction() as tx:
        second = tx.session.get_one(Vm, second_id)
        move(second, VmState.RUNNING)
        second.server_node, second.port, second.ip = "node1", placed.port, placed.ip
        tx.session.get_one(Vm, third_id).port = placed.port
    pool.reservations.epoch.close()
    pool.reservations.rebuild(snapshot(pool, {}))
    assert pool.reservations.epoch.is_open()
    claims = pool.reservations.pool.claims("east")
    assert {claim.vm for claim in claims} == {vm_id, second_id}, "capacity counts for both"
    assert sorted((claim.port, claim.ip) for claim in claims) == [(0, ""), (placed.port, placed.ip)]
    assert len(pool.reservations.ports.all("east")) == 1
