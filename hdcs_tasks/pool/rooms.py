"""The pools as the scheduler sees them right now: record, reservations and policy put together. Reads only."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from hdcs_tasks.operations.control import Control
from hdcs_tasks.pool import rules
from hdcs_tasks.pool.policy import Order, PoolPolicy, VmPolicy, capacity_settings, read
from hdcs_tasks.reservations import PoolNodeView
from hdcs_tasks.states import ServerNodeState
from hdcs_tasks.store.models import DomainNode, ServerNode, Vm

_GONE = (ServerNodeState.LOST, ServerNodeState.LEFT)
_MIX_SHAPES = 8
_COMMONEST = (
    select(Vm.vcpus, Vm.memory_mib, func.count()).where(Vm.home == bindparam("home"))
    .group_by(Vm.vcpus, Vm.memory_mib).order_by(func.count().desc(), Vm.memory_mib).limit(_MIX_SHAPES)
)  # fmt: skip
_MEMBERS = select(ServerNode).where(ServerNode.domain_node == bindparam("home"))


def vm_shape(vm: Vm) -> rules.Shape:
    policy = read(VmPolicy, vm.rules)
    return rules.Shape(
        vm.vcpus, vm.memory_mib, disk_bytes=vm.disk_bytes, memory_overcommit=policy.memory_overcommit,
        vcpu_overcommit=policy.vcpu_overcommit,
    )  # fmt: skip


def vm_terms(
    vm: Vm, *, pin: str | None = None, exclude: Sequence[str] = (), pinned: bool = True, start: bool = True
) -> rules.Terms:
    """``pin`` goes before the VM's own; ``pinned`` False: neither counts (a migration leaves its pin)."""
    policy = read(VmPolicy, vm.rules)
    return rules.Terms(
        pin=pin or (policy.pin if pinned else None), exclude=tuple(exclude), node_tags=policy.node_tags,
        together=policy.together, apart=policy.apart, tags=tuple(vm.tags), vm=vm.id, start=start,
    )  # fmt: skip


def order_of(control: Control, row: DomainNode) -> Order:
    """How this domain node's server nodes are filled."""
    return read(PoolPolicy, row.rules).placement or control.settings.placement


def expected_mix(control: Control, session: Session, domain_node: str) -> list[tuple[int, int, float]]:
    """The VMs expected next in a domain node: the eight commonest shapes of those at home there, as (vCPU, MiB with
    overhead, share). Layer two goes by it. Read once per transaction: a storm asks for each of its VMs."""
    known: dict[str, list[tuple[int, int, float]]] = session.info.setdefault("expected_mix", {})
    if domain_node not in known:
        rows = session.execute(_COMMONEST, {"home": domain_node}).all()
        total = sum(count for _, _, count in rows)
        known[domain_node] = [
            (*rules.need_of(rules.Shape(vcpus, memory), control.settings.capacity), round(count / total, 4))
            for vcpus, memory, count in rows
        ]
    return known[domain_node]


def disk_limit_bytes(control: Control, row: DomainNode) -> int:
    """Virtual disk bytes this domain node's storage may promise."""
    ratio = capacity_settings(control.settings.capacity, read(PoolPolicy, row.rules)).disk_overcommit
    return int((row.storage_total_bytes or 0) * ratio)


def candidate(
    control: Control, session: Session, row: DomainNode, *, has_image: bool = True, cooling_ports: bool = True
) -> rules.Candidate:
    """A domain node now. ``cooling_ports`` False: only what could start this moment. Lost server nodes are in it too,
    so that an explanation can name them; they take nothing."""
    reservations = control.reservations
    records = {n.name: n for n in session.scalars(_MEMBERS, {"home": row.name})}
    members = reservations.marks.members(row.name)
    views = reservations.pool.nodes(row.name)
    nodes = [_room(view, records.get(view.name), members.get(view.name, {})) for view in views]
    here = {node.name for node in nodes}
    nodes += [_gone(record) for record in records.values() if record.state in _GONE and record.name not in here]
    usage = reservations.ports.usage(row.name)
    return rules.Candidate(
        row.name, tuple(nodes), usage.free + (usage.cooling if cooling_ports else 0),
        disk_limit_bytes(control, row) - reservations.disks.used(row.name), has_image, order_of(control, row),
        reservations.pool.free_starts(row.name), tuple(expected_mix(control, session, row.name)),
    )  # fmt: skip


def _room(view: PoolNodeView, record: ServerNode | None, members: dict[str, frozenset[str]]) -> rules.NodeRoom:
    return rules.NodeRoom(
        view.name, rules.Free(view.free_vcpus, view.free_memory_mib, ips=view.free_ips), view.vcpus, view.memory_mib,
        schedulable=view.schedulable, max_vcpus=int(record.facts.get("max_vcpus", 0)) if record else 0,
        tags=view.tags, members=members,
        free_starts=max(0, view.max_starts - view.starts) if view.max_starts else None,
    )  # fmt: skip


def _gone(record: ServerNode) -> rules.NodeRoom:
    return rules.NodeRoom(record.name, rules.Free(0, 0), 0, 0, schedulable=False, state=record.state.value)
