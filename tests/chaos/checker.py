"""Collecting the facts of a lab's data center for ``invariants``: record, Redis, libvirt, files, processes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import func, select

from deploy.lab import LOCAL
from deploy.lab.center import Center
from hdcs_tasks.hypervisor import guests, networks
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.operations.control import Control
from hdcs_tasks.reservations.ips import ip_text
from hdcs_tasks.states import STEP_LIVE, BackupState
from hdcs_tasks.store.models import Backup, Operation, Step, Vm
from tests.chaos import invariants
from tests.chaos.invariants import GuestFact, Held, Life, OperationFact, Violation, VmFact, violation
from tests.chaos.observer import Observer


def check(center: Center, acknowledged: dict[str, str]) -> list[Violation]:
    """Everything that must hold of a quiet data center. ``acknowledged``: operation id -> kind."""
    control = center.cloud.control
    vms = vm_facts(control)
    seen = guest_facts(center)
    up = {n["name"] for n in center.cloud.server_nodes.list() if n["state"] == "up"}
    return [
        *invariants.operations(operation_facts(control, acknowledged)),
        *invariants.guests(vms, seen),
        *invariants.reservations(vms, held(control), up),
        *dhcp(center, vms),
        *files(center, vms),
        *spools(center),
        *[violation("server node not back", n, "is not up") for n in center.lab.nodes if n not in up],
    ]


def unsettled(control: Control) -> list[str]:
    """Ids of operations that have not ended, by anybody."""
    with control.store.read() as session:
        return list(session.scalars(select(Operation.id).where(Operation.ended_at.is_(None))))


def operation_facts(control: Control, acknowledged: dict[str, str]) -> list[OperationFact]:
    with control.store.read() as session:
        live = select(Step.operation_id, func.count()).where(Step.state.in_(STEP_LIVE)).group_by(Step.operation_id)
        steps = {row[0]: int(row[1]) for row in session.execute(live)}
        rows = {row.id: row for row in session.scalars(select(Operation))}
    known = acknowledged | {row.id: row.kind for row in rows.values()}
    return [
        OperationFact(key, kind, rows[key].state.value, rows[key].phase, steps.get(key, 0))
        if key in rows else OperationFact(key, kind, None)
        for key, kind in known.items()
    ]  # fmt: skip


def vm_facts(control: Control) -> list[VmFact]:
    with control.store.read() as session:
        rows = session.scalars(select(Vm).where(Vm.deleted_at.is_(None))).all()
    return [VmFact(v.id, v.name, v.state.value, v.home, v.server_node, v.mac, v.port, v.ip) for v in rows]


def open_host(center: Center, node: str) -> Host:
    """libvirt of a server node by its own socket: also when the node's network is cut."""
    socket = f"/proc/{center.lab.space(node).pid}/root/run/libvirt/libvirt-sock"
    return Host.open(f"qemu+unix:///system?socket={socket}")


def guest_facts(center: Center) -> list[GuestFact]:
    found = []
    for node in center.lab.nodes:
        with open_host(center, node) as host:
            found += [GuestFact(guest.vm_id, node, guest.state) for guest in guests.list_guests(host)]
    return found


def held(control: Control) -> Held:
    reservations = control.reservations
    dump = reservations.dump()
    link = reservations.macs._link  # the keys themselves: what a public face hides is looked at, too
    ports, ips, used, claimed = {}, {}, {}, {}
    for name, pool in dump.pools.items():
        cooling = reservations.ports.cooling(name)
        ports |= {(name, vm): port for vm, port in pool.ports.items() if vm not in cooling}
        for node in pool.nodes:
            mine = [c for c in pool.claims if c.node == node.name]
            claimed[node.name] = (sum(c.vcpus for c in mine), sum(c.memory_mib for c in mine))
            row = link.do("HMGET", link.key("node", node.name), "used_vcpus", "used_memory_mib")
            used[node.name] = (int(row[0]), int(row[1]))
            key = link.key("ips", node.name)
            cold = set(link.do("ZRANGE", f"{key}:cooling", 0, -1))
            ips |= {(node.name, vm): ip_text(int(ip)) for vm, ip in link.owners(key).items() if vm not in cold}
    claims = [(c.domain_node, c.vm, c.node, c.port, c.ip) for pool in dump.pools.values() for c in pool.claims]
    disks = [(name, vm) for name, pool in dump.pools.items() for vm in pool.disks]
    prefix = link.key("lease", "")
    leases = [key.removeprefix(prefix).split(":", 1) for key in link.scan("lease:*")]
    return Held(
        dump.macs, ports, disks, claims, ips, [n for kind, n in leases if kind == "step"],
        [n for kind, n in leases if kind == "node"], used, claimed,
    )  # fmt: skip


