"""The pool of a domain node against a real Redis: places, claims, what a refusal says."""

from __future__ import annotations

import time

import pytest

from hdcs_tasks.errors import Conflict, NoCapacity
from hdcs_tasks.reservations import (
    Claim,
    MixEntry,
    Placed,
    PoolNode,
    Reservations,
)
from tests.contract.test_reservations import request

pytestmark = pytest.mark.contract


def test_place_claims_everything_at_once(reservations: Reservations) -> None:
    pool = reservations.pool
    reservations.ports.set_range("east", 20000, 20009)
    pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/22"))
    pool.put_node("east", PoolNode("n2", 8, 4096, "10.128.4.0/22"))
    placed = pool.place(request("a", console_port=True, ip=True, mac=True))
    assert placed == Placed("n2", 20000, "10.128.4.2", reservations.macs.take("a"))  # best fit: the smaller one
    assert pool.place(request("a", console_port=True, ip=True, mac=True)) == placed
    assert pool.claim_of("a") == [Claim("east", "a", "n2", 2, 1024, 20000, "10.128.4.2", "s1")]
    n2 = next(n for n in pool.nodes("east") if n.name == "n2")
    assert (n2.free_vcpus, n2.free_memory_mib, n2.free_ips) == (6, 3072, 1020)
    assert pool.release("east", "a", "n2", 3600)
    assert not pool.release("east", "a", "n2", 3600)
    n2 = next(n for n in pool.nodes("east") if n.name == "n2")
    assert (n2.free_vcpus, n2.free_memory_mib, n2.free_ips) == (8, 4096, 1020)  # the IP cools
    assert pool.claims("east") == []


def test_migrating_vm_holds_two_claims_and_one_port(reservations: Reservations) -> None:
    pool = reservations.pool
    reservations.ports.set_range("east", 20000, 20009)
    for n in (1, 2, 3):
        pool.put_node("east", PoolNode(f"n{n}", 8, 4096 * n, f"10.128.{4 * n}.0/22"))
    first = pool.place(request("a", console_port=True, ip=True))
    second = pool.place(request("a", "s2", exclude=(first.node,), console_port=True, ip=True))
    assert second.node != first.node
    assert (second.port, second.ip != first.ip) == (first.port, True)
    assert pool.place(request("a", "s2", exclude=(first.node,), console_port=True, ip=True)) == second
    with pytest.raises(Conflict, match="n1 and n2"):
        pool.place(request("a", "s3", exclude=("n1", "n2"), console_port=True, ip=True))
    assert pool.release("east", "a", first.node, 0, port_cooling_s=60)
    assert reservations.ports.usage("east").cooling == 0  # it still runs on the other node
    assert pool.release("east", "a", second.node, 0, port_cooling_s=60)
    assert reservations.ports.usage("east").cooling == 1


def test_later_step_finds_the_claim_of_a_vm_never_seen_to_stop(reservations: Reservations) -> None:
    pool = reservations.pool
    for n in (1, 2):
        pool.put_node("east", PoolNode(f"n{n}", 8, 8192))
    first = pool.place(request("a", "s1"))
    assert pool.place(request("a", "s2")) == first
    assert [c.step for c in pool.claim_of("a")] == ["s2"]
    with pytest.raises(Conflict, match="another size"):
        pool.place(request("a", "s3", vcpus=4))


def test_twenty_cpu_full_nodes_are_no_refusal(reservations: Reservations) -> None:
    pool = reservations.pool
    for n in range(20):
        pool.put_node("east", PoolNode(f"full{n}", 1, 4096))
    pool.put_node("east", PoolNode("roomy", 64, 65536))
    assert pool.place(request("a")).node == "roomy"


def test_refusal_explains_every_node(reservations: Reservations) -> None:
    pool = reservations.pool
    pool.put_node("east", PoolNode("n1", 8, 64))
    pool.put_node("east", PoolNode("n2", 8, 8192, schedulable=False))
    pool.put_node("east", PoolNode("n3", 1, 8192))
    pool.put_node("east", PoolNode("n4", 8, 8192))
    pool.put_node("east", PoolNode("n5", 8, 8192, tags=("gpu",)))
    with pytest.raises(NoCapacity) as caught:
        pool.place(request("a", exclude=("n4",), tags=("ssd",)))
    assert str(caught.value) == (
        "no server node of east fits VM a (2 vCPU, 1024 MiB): n1 lacks tag ssd, n2 draining, n3 lacks tag ssd, "
        "n4 excluded, n5 lacks tag ssd. See: hdcs pool capacity"
    )
    with pytest.raises(NoCapacity) as caught:
        pool.place(request("a", exclude=("n4", "n5")))
    assert "n1 64 MiB free, n2 draining, n3 1 vCPU free, n4 excluded, n5 excluded" in str(caught.value)
    assert caught.value.details["counts"] == {"memory": 1, "draining": 1, "vcpus": 1, "excluded": 2}
    assert pool.claims("east") == []
    with pytest.raises(NoCapacity, match="n4 is not the pinned node"):
        pool.place(request("a", pin="n1"))
    assert pool.place(request("a", pin="n5")).node == "n5"


