"""What must hold after the faults have stopped: pure judgements over facts, the same for a real and a simulated run.

Every function takes plain values and returns violations: ``{"rule", "subject", "what"}``. None of them looks at
anything; ``checker.py`` collects the facts of a lab.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Violation = dict[str, str]

RESTING = frozenset({"stopped", "running", "suspended", "saved", "failed", "deleted"})
HOLDS_GUEST = frozenset({"running", "suspended"})


def violation(rule: str, subject: str, what: str) -> Violation:
    return {"rule": rule, "subject": subject, "what": what}


@dataclass(frozen=True)
class VmFact:
    """A living VM as the record has it."""

    id: str
    name: str
    state: str
    home: str
    server_node: str | None
    mac: str
    port: int | None
    ip: str | None


@dataclass(frozen=True)
class GuestFact:
    """A guest as the hypervisor of one server node has it. ``state``: running | paused | shutoff | …"""

    vm_id: str
    node: str
    state: str

    @property
    def active(self) -> bool:
        return self.state in ("running", "paused")


@dataclass(frozen=True)
class OperationFact:
    """An acknowledged operation. ``state`` None: the ledger does not know it."""

    id: str
    kind: str
    state: str | None
    phase: str = ""
    live_steps: int = 0


@dataclass(frozen=True)
class Held:
    """Reservations as they stand. Cooling ports and IPs are owned by nobody and not listed."""

    macs: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[tuple[str, str], int] = field(default_factory=dict)
    disks: Collection[tuple[str, str]] = ()
    claims: Collection[tuple[str, str, str, int, str]] = ()
    ips: Mapping[tuple[str, str], str] = field(default_factory=dict)
    step_leases: Collection[str] = ()
    node_leases: Collection[str] = ()
    used: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    claimed: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def operations(known: Iterable[OperationFact]) -> list[Violation]:
    """Every acknowledged operation is in the ledger, has ended, and left no step that waits."""
    found = []
    for one in known:
        if one.state is None:
            found.append(violation("lost operation", one.id, f"{one.kind} was acknowledged, the ledger has it not"))
        elif one.state not in ("done", "failed", "cancelled"):
            found.append(violation("unsettled operation", one.id, f"{one.kind} is {one.state}: {one.phase}"))
        elif one.live_steps:
            found.append(violation("step without operation", one.id, f"{one.kind} ended, {one.live_steps} steps live"))
    return found


def guests(vms: Sequence[VmFact], seen: Iterable[GuestFact]) -> list[Violation]:
    """VMs rest; what the record says runs does run, there and nowhere else; nothing runs without record."""
    by_id = {vm.id: vm for vm in vms}
    found = [violation("stuck VM", vm.name, f"is {vm.state}") for vm in vms if vm.state not in RESTING]
    active: dict[str, list[GuestFact]] = {}
    for guest in seen:
        vm = by_id.get(guest.vm_id)
        if not guest.active:
            found.append(violation("left definition", guest.vm_id, f"{guest.state} on {guest.node}"))
            continue
        active.setdefault(guest.vm_id, []).append(guest)
        if vm is None:
            found.append(violation("guest without record", guest.vm_id, f"runs on {guest.node}"))
        elif vm.state not in (*HOLDS_GUEST, "failed") or vm.server_node != guest.node:
            found.append(violation("guest against record", vm.name,
                                   f"runs on {guest.node}; recorded {vm.state} on {vm.server_node}"))  # fmt: skip
    for vm in vms:
        count = len(active.get(vm.id, []))
        if vm.state in HOLDS_GUEST and count != 1:
            found.append(violation("record without guest", vm.name, f"{vm.state} on {vm.server_node}, {count} guests"))
    return found


def reservations(vms: Sequence[VmFact], held: Held, nodes_up: Collection[str]) -> list[Violation]:
    """Exactly what the record says is owned, by its owner; no lease outlives its work."""
    holders = {vm.id: vm for vm in vms if vm.state in HOLDS_GUEST}
    unsure = {vm.id for vm in vms if vm.state == "failed"}
    wanted_macs = {vm.id: vm.mac for vm in vms}
    wanted_disks = {(vm.home, vm.id) for vm in vms}
    ports = {key: port for key, port in held.ports.items() if key[1] not in unsure}
    wanted_ports = {(vm.home, vm.id): vm.port or 0 for vm in holders.values()}
    claims = {c for c in held.claims if c[1] not in unsure}
    wanted_claims = {(vm.home, vm.id, vm.server_node or "", vm.port or 0, vm.ip or "") for vm in holders.values()}
    ips = {key: ip for key, ip in held.ips.items() if key[1] not in unsure}
    wanted_ips = {(vm.server_node or "", vm.id): vm.ip or "" for vm in holders.values()}
    return [
        *_differ("MAC", held.macs, wanted_macs), *_differ("port", ports, wanted_ports), *_differ("IP", ips, wanted_ips),
        *_differ("disk promise", dict.fromkeys(held.disks, ""), dict.fromkeys(wanted_disks, "")),
        *_differ("claim", dict.fromkeys(claims, ""), dict.fromkeys(wanted_claims, "")),
        *_differ("used amount", held.used, held.claimed),
        *[violation("orphan lease", step, "an executor's lease outlived its operation") for step in held.step_leases],
        *[violation("orphan lease", node, "of a server node that is not up")
          for node in held.node_leases if node not in nodes_up],
    ]  # fmt: skip


def _differ(what: str, held: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> list[Violation]:
    found = [violation(f"orphan {what}", str(key), f"held: {held[key]}") for key in held.keys() - wanted.keys()]
    found += [violation(f"missing {what}", str(key), f"wanted: {wanted[key]}") for key in wanted.keys() - held.keys()]
    found += [violation(f"wrong {what}", str(key), f"held {held[key]}, recorded {wanted[key]}")
              for key in held.keys() & wanted.keys() if held[key] != wanted[key]]  # fmt: skip
    return found


@dataclass(frozen=True)
class Life:
    """One process (or simulated guest) that runs a VM, with its time. ``incoming``: the target of a migration."""

    vm: str
    node: str
    began: float
    ended: float
    incoming: bool = False


def lives(seen: Sequence[Life], migrations: Mapping[str, Sequence[tuple[float, float]]]) -> list[Violation]:
    """No VM ran twice: two starts never overlap, and a migration's target stands beside its source only in its time.

    ``migrations``: VM -> when its migrations were under way (began, ended).
    """
    found = []
    by_vm: dict[str, list[Life]] = {}
    for life in seen:
        by_vm.setdefault(life.vm, []).append(life)
    for vm, mine in by_vm.items():
        for i, one in enumerate(mine):
            for other in mine[i + 1 :]:
                began, ended = max(one.began, other.began), min(one.ended, other.ended)
                if ended - began <= SAME_MOMENT_S:
                    continue
                migrating = any(a - 1 <= began and ended <= b + 1 for a, b in migrations.get(vm, ()))
                if not (one.incoming or other.incoming) or not migrating:
                    where = f"{one.node} and {other.node} for {ended - began:.1f} s"
                    found.append(violation("ran twice", vm, where))
    return found


SAME_MOMENT_S = 0.5
"""Two observations closer than this say nothing about which came first."""
