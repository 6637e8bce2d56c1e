"""Giving back what nobody owns any more, and giving back to a running VM the place it lost: the sweep behind everything
that is reserved or given back after a commit.

Redis is read first and the record after it. An owner the record does not know may be in an open transaction still: it
has to be missing in two sweeps. What a living VM holds too much is given back under the VM's row lock, while no
operation of it lives: then no start can be taking it.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select

from hdcs_tasks.errors import Conflict
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.control import Control
from hdcs_tasks.operations.sending import broadcast
from hdcs_tasks.pool.control import quick_queues
from hdcs_tasks.pool.rooms import vm_shape, vm_terms
from hdcs_tasks.pool.rules import need_of
from hdcs_tasks.reservations import Claim, PoolSnapshot, Snapshot
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Vm

log = logger(__name__)

TIDY_TASK = "pool.tidy_on_node"
NOTE = "tidy"
NOTE_TTL_S = 600.0
_EMPTY = frozenset({VmState.STOPPED, VmState.SAVED})
_LIVING = select(Vm).where(Vm.deleted_at.is_(None))
_RUNS = frozenset({VmState.RUNNING, VmState.SUSPENDED})


def tidy_sweep(control: Control) -> int:
    """Give back the reservations of VMs that are gone, and claims and ports of VMs that rest. Returns how many. What
    runs without a claim gets back the one it had."""
    if not control.reservations.epoch.is_open():
        return 0
    held = control.reservations.dump()
    with control.store.read() as session:
        vms = {vm.id: vm for vm in session.scalars(_LIVING)}
    gone = _owners(held) - vms.keys()
    count = sum(_forget(control, held, vm_id) for vm_id in sorted(_surely_gone(control, gone)))
    for vm_id in sorted(vms.keys() & _suspects(held, vms)):
        count += _trim(control, held, vm_id)
    if count:
        log.warning("reservations without an owner given back", count=count)
    for vm_id in sorted(_placeless(held, vms)):
        _restore(control, vm_id)
    return count


def dhcp_sweep(control: Control) -> int:
    """Let each server node remove the DHCP host entries that no claim stands for. Returns how many were asked."""
    with control.store.read() as session:
        queues = quick_queues(session)
    broadcast(control.celery, TIDY_TASK, {}, queues, expires_s=control.settings.lease_ttl_s)
    return len(queues)


def _owners(held: Snapshot) -> set[str]:
    pools = held.pools.values()
    return {*held.macs, *(vm for p in pools for vm in (*p.ports, *p.disks)), *(c.vm for p in pools for c in p.claims)}


def _surely_gone(control: Control, gone: set[str]) -> set[str]:
    """Those the record has as deleted, and those it has not known for two sweeps."""
    notes = control.reservations.notes
    before = notes.read(NOTE)
    notes.drop(NOTE)
    if not gone:
        return set()
    with control.store.read() as session:
        deleted = set(session.scalars(select(Vm.id).where(Vm.id.in_(gone), Vm.deleted_at.is_not(None))))
    for vm_id in sorted(gone - deleted):
        notes.write(NOTE, vm_id, "unknown", NOTE_TTL_S)
    return deleted | (gone & before.keys())


def _forget(control: Control, held: Snapshot, vm_id: str) -> int:
    reservations, config = control.reservations, control.settings
    count = int(reservations.macs.release(vm_id))
    for name, pool in held.pools.items():
        count += _release(control, (claim for claim in pool.claims if claim.vm == vm_id))
        count += int(vm_id in pool.disks and reservations.disks.release(name, vm_id))
        if vm_id in pool.ports and vm_id not in reservations.ports.cooling(name):
            count += int(reservations.ports.cool(name, vm_id, config.port_cooling_s))
    return count


def _suspects(held: Snapshot, vms: dict[str, Vm]) -> set[str]:
    """Living VMs that seem to hold more than they should: looked at again under their lock."""
    found = set()
    for name, pool in held.pools.items():
        found |= {c.vm for c in pool.claims if c.vm in vms and _too_much(vms[c.vm], c)}
        found |= {vm_id for vm_id in pool.ports if vm_id in vms and _no_port(vms[vm_id], name)}
    return found


def _no_port(vm: Vm, domain_node: str) -> bool:
    """Whether the VM has no business with a console port of this domain node: it rests, or lives elsewhere."""
    return vm.state in _EMPTY or vm.home != domain_node


def _too_much(vm: Vm, claim: Claim) -> bool:
    return vm.state in _EMPTY or vm.home != claim.domain_node or (vm.state in _RUNS and vm.server_node != claim.node)


def _trim(control: Control, held: Snapshot, vm_id: str) -> int:
    with control.transaction() as tx:
        vm = tx.session.get(Vm, vm_id, with_for_update=True)
        if vm is None or vm.deleted_at is not None or tx.live_operation(vm) is not None:
            return 0
        return sum(_trim_in(control, vm, name, pool) for name, pool in held.pools.items())


def _trim_in(control: Control, vm: Vm, name: str, pool: PoolSnapshot) -> int:
    count = _release(control, (c for c in pool.claims if c.vm == vm.id and _too_much(vm, c)))
    ports = control.reservations.ports
    if _no_port(vm, name) and vm.id in pool.ports and vm.id not in ports.cooling(name):
        count += int(ports.cool(name, vm.id, control.settings.port_cooling_s))
    return count


def _placeless(held: Snapshot, vms: dict[str, Vm]) -> set[str]:
    """VMs that run and hold no claim where they do. A start that had not ended when Redis was lost is in no rebuild
    where its server node could not report: its outcome came after."""
    placed = {(c.vm, c.node) for pool in held.pools.values() for c in pool.claims}
    return {vm.id for vm in vms.values() if vm.state in _RUNS and (vm.id, vm.server_node) not in placed}


def _restore(control: Control, vm_id: str) -> None:
    with control.transaction() as tx:
        vm = tx.session.get(Vm, vm_id, with_for_update=True)
        if vm is None or vm.state not in _RUNS or vm.server_node is None or tx.live_operation(vm) is not None:
            return
        need = need_of(vm_shape(vm), control.settings.capacity)
        amounts = (need.vcpus, need.memory_mib, vm.port or 0, vm.ip or "")
        try:
            control.reservations.pool.restore(Claim(vm.home, vm.id, vm.server_node, *amounts, step=""))
            control.reservations.marks.add(vm.home, vm.id, vm_terms(vm).marks)
            log.warning("a running VM holds its place again", vm=vm.name, node=vm.server_node)
        except Conflict as error:
            # Two guests claim one port or address, which only an operator can settle.
            tx.event_hourly("vm.conflict", vm.name, f"VM {vm.name}: {error}", node=vm.server_node)


def _release(control: Control, claims: Iterable[Claim]) -> int:
    pool, lease_s = control.reservations.pool, control.settings.dhcp_lease_s
    return sum(pool.release(claim.domain_node, claim.vm, claim.node, lease_s) for claim in claims)