def test_ips_run_out_cool_and_come_back(reservations: Reservations) -> None:
    pool = reservations.pool
    pool.put_node("east", PoolNode("n1", 64, 65536, "10.128.0.0/29"))
    ips = [pool.place(request(f"vm{i}", ip=True)).ip for i in range(5)]
    assert ips == [f"10.128.0.{i}" for i in range(2, 7)]
    with pytest.raises(NoCapacity, match="n1 has no free IP"):
        pool.place(request("x", ip=True))
    pool.release("east", "vm3", "n1", 60)
    with pytest.raises(NoCapacity, match="n1 has no free IP"):
        pool.place(request("x", ip=True))
    assert pool.place(request("vm3", "s2", ip=True)).ip == "10.128.0.5"  # its own, while it cools
    pool.release("east", "vm1", "n1", 0)
    time.sleep(0.01)
    assert pool.place(request("x", ip=True)).ip == "10.128.0.3"
    with pytest.raises(Conflict, match="subnet"):
        pool.put_node("east", PoolNode("n1", 64, 65536, "10.128.8.0/29"))


def test_no_port_means_nothing_is_claimed(reservations: Reservations) -> None:
    pool = reservations.pool
    pool.put_node("east", PoolNode("n1", 64, 65536, "10.128.0.0/22"))
    with pytest.raises(NoCapacity, match="range"):
        pool.place(request("a", console_port=True, ip=True, mac=True))
    reservations.ports.set_range("east", 20000, 20000)
    pool.place(request("a", console_port=True, ip=True))
    with pytest.raises(NoCapacity, match="console ports"):
        pool.place(request("b", console_port=True, ip=True))
    node = pool.nodes("east")[0]
    assert (node.free_vcpus, node.free_memory_mib) == (62, 64512)
    time.sleep(0.01)
    assert pool.nodes("east")[0].free_ips == 1020
    assert reservations.macs.all() == {}


def test_starts_under_way_are_bounded(reservations: Reservations) -> None:
    pool = reservations.pool
    pool.put_node("east", PoolNode("n1", 64, 65536, max_starts=2))
    pool.place(request("a"))
    pool.place(request("b"))
    with pytest.raises(NoCapacity, match="starts under way"):
        pool.place(request("c"))
    pool.started("east", "n1", "a")
    pool.place(request("c", start_s=0.05))
    time.sleep(0.1)
    pool.place(request("d"))


def test_totals_change_with_claims_accounted(reservations: Reservations) -> None:
    pool = reservations.pool
    pool.put_node("east", PoolNode("n1", 8, 8192))
    pool.place(request("a"))
    pool.put_node("east", PoolNode("n1", 1, 512))
    node = pool.nodes("east")[0]
    assert (node.free_vcpus, node.free_memory_mib) == (-1, -512)
    with pytest.raises(NoCapacity):
        pool.place(request("b"))
    pool.put_node("east", PoolNode("n1", 16, 16384))
    assert pool.nodes("east")[0].free_vcpus == 14
    with pytest.raises(Conflict, match="east"):
        pool.put_node("west", PoolNode("n1", 16, 16384))
    with pytest.raises(Conflict, match="holds 1 VMs: a"):
        pool.remove_node("east", "n1")
    pool.remove_node("east", "n1", force=True)
    assert pool.nodes("east") == []
    pool.put_node("east", PoolNode("n1", 16, 16384))
    assert pool.nodes("east")[0].free_vcpus == 14  # the claim outlived the node's registration
    pool.release("east", "a", "n1", 0)
    pool.remove_node("east", "n1")


def test_spread_and_mix_choose_otherwise(reservations: Reservations) -> None:
    pool = reservations.pool
    pool.put_node("east", PoolNode("small", 4, 2048))
    pool.put_node("east", PoolNode("big", 64, 65536))
    assert pool.place(request("a", order="spread")).node == "big"
    assert pool.place(request("b")).node == "small"
    pool.put_node("west", PoolNode("w1", 2, 2100))
    pool.put_node("west", PoolNode("w2", 9, 4500))
    mix = (MixEntry(2, 2048, 1.0),)  # on w1 such a VM would be lost; w2 has memory for two and keeps room for both
    assert pool.place(request("c", domain_node="west", vcpus=1, memory_mib=400, mix=mix)).node == "w2"


def test_capacity_counts_and_names_the_limit(reservations: Reservations) -> None:
    pool = reservations.pool
    pool.put_node("east", PoolNode("n1", 8, 65536))
    pool.put_node("east", PoolNode("n2", 64, 4096, "10.128.0.0/30"))
    pool.put_node("east", PoolNode("n3", 64, 4096, schedulable=False))
    found = pool.capacity("east", 2, 1024)
    assert found == {"n1": (4, "vcpus"), "n2": (1, "ips"), "n3": (0, "draining"), "": (5, "server nodes")}
    assert pool.capacity("east", 2, 1024, free_ports=3)[""] == (3, "ports")