def dhcp(center: Center, vms: Iterable[VmFact]) -> list[Violation]:
    """The DHCP host entries of each server node's network are those of the VMs that run there."""
    found = []
    for node in center.lab.nodes:
        with open_host(center, node) as host:
            there = {e.mac: e.ip for e in networks.dhcp_hosts(host, center.cloud.control.settings.network_name)}
        wanted = {v.mac: v.ip for v in vms if v.server_node == node and v.state in invariants.HOLDS_GUEST}
        unsure = {v.mac for v in vms if v.state == "failed"}
        found += [violation("orphan DHCP host", mac, f"{ip} on {node}") for mac, ip in there.items()
                  if mac not in wanted and mac not in unsure]  # fmt: skip
        found += [violation("missing DHCP host", mac, f"{ip} on {node}") for mac, ip in wanted.items()
                  if there.get(mac) != ip]  # fmt: skip
    return found


def files(center: Center, vms: Iterable[VmFact]) -> list[Violation]:
    """Each domain node's storage holds the disks of its VMs, its backup points, and nothing else."""
    found: list[Violation] = []
    with center.cloud.control.store.read() as session:
        kept = {b.id for b in session.scalars(select(Backup).where(Backup.state == BackupState.READY))}
    points: set[str] = set()
    for domain_node in center.lab.domain_nodes:
        root = center.lab.storage(domain_node)
        wanted = {v.id for v in vms if v.home == domain_node}
        there = {path.name for path in (root / "vms").iterdir()}
        found += [violation("orphan disk", name, f"in {domain_node}") for name in there - wanted]
        found += [violation("missing disk", name, f"in {domain_node}") for name in wanted - there]
        saved = {f"{v.id}.memory" for v in vms if v.state == "saved"}
        state = {path.name for path in (root / "state").iterdir()}
        found += [violation("orphan saved memory", name, f"in {domain_node}") for name in state - saved]
        found += [violation("missing saved memory", v.name, f"in {domain_node}") for v in vms
                  if v.home == domain_node and v.state == "saved" and f"{v.id}.memory" not in state]  # fmt: skip
        partial = [path for path in root.rglob("*") if ".partial" in path.name or path.name.endswith(".whole")]
        found += [violation("orphan partial file", path.name, str(path.relative_to(root))) for path in partial]
        points |= _points(root, kept, found)
    found += [violation("missing backup", point, "recorded as ready, no manifest") for point in kept - points]
    return found


def _points(root: Path, kept: set[str], found: list[Violation]) -> set[str]:
    points = set()
    for path in (root / "backups").glob("*/*/*.json"):
        point = str(json.loads(path.read_text()).get("id", ""))
        points.add(point)
        if point not in kept:
            found.append(violation("orphan backup", point, str(path.relative_to(root))))
        if not path.with_suffix(".qcow2").exists():
            found.append(violation("broken backup", point, "manifest without file"))
    alone = [p for p in (root / "backups").glob("*/*/*.qcow2") if not p.with_suffix(".json").exists()]
    found += [violation("orphan backup", path.name, str(path.relative_to(root))) for path in alone]
    return points


def spools(center: Center) -> list[Violation]:
    """Every outcome was acknowledged."""
    found = []
    for node in center.lab.nodes:
        folder = center.lab.space(node).folder / "local" / "spool"
        found += [violation("outcome not settled", path.name, f"in the spool of {node}") for path in
                  folder.glob("*.json")]  # fmt: skip
    return found


def processes(center: Center, observer: Observer) -> list[Violation]:
    """Every QEMU process is one of a guest libvirt knows."""
    known = {(guest.vm_id, guest.node) for guest in guest_facts(center) if guest.active}
    return [
        violation("orphan process", one.vm, f"QEMU {one.pid} on {one.node}")
        for one in observer.running() if (one.vm, one.node) not in known
    ]  # fmt: skip


def deaths(center: Center) -> list[Violation]:
    """No worker and no beat ended but by a fault: whatever Redis does, they are there when it is back."""
    return [
        violation("ended by itself", path.stem, line[:300])
        for path in sorted(center.lab.log("any").parent.glob("*.log"))
        for line in path.read_text(errors="replace").splitlines() if "Unrecoverable error" in line
    ]  # fmt: skip


def ran_twice(center: Center, observer: Observer, until: float) -> list[Violation]:
    """No VM ran twice at any moment that was observed."""
    seen = [
        Life(one.vm, one.node, one.began, one.ended or until, one.incoming)
        for one in observer.seen() if not one.holder
    ]  # fmt: skip
    return invariants.lives(seen, migrations(center.cloud.control, until))


def migrations(control: Control, until: float) -> dict[str, list[tuple[float, float]]]:
    """When each VM's migrations were under way; the last of them may have been superseded by a forced stop."""
    found: dict[str, list[tuple[float, float]]] = {}
    with control.store.read() as session:
        for row in session.scalars(select(Operation).where(Operation.kind == "vm.migrate")):
            ended = row.ended_at.timestamp() if row.ended_at else until
            found.setdefault(row.vm_id or "", []).append((row.created_at.timestamp(), ended))
    return found


__all__ = ["LOCAL", "check", "deaths", "open_host", "processes", "ran_twice", "spools", "unsettled"]
