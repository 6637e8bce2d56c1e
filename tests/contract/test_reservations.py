"""Reservations against a real Redis: what each promises, one by one."""

from __future__ import annotations

import ipaddress
import time

import pytest

from hdcs_tasks.errors import Conflict, Invalid, NoCapacity, NotFound
from hdcs_tasks.reservations import (
    ClaimAnswer,
    PlaceRequest,
    PoolNode,
    Reservations,
)

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
