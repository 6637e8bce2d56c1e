"""Reservations against a real Redis: what each promises, one by one."""

from __future__ import annotations

import ipaddress
import time
from dataclasses import replace

import pytest

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import Conflict, Invalid, NoCapacity, NotFound, RebuildPending, Unreachable
from hdcs_tasks.reservations import (
    Addresses,
    Claim,
    ClaimAnswer,
    Fence,
    MixEntry,
    Placed,
    PlaceRequest,
    PoolNode,
    PoolSnapshot,
    Reservations,
    Snapshot,
)
from tests.services import RedisServer, free_port

pytestmark = pytest.mark.contract


def request(vm: str, step: str = "s1", **more: object) -> PlaceRequest:
    facts = {"domain_node": "east", "vcpus": 2, "memory_mib": 1024, "console_port": False, "ip": False} | more
    return PlaceRequest(vm=vm, step=step, **facts)  # type: ignore[arg-type]


# ---- leases and steps


def test_lease_has_one_living_holder(reservations: Reservations) -> None:
    leases = reservations.leases
    assert leases.grant("node", "n1", "a", 30)
    assert leases.grant("node", "n1", "a", 30)
    assert not leases.grant("node", "n1", "b", 30)
    assert not leases.renew("node", "n1", "b", 30)
    assert not leases.drop("node", "n1", "b")
    assert leases.holders("node", ["n1", "n2"]) == {"n1": "a", "n2": None}
    assert leases.drop("node", "n1", "a")
    assert leases.grant("node", "n1", "b", 0.05)
    time.sleep(0.1)
    assert leases.holder("node", "n1") is None
    assert not leases.renew("node", "n1", "b", 30)
    assert leases.grant("node", "n1", "a", 30)


def test_step_attempt_has_one_executor(reservations: Reservations) -> None:
    steps = reservations.steps
    assert steps.claim("s", 1, "a", "n1", 30) is ClaimAnswer.MISSING
    assert steps.issue("s", 1)
    assert not steps.issue("s", 1)
    assert not steps.issue("s", 0)
    assert steps.claim("s", 2, "a", "n1", 30) is ClaimAnswer.STALE
    assert steps.claim("s", 1, "a", "n1", 30) is ClaimAnswer.CLAIMED
    assert steps.claim("s", 1, "a", "n1", 30) is ClaimAnswer.CLAIMED
    assert steps.claim("s", 1, "b", "n2", 30) is ClaimAnswer.TAKEN
    assert steps.check("s", 1, "a") == "ok"
    assert steps.check("s", 1, "b") == "lost"
    assert steps.progress("s", 1, "a", 45, "disk", 12)
    assert not steps.progress("s", 1, "b", 99, "disk")
    status = steps.status("s")
    assert status is not None
    assert (status.attempt, status.holder, status.node, status.leased) == (1, "a", "n1", True)
    assert (status.percent, status.phase, status.eta_s, status.done) == (45, "disk", 12, False)
    assert steps.finish("s", 1, "a")
    assert steps.finish("s", 1, "a")  # the answer was lost, asked again
    assert not steps.finish("s", 1, "b")
    assert steps.check("s", 1, "a") == "lost"
    assert steps.claim("s", 1, "b", "n2", 30) is ClaimAnswer.DONE
    assert steps.issue_many([("s", 2, ""), ("t", 1, ""), ("t", 1, "")]) == [True, True, False]
    assert [s and s.attempt for s in steps.statuses(["s", "t", "u"])] == [2, 1, None]


def test_a_closed_step_is_nobodys(reservations: Reservations) -> None:
    steps = reservations.steps
    steps.issue("s", 1)
    steps.claim("s", 1, "a", "n1", 30)
    steps.close("s", 1)
    assert steps.check("s", 1, "a") == "lost"
    assert not steps.issue("s", 1)  # whoever was to send it was away for long
    assert steps.claim("s", 1, "b", "n2", 30) is ClaimAnswer.STALE


