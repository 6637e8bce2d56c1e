"""The judgements of the chaos runs can fail: each rule is shown a data center that breaks it, and one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.chaos import invariants
from tests.chaos.invariants import GuestFact, Held, Life, OperationFact, VmFact

VM = VmFact("id-1", "desk", "running", "east", "node1", "mac-1", 20000, "10.0.0.2")
GUEST = GuestFact("id-1", "node1", "running")
HELD = Held(
    macs={"id-1": "mac-1"}, ports={("east", "id-1"): 20000}, disks=[("east", "id-1")],
    claims=[("east", "id-1", "node1", 20000, "10.0.0.2")], ips={("node1", "id-1"): "10.0.0.2"}, node_leases=["node1"],
    used={"node1": (1, 64)}, claimed={"node1": (1, 64)},
)  # fmt: skip


def rules(found: list[invariants.Violation]) -> set[str]:
    return {one["rule"] for one in found}


def test_a_healthy_data_center_breaks_nothing() -> None:
    assert invariants.operations([OperationFact("o", "vm.start", "done"), OperationFact("p", "x", "cancelled")]) == []
    assert invariants.guests([VM], [GUEST]) == []
    assert invariants.reservations([VM], HELD, ["node1"]) == []
    stopped = replace(VM, state="stopped", server_node=None, port=None, ip=None)
    assert invariants.guests([stopped], []) == []
    bare = Held(macs=HELD.macs, disks=HELD.disks)
    assert invariants.reservations([stopped], bare, []) == []


@pytest.mark.parametrize(
    ("fact", "rule"),
    [
        (OperationFact("o", "vm.start", None), "lost operation"),
        (OperationFact("o", "vm.start", "running"), "unsettled operation"),
        (OperationFact("o", "vm.start", "failed", live_steps=1), "step without operation"),
    ],
)
def test_operations(fact: OperationFact, rule: str) -> None:
    assert rules(invariants.operations([fact])) == {rule}


@pytest.mark.parametrize(
    ("vm", "seen", "rule"),
    [
        (replace(VM, state="deleting"), [], "stuck VM"),
        (VM, [], "record without guest"),
        (VM, [GUEST, replace(GUEST, vm_id="id-2")], "guest without record"),
        (VM, [GUEST, replace(GUEST, state="shutoff", vm_id="id-3")], "left definition"),
        (replace(VM, state="stopped", server_node=None), [GUEST], "guest against record"),
    ],
)
def test_guests(vm: VmFact, seen: list[GuestFact], rule: str) -> None:
    assert rules(invariants.guests([vm], seen)) == {rule}


def test_a_guest_on_two_nodes_breaks_two_rules() -> None:
    both = [GUEST, replace(GUEST, node="node2")]
    assert rules(invariants.guests([VM], both)) == {"guest against record", "record without guest"}


@pytest.mark.parametrize(
    ("held", "rule"),
    [
        (replace(HELD, macs={**HELD.macs, "id-9": "mac-9"}), "orphan MAC"),
        (replace(HELD, macs={}), "missing MAC"),
        (replace(HELD, ports={("east", "id-1"): 20001}), "wrong port"),
        (replace(HELD, ips={}), "missing IP"),
        (replace(HELD, claims=[*HELD.claims, ("east", "id-1", "node2", 20000, "10.0.1.2")]), "orphan claim"),
        (replace(HELD, disks=[*HELD.disks, ("west", "id-1")]), "orphan disk promise"),
        (replace(HELD, used={"node1": (2, 64)}), "wrong used amount"),
        (replace(HELD, step_leases=["s"]), "orphan lease"),
        (replace(HELD, node_leases=["node2"]), "orphan lease"),
    ],
)
def test_reservations(held: Held, rule: str) -> None:
    assert rules(invariants.reservations([VM], held, ["node1"])) == {rule}


def test_two_lives_at_once() -> None:
    one, other = Life("v", "node1", 0, 10), Life("v", "node2", 8, 20)
    target = replace(other, incoming=True)
    assert rules(invariants.lives([one, other], {})) == {"ran twice"}
    assert rules(invariants.lives([one, other], {"v": [(7.5, 10.5)]})) == {"ran twice"}, "two starts: never"
    assert rules(invariants.lives([one, target], {})) == {"ran twice"}, "a target outside of a migration"
    assert invariants.lives([one, target], {"v": [(7.5, 10.5)]}) == []
    assert rules(invariants.lives([one, target], {"v": [(0, 5)]})) == {"ran twice"}, "another migration's time"
    assert invariants.lives([one, replace(other, began=10)], {}) == []
    assert invariants.lives([one, replace(other, vm="w")], {}) == []
