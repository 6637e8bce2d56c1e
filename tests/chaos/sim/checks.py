"""What must hold: at each side effect, and between record, world and reservations once all is quiet."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from hdcs_tasks.states import OPERATION_LIVE, OperationState, ServerNodeState, StepState, VmState
from hdcs_tasks.store.models import Operation, ServerNode, Step, Vm
from hdcs_tasks.store.models_watch import UsageSpan
from tests.chaos.sim.hypervisor import Guest
from tests.chaos.sim.kernel import Actor, Kernel, Process
from tests.chaos.sim.redis_model import RedisModel

if TYPE_CHECKING:
    from tests.chaos.sim.center import Center
    from tests.chaos.sim.history import History


class Fence:
    """Side effects belong to whoever holds the claim.

    Between its last check and the effect an executor may be stopped, and its claim may pass on: no check can see that.
    So an effect is wrong if the claim was gone already when the executor last checked, or it never checked.
    """

    def __init__(self, kernel: Kernel, redis: RedisModel) -> None:
        self._kernel = kernel
        self._redis = redis

    def _holds(self, actor: Actor) -> bool | None:
        """Whether the claim of this actor's step is its own now; None where it has no step."""
        message: Any = actor.facts.get("message")
        if not isinstance(message, dict) or "step" not in message:
            return None
        held = self._redis.run("HMGET", f"hdcs:step:{message['step']}", "attempt", "holder", "done")
        holds = held[0] == str(message["attempt"]) and held[1] is not None and not held[2]
        return bool(holds and actor.facts.setdefault("holder", held[1]) == held[1])

    def checked(self, actor: Actor | None) -> None:
        """The actor asks the fence right now."""
        if actor is not None:
            actor.facts["checked"] = self._holds(actor)

    def judge(self, actor: Actor, what: str) -> None:
        if self._holds(actor) is False and not actor.facts.get("checked"):
            self._kernel.violated("side effect without a claim", f"{what} by {actor.name}")


def judge(history: History) -> None:
    """Compare record, world and reservations; every difference is a violation."""
    for what, where in _differences(history):
        history.kernel.violated(what, where)


def _differences(history: History) -> Iterator[tuple[str, str]]:
    center = history.center
    with center.ground.store.read() as session:
        vms = list(session.scalars(select(Vm)))
        operations = list(session.scalars(select(Operation)))
        steps = list(session.scalars(select(Step)))
        nodes = list(session.scalars(select(ServerNode)))
        spans = list(session.scalars(select(UsageSpan).where(UsageSpan.kind == "vm").order_by(UsageSpan.id)))
    living = {vm.id: vm for vm in vms if vm.deleted_at is None}
    yield from _ledger(operations, steps, history)
    yield from _guests(center, living, vms)
    yield from _files(center, living)
    yield from _reservations(center, living)
    yield from _use(spans, vms)
    for node in nodes:
        if node.state is not (ServerNodeState.DRAINING if node.draining else ServerNodeState.UP):
            yield "server node not back", f"{node.name} is {node.state}"


def _ledger(operations: list[Operation], steps: list[Step], history: History) -> Iterator[tuple[str, str]]:
    known = {operation.id for operation in operations}
    for key, operation_id in history.accepted.items():
        if operation_id not in known:
            yield "acknowledged operation lost", key
    keys = [o.idempotency_key for o in operations if o.idempotency_key]
    if len(keys) != len(set(keys)):
        yield "one key, two operations", str(keys)
    for operation in operations:
        if operation.state in OPERATION_LIVE:
            yield "not settled", f"{operation.kind} {operation.subject}: {operation.phase}"
        if operation.state is OperationState.FAILED and not (operation.error or {}).get("message"):
            yield "failed without a reason", f"{operation.kind} {operation.subject}"
        if "unexpectedly" in str((operation.error or {}).get("message")):
            yield "unforeseen error", f"{operation.kind} {operation.subject}: {operation.error}"
        if operation.live_vm is not None and operation.state not in OPERATION_LIVE:
            yield "ended and still in the way", f"{operation.kind} {operation.subject}"
    for step in steps:
        if step.state not in (StepState.DONE, StepState.FAILED, StepState.CANCELLED):
            yield "step not settled", f"{step.name} {step.id[:8]} is {step.state}"


_COUNTED = {VmState.RUNNING: "on", VmState.SUSPENDED: "paused", VmState.STOPPED: "off", VmState.SAVED: "off"}


def _use(spans: list[UsageSpan], vms: list[Vm]) -> Iterator[tuple[str, str]]:
    """Every second of a VM is counted once: spans without gap or overlap, the last as the record has it now."""
    by_vm: dict[str, list[UsageSpan]] = {vm.id: [] for vm in vms}
    for span in spans:
        by_vm[span.vm_id].append(span)
    for vm in vms:
        own = by_vm[vm.id]
        for one, following in pairwise(own):
            if one.closed_at != following.opened_at:
                yield "seconds counted twice or lost", f"{vm.name}: {one.closed_at} to {following.opened_at}"
        last = own[-1] if own and own[-1].closed_at is None else None
        wanted = _COUNTED.get(vm.state)
        if wanted is not None and (last is None or last.level != wanted):
            yield "use is not the record", f"{vm.name} is {vm.state}, counted as {last.level if last else 'nothing'}"
        elif wanted == "on" and last is not None and last.server_node != vm.server_node:
            yield "use is not the record", f"{vm.name} runs on {vm.server_node}, counted on {last.server_node}"
        elif vm.deleted_at is not None and last is not None:
            yield "use is not the record", f"{vm.name} is deleted and counted still"