def test_newer_attempt_silences_the_old_executor(reservations: Reservations) -> None:
    steps = reservations.steps
    steps.issue("s", 1)
    steps.claim("s", 1, "a", "n1", 30)
    assert steps.issue("s", 2, node="n1")
    status = steps.status("s")
    assert status is not None
    assert (status.holder, status.node, status.leased) == (None, "n1", False)
    assert steps.check("s", 1, "a") == "lost"
    assert not steps.renew("s", 1, "a", 30)
    assert not steps.finish("s", 1, "a")
    assert not steps.hand_over("s", 1, "a")
    assert steps.claim("s", 1, "a", "n1", 30) is ClaimAnswer.STALE


def test_hand_over_and_cancel(reservations: Reservations) -> None:
    steps = reservations.steps
    steps.issue("s", 1)
    steps.claim("s", 1, "a", "n1", 30)
    assert not steps.hand_over("s", 1, "b")
    assert steps.hand_over("s", 1, "a")
    assert steps.hand_over("s", 1, "a")  # the answer was lost, asked again
    assert steps.check("s", 1, "a") == "lost"
    assert steps.claim("s", 1, "b", "n2", 30) is ClaimAnswer.CLAIMED
    assert not steps.hand_over("s", 1, "a")
    assert steps.request_cancel("s", 1)
    assert steps.check("s", 1, "b") == "cancel"
    assert not steps.request_cancel("none", 1)
    steps.issue("t", 1)
    steps.request_cancel("t", 1)
    assert steps.claim("t", 1, "a", "n1", 30) is ClaimAnswer.CANCELLED


def test_lease_of_a_step_ends_and_can_be_taken_up_again(reservations: Reservations) -> None:
    steps = reservations.steps
    steps.issue("s", 1)
    steps.claim("s", 1, "a", "n1", 0.05)
    time.sleep(0.1)
    status = steps.status("s")
    assert status is not None
    assert not status.leased
    assert steps.claim("s", 1, "b", "n2", 30) is ClaimAnswer.TAKEN  # only a new attempt frees it
    assert steps.renew("s", 1, "a", 30)
    steps.ack("s", 1)
    assert steps.acked([("s", 1), ("s", 2)]) == [True, False]
    assert steps.acked([]) == []


# ---- names


def test_mac_is_unique_and_kept(reservations: Reservations) -> None:
    macs = reservations.macs
    taken = {f"vm{i}": macs.take(f"vm{i}") for i in range(300)}
    assert len(set(taken.values())) == 300
    assert all(mac.startswith("52:54:00:") and len(mac) == 17 for mac in taken.values())
    assert macs.take("vm7") == taken["vm7"]
    assert macs.owner(taken["vm7"]) == "vm7"
    assert macs.release("vm7")
    assert not macs.release("vm7")
    assert macs.owner(taken["vm7"]) is None


def test_mac_collision_is_drawn_again(reservations: Reservations, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reservations.macs.take("a")
    draws = iter([first, first, "52:54:00:00:00:01"])
    monkeypatch.setattr(reservations.macs, "propose", lambda: next(draws))
    assert reservations.macs.take("b") == "52:54:00:00:00:01"


def test_subnets_are_disjoint_and_lowest_first(reservations: Reservations) -> None:
    subnets = reservations.subnets
    assert subnets.take("n1", "10.128.0.0/12", 22) == "10.128.0.0/22"
    assert subnets.take("n2", "10.128.0.0/12", 22) == "10.128.4.0/22"
    assert subnets.take("n1", "10.128.0.0/12", 22) == "10.128.0.0/22"
    assert subnets.take("n3", "10.128.0.0/12", 24) == "10.128.8.0/24"
    assert subnets.take("n4", "10.128.0.0/12", 22) == "10.128.12.0/22"  # not over n3's smaller one
    subnets.release("n1")
    assert subnets.take("n5", "10.128.0.0/12", 22) == "10.128.0.0/22"
    networks = [ipaddress.ip_network(s) for s in subnets.all().values()]
    assert not any(a.overlaps(b) for a in networks for b in networks if a is not b)
    subnets.take("m1", "192.168.0.0/29", 30)
    subnets.take("m2", "192.168.0.0/29", 30)
    with pytest.raises(NoCapacity):
        subnets.take("m3", "192.168.0.0/29", 30)
    with pytest.raises(Invalid):
        subnets.take("m4", "10.128.0.0/12", 8)


def test_port_ranges_never_overlap(reservations: Reservations) -> None:
    ports = reservations.ports
    assert ports.allot_range("east", 20000, 20099, 40) == (20000, 20039)
    assert ports.allot_range("west", 20000, 20099, 40) == (20040, 20079)
    assert ports.allot_range("east", 20000, 20099, 40) == (20000, 20039)
    with pytest.raises(NoCapacity):
        ports.allot_range("north", 20000, 20099, 40)
    with pytest.raises(Conflict, match="west"):
        ports.set_range("south", 20079, 20090)
    ports.set_range("south", 20080, 20099)
    with pytest.raises(NotFound):
        ports.take("nowhere", "vm")


def test_port_is_kept_cooled_and_reclaimed(reservations: Reservations) -> None:
    ports = reservations.ports
    ports.set_range("east", 20000, 20002)
    assert [ports.take("east", f"vm{i}") for i in range(3)] == [20000, 20001, 20002]
    assert ports.take("east", "vm1") == 20001
    with pytest.raises(NoCapacity):
        ports.take("east", "vm3")
    assert ports.cool("east", "vm1", 60)
    assert not ports.cool("east", "vm9", 60)
    assert ports.usage("east") == (2, 1, 0)
    assert ports.reclaim("east") == 0
    with pytest.raises(NoCapacity):
        ports.take("east", "vm3")
    assert ports.take("east", "vm1") == 20001  # its own, taken back while it cools
    assert ports.usage("east") == (3, 0, 0)
    ports.cool("east", "vm1", 0)
    ports.cool("east", "vm2", 0)
    time.sleep(0.01)
    assert ports.take("east", "vm3") in (20001, 20002)  # ripe: given without waiting for the sweep
    assert ports.reclaim("east") == 1
    assert ports.usage("east") == (2, 0, 1)


def test_widening_a_port_range_keeps_owners(reservations: Reservations) -> None:
    ports = reservations.ports
    ports.set_range("east", 20010, 20012)
    taken = {ports.take("east", f"vm{i}") for i in range(3)}
    ports.set_range("east", 20008, 20014)
    taken |= {ports.take("east", f"vm{i}") for i in range(3, 7)}
    assert taken == set(range(20008, 20015))


def test_port_of_a_claim_is_not_reclaimed(reservations: Reservations) -> None:
    ports, pool = reservations.ports, reservations.pool
    ports.set_range("east", 20000, 20000)
    pool.put_node("east", PoolNode("n1", 8, 8192))
    assert pool.place(request("a", console_port=True)).port == 20000
    ports.cool("east", "a", 0)  # too early: somebody still runs it
    time.sleep(0.01)
    with pytest.raises(NoCapacity):
        ports.take("east", "b")
    assert ports.reclaim("east") == 0
    pool.release("east", "a", "n1", 0, port_cooling_s=0)


def test_disks_are_promised_within_the_limit(reservations: Reservations) -> None:
    disks = reservations.disks
    disks.claim("east", "a", 6 * 2**40, 10 * 2**40)
    disks.claim("east", "a", 6 * 2**40, 10 * 2**40)
    assert disks.used("east") == 6 * 2**40
    with pytest.raises(NoCapacity):
        disks.claim("east", "b", 4 * 2**40 + 1, 10 * 2**40)
    disks.claim("east", "b", 4 * 2**40, 10 * 2**40)
    with pytest.raises(NoCapacity):
        disks.claim("east", "a", 7 * 2**40, 10 * 2**40)
    disks.claim("east", "a", 5 * 2**40, 10 * 2**40)
    assert disks.release("east", "b")
    assert not disks.release("east", "b")
    assert disks.used("east") == 5 * 2**40


# ---- the pool


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


# ---- loss


def fill(reservations: Reservations) -> None:
    reservations.ports.set_range("east", 20000, 20099)
    reservations.subnets.take("n1", "10.128.0.0/12", 22)
    reservations.pool.put_node("east", PoolNode("n1", 64, 65536, "10.128.0.0/22"))
    reservations.pool.put_node("east", PoolNode("n2", 64, 65536, "10.128.4.0/22", tags=("gpu",)))
    for i in range(20):
        reservations.pool.place(request(f"vm{i}", console_port=True, ip=True, mac=True))
        reservations.disks.claim("east", f"vm{i}", 1 << 30, 1 << 40)
    reservations.pool.place(request("vm3", "s2", exclude=("n1",), ip=True, console_port=True))


def test_after_a_restart_allocation_waits_for_the_rebuild(own_redis: RedisServer) -> None:
    reservations = Reservations.from_settings(Settings(redis_url=own_redis.url))
    with pytest.raises(RebuildPending):
        reservations.macs.take("a")  # never opened
    reservations.epoch.open()
    fill(reservations)
    before = reservations.dump()
    own_redis.restart()
    assert not reservations.epoch.is_open()
    for allocate in (
        lambda: reservations.macs.take("x"),
        lambda: reservations.subnets.take("x", "10.128.0.0/12", 22),
        lambda: reservations.ports.take("east", "x"),
        lambda: reservations.ports.set_range("west", 30000, 30100),
        lambda: reservations.disks.claim("east", "x", 1, 1 << 40),
        lambda: reservations.pool.place(request("x")),
    ):
        with pytest.raises(RebuildPending):
            allocate()
    assert reservations.leases.grant("node", "n1", "a", 30)  # leases and steps go on
    reservations.rebuild(before)
    assert reservations.epoch.is_open()
    assert reservations.dump() == before
    assert reservations.pool.place(request("x", console_port=True, ip=True)).port == 20020


def test_rebuild_after_everything_was_lost(own_redis: RedisServer) -> None:
    reservations = Reservations.from_settings(Settings(redis_url=own_redis.url))
    reservations.epoch.open()
    fill(reservations)
    before, views = reservations.dump(), reservations.pool.nodes("east")
    own_redis.wipe()
    own_redis.start()
    with pytest.raises(RebuildPending):
        reservations.pool.place(request("x"))
    reservations.pool.put_node("east", PoolNode("n9", 1, 1, "10.128.8.0/22"))  # joined before the rebuild: stays
    reservations.rebuild(before)
    after = reservations.pool.nodes("east")
    assert [n for n in after if n.name != "n9"] == views
    assert [n.name for n in after] == ["n1", "n2", "n9"]
    ips = {c.ip for c in reservations.pool.claims("east")}
    assert reservations.pool.place(request("x", ip=True)).ip not in ips
    reservations.pool.release("east", "vm5", "n1", 0)
    reservations.pool.release("east", "vm3", "n1", 0)


def test_rebuild_lets_ports_of_stopped_vms_cool(reservations: Reservations) -> None:
    fill(reservations)
    reservations.pool.release("east", "vm5", "n1", 0, port_cooling_s=60)
    before = reservations.dump()
    reservations.rebuild(before, port_cooling_s=0)
    assert reservations.ports.usage("east") == (19, 1, 80)
    time.sleep(0.01)
    assert reservations.ports.reclaim("east") == 1


def test_rebuild_over_a_restart_stays_closed(own_redis: RedisServer) -> None:
    reservations = Reservations.from_settings(Settings(redis_url=own_redis.url))
    old = reservations.epoch.run_id()
    own_redis.restart()
    reservations.epoch.open(old)
    assert not reservations.epoch.is_open()
    with pytest.raises(RebuildPending):
        reservations.macs.take("a")


def test_rebuild_refuses_a_thing_with_two_owners(reservations: Reservations) -> None:
    fill(reservations)
    before = reservations.dump()
    with pytest.raises(Invalid, match="MAC"):
        reservations.rebuild(Snapshot({"a": "52:54:00:00:00:01", "b": "52:54:00:00:00:01"}))
    with pytest.raises(Invalid, match="port"):
        reservations.rebuild(Snapshot(pools={"east": PoolSnapshot(1, 9, ports={"a": 5, "b": 5})}))
    assert reservations.dump() == before
    assert reservations.epoch.is_open()


def test_rebuild_fills_the_gaps(reservations: Reservations) -> None:
    node = PoolNode("n1", 64, 65536, "10.128.0.0/29")
    claims = (Claim("east", "a", "n1", 1, 1, 20002, "10.128.0.4", "s"),)
    reservations.rebuild(Snapshot(pools={"east": PoolSnapshot(20000, 20003, (node,), claims, {"a": 20002})}))
    placed = [reservations.pool.place(request(f"v{i}", ip=True, console_port=True)) for i in range(3)]
    assert sorted(p.port for p in placed) == [20000, 20001, 20003]
    placed.append(reservations.pool.place(request("v3", ip=True)))
    assert sorted(p.ip for p in placed) == [f"10.128.0.{i}" for i in (2, 3, 5, 6)]


def test_orphans_are_found(reservations: Reservations) -> None:
    fill(reservations)
    found = reservations.orphans({f"vm{i}" for i in range(19)})
    assert (found.macs, found.ports, found.disks) == (("vm19",), (("east", "vm19"),), (("east", "vm19"),))
    assert [c.vm for c in found.claims] == ["vm19"]
    assert reservations.orphans({f"vm{i}" for i in range(20)}) == ((), (), (), ())


def test_redis_away_is_unreachable() -> None:
    reservations = Reservations.from_settings(Settings(redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    with pytest.raises(Unreachable, match="Redis does not answer"):
        reservations.macs.take("a")
    with pytest.raises(Unreachable):
        reservations.steps.statuses(["a"])


def test_scripts_are_loaded_again_when_redis_forgot_them(reservations: Reservations) -> None:
    reservations.macs.take("a")
    reservations._link.do("SCRIPT", "FLUSH")
    reservations.macs.take("b")
    reservations._link.do("SCRIPT", "FLUSH")
    assert reservations.steps.issue_many([("s", 1, ""), ("t", 1, "")]) == [True, True]
    with pytest.raises(Invalid):
        reservations.steps.issue("a b", 1)


# ---- port, MAC and IP together


def test_addresses_of_many_are_all_three_or_none_and_the_same_when_asked_again(reservations: Reservations) -> None:
    take_many = reservations.addresses.take_many
    reservations.ports.set_range("east", 20000, 20199)
    reservations.pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/25"))  # 125 addresses for guests
    vms = [f"vm{i}" for i in range(150)]
    found = take_many("east", "n1", vms)
    got = [one for one in found if isinstance(one, Addresses)]
    assert len(got) == 125
    for part in ("port", "mac", "ip"):
        assert len({getattr(one, part) for one in got}) == 125
    refused = found[125:]
    assert all(isinstance(one, NoCapacity) and "n1 has no IP" in one.message for one in refused)
    assert reservations.ports.usage("east") == (125, 0, 75)  # the ports of the refused went back
    assert take_many("east", "n1", vms[:125][::-1]) == got[::-1]
    assert reservations.addresses.take("east", "n1", "vm7") == got[7]
    assert reservations.macs.all() == {vm: one.mac for vm, one in zip(vms, got, strict=False)}
    assert all(reservations.macs.owner(one.mac) == vm for vm, one in zip(vms, got, strict=False))


def test_addresses_that_cool_go_back_to_their_vm_only(reservations: Reservations) -> None:
    reservations.ports.set_range("east", 20000, 20001)
    reservations.pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/29"))
    take_many = reservations.addresses.take_many
    a, b = take_many("east", "n1", ["a", "b"])
    for vm in ("a", "b"):
        assert not reservations.pool.release("east", vm, "n1", 0, port_cooling_s=0)  # no claim, but port and IP cool
    time.sleep(0.01)
    # c is first, and both ports are ripe: a's own is not given away in the very call in which a asks for it back.
    c, again = take_many("east", "n1", ["c", "a"])
    assert isinstance(c, Addresses) and isinstance(b, Addresses)
    assert again == a and c.port == b.port
    with pytest.raises(NoCapacity, match="no console port for VM b"):
        reservations.addresses.take("east", "n1", "b")
    assert reservations.pool.nodes("east")[0].free_ips == 3  # a and c hold one each


def test_addresses_draw_a_mac_again_that_is_taken_or_drawn_twice(
    reservations: Reservations, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservations.ports.set_range("east", 20000, 20009)
    reservations.pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/24"))
    draws = iter(["aabbcc" * 3, "aabbcc010101", "020202", "020202", "030303"])
    monkeypatch.setattr("hdcs_tasks.reservations.addresses.random_hex", lambda _size: next(draws))
    found = reservations.addresses.take_many("east", "n1", ["a", "b", "c"])
    one = reservations.addresses.take("east", "n1", "d")
    macs = [got.mac[9:] for got in [*found, one] if isinstance(got, Addresses)]
    assert macs == ["aa:bb:cc", "02:02:02", "01:01:01", "03:03:03"]
    assert reservations.ports.usage("east") == (4, 0, 6)


def test_addresses_where_one_part_is_missing_take_nothing(reservations: Reservations) -> None:
    reservations.ports.set_range("east", 20000, 20009)
    reservations.pool.put_node("east", PoolNode("dry", 8, 8192))
    for _ in range(2):
        with pytest.raises(NoCapacity, match="dry has no IP"):
            reservations.addresses.take("east", "dry", "a")
        with pytest.raises(NoCapacity, match="no console port"):
            reservations.addresses.take("west", "dry", "a")
    assert (reservations.ports.usage("east"), reservations.macs.all()) == ((0, 0, 10), {})


def test_a_subnet_that_changes_gives_only_its_own_addresses(reservations: Reservations) -> None:
    pool = reservations.pool
    reservations.ports.set_range("east", 20000, 20009)
    pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/29"))
    first = pool.place(PlaceRequest("east", "a", "s", 1, 1))
    pool.remove_node("east", "n1", force=True)
    pool.put_node("east", PoolNode("n1", 8, 8192, "10.128.0.0/28"))  # wider; a's claim is still there
    assert pool.nodes("east")[0].free_ips == 12
    ips = {pool.place(PlaceRequest("east", f"b{i}", "s", 1, 1)).ip for i in range(6)}
    assert len(ips) == 6 and first.ip not in ips


def test_packing_keeps_the_last_places_of_the_largest(reservations: Reservations) -> None:
    """Both nodes take the small VM; on the tighter one it would cost a large one its last place but one."""
    mix = (MixEntry(1, 1000, 0.9), MixEntry(2, 4000, 0.1))
    reservations.pool.put_node("east", PoolNode("tight", 8, 4100))
    reservations.pool.put_node("east", PoolNode("odd", 8, 7900))  # one large and 3,900 that no large one can use
    asked = PlaceRequest("east", "a", "s", 1, 1000, console_port=False, ip=False)
    assert reservations.pool.place(asked).node == "tight"
    reservations.pool.release("east", "a", "tight", 0)
    assert reservations.pool.place(replace(asked, mix=mix)).node == "odd"


def test_a_server_node_gives_more_than_a_thousand_addresses(reservations: Reservations) -> None:
    """The default subnet is a /22: all but network, gateway and broadcast."""
    subnet = reservations.subnets.take("n1", Settings().supernet, Settings().subnet_prefix)
    reservations.ports.set_range("east", 20000, 23999)
    reservations.pool.put_node("east", PoolNode("n1", 8, 8192, subnet))
    found = reservations.addresses.take_many("east", "n1", [f"vm{i}" for i in range(1100)])
    ips = {one.ip for one in found if isinstance(one, Addresses)}
    assert len(ips) == 1021
    assert all(ipaddress.IPv4Address(ip) in ipaddress.IPv4Network(subnet) for ip in ips)


def test_a_cancel_meant_for_an_older_attempt_is_not_the_newer_ones(reservations: Reservations) -> None:
    steps = reservations.steps
    steps.issue("s", 1)
    steps.issue("s", 2, node="n1")
    assert not steps.request_cancel("s", 1)
    assert steps.claim("s", 2, "a", "n1", 30) is ClaimAnswer.CLAIMED


def test_a_fenced_release_is_only_the_holders(reservations: Reservations) -> None:
    """An executor that was away for long must not give back what a newer attempt has started on."""
    steps, pool = reservations.steps, reservations.pool
    pool.put_node("east", PoolNode("n1", 8, 8192))
    pool.place(request("a", "s"))
    steps.issue("s", 2)
    steps.claim("s", 2, "new", "n1", 30)
    for old in (Fence("s", 1, "new"), Fence("s", 2, "old"), Fence("t", 2, "new")):
        assert not pool.release("east", "a", "n1", 0, step="s", fence=old)
    assert pool.release("east", "a", "n1", 0, step="s", fence=Fence("s", 2, "new"))