_SHOULD = {VmState.RUNNING: "running", VmState.SUSPENDED: "paused"}
_RESTING = frozenset({VmState.STOPPED, VmState.SAVED})


def _guests(center: Center, living: dict[str, Vm], vms: list[Vm]) -> Iterator[tuple[str, str]]:
    names = {vm.id: vm.name for vm in vms}
    where: dict[str, tuple[str, Guest]] = {}
    for host in center.world.hosts.values():
        for vm_id, guest in host.guests.items():
            if vm_id in where and guest.active and where[vm_id][1].active:
                yield "VM on two server nodes", f"{names.get(vm_id, vm_id)} on {where[vm_id][0]} and {host.name}"
            if vm_id not in where or guest.active:
                where[vm_id] = (host.name, guest)
    for vm in living.values():
        found = where.get(vm.id)
        if vm.state in _SHOULD:
            seen = (found[0], found[1].state) if found else None
            if seen != (vm.server_node, _SHOULD[vm.state]):
                yield "record is not the world", f"{vm.name} is {vm.state} on {vm.server_node}, seen {seen}"
        elif vm.state in _RESTING:
            if found is not None and found[1].active:
                yield "record is not the world", f"{vm.name} is {vm.state}, seen {found[1].state} on {found[0]}"
        elif vm.state is not VmState.FAILED:
            yield "VM stuck", f"{vm.name} is {vm.state}"
    for vm_id, (host_name, guest) in where.items():
        if vm_id not in living and guest.active:
            yield "guest without a record", f"{names.get(vm_id, vm_id)} runs on {host_name}"


def _files(center: Center, living: dict[str, Vm]) -> Iterator[tuple[str, str]]:
    for pool, layout in center.ground.layouts.items():
        for folder in (layout.root / "vms").iterdir():
            vm = living.get(folder.name)
            if vm is None:
                yield "disk without a VM", f"{folder.name[:8]} in {pool}"
            elif partials := sorted(p.name for p in folder.glob("*.partial")):
                yield "partial file left", f"{vm.name}: {partials}"
        for file in (layout.root / "state").iterdir():
            vm = living.get(file.name.partition(".")[0])
            if vm is None or vm.state not in (VmState.SAVED, VmState.FAILED):
                yield "saved memory left", f"{vm.name if vm else file.name} is {vm.state if vm else 'gone'}"
    for vm in living.values():
        if vm.state is not VmState.FAILED and not center.ground.layouts[vm.home].disk(vm.id).is_file():
            yield "VM without a disk", f"{vm.name} is {vm.state}"


def _reservations(center: Center, living: dict[str, Vm]) -> Iterator[tuple[str, str]]:
    reservations = center.reservations(Process("judge"))
    if not reservations.epoch.is_open():
        yield "reservations closed", "the epoch is not open"
        return
    found = reservations.dump()
    names = {vm.id: vm.name for vm in living.values()}
    if dict(found.macs) != {vm.id: vm.mac for vm in living.values()}:
        yield "MACs leaked or lost", f"{sorted(names.get(v, v) for v in found.macs)} of {sorted(names.values())}"
    unsure = {vm.id for vm in living.values() if vm.state is VmState.FAILED}
    for pool, held in found.pools.items():
        homed = {vm.id: vm for vm in living.values() if vm.home == pool}
        if dict(held.disks) != {vm.id: vm.disk_bytes for vm in homed.values()}:
            yield "disk promises leaked or lost", f"{pool}: {sorted(names.get(v, v) for v in held.disks)}"
        running = {(vm.id, vm.server_node) for vm in homed.values() if vm.state in _SHOULD}
        claims = {(claim.vm, claim.node) for claim in held.claims if claim.vm not in unsure}
        for vm, node in sorted(claims - running, key=str):
            yield "claim leaked", f"{names.get(vm, vm)} on {node}"
        for vm, node in sorted(running - claims, key=str):
            yield "claim lost", f"{names.get(vm, vm)} on {node}"
        yield from _numbers(center, reservations, pool, held, homed, unsure, names)


def _numbers(
    center: Center, reservations: Any, pool: str, held: Any, homed: dict[str, Vm], unsure: set[str],
    names: dict[str, str],
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Ports, IPs and the amounts of each node."""
    cooling = reservations.ports.cooling(pool)
    for vm_id, port in held.ports.items():
        vm = homed.get(vm_id)
        if vm_id not in cooling and vm_id not in unsure and (vm is None or vm.state not in _SHOULD):
            yield "port leaked", f"{port} of {names.get(vm_id, vm_id)}"
    for vm in homed.values():
        if vm.state in _SHOULD and vm.port != held.ports.get(vm.id):
            yield "port is not the record's", f"{vm.name}: {vm.port}, owned {held.ports.get(vm.id)}"
    if len(set(held.ports.values())) != len(held.ports):
        yield "port given twice", f"{pool}: {held.ports}"
    for view in reservations.pool.nodes(pool):
        used = [claim for claim in held.claims if claim.node == view.name]
        if view.vcpus - view.free_vcpus != sum(c.vcpus for c in used):
            yield "amounts are not the claims'", f"{view.name}"
        owned = {vm for vm in center.redis.run("HGETALL", f"hdcs:ips:{view.name}") if vm[0] != ":"}
        cool = set(center.redis.run("ZRANGE", f"hdcs:ips:{view.name}:cooling", 0, -1))
        holders = {claim.vm for claim in used}
        for vm_id in owned - cool - holders - unsure:
            yield "IP leaked", f"of {names.get(vm_id, vm_id)} on {view.name}"
