"""Reservations that lost their owner: found by comparing Redis with the record, freed when found twice.

What a VM holds on a server node is freed by that server node alone, after it saw that no guest of it is there.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import select

from hdcs_tasks.logs import logger
from hdcs_tasks.operations.control import Control
from hdcs_tasks.operations.sending import send
from hdcs_tasks.pool.control import IN_POOL
from hdcs_tasks.reservations import Claim, Snapshot
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.store.models import Operation, ServerNode, Vm

log = logger(__name__)

TIDY_TASK = "pool.tidy_on_node"
_NOTE = "orphans"
_NOTE_TTL_S = 600


def orphan_sweep(control: Control) -> list[str]:
    """Free what had no owner in this sweep nor the last one, and let each server node tidy up. Returns what was freed.

    Twice, because a VM's first reservations are made a moment before its record is.
    """
    reservations = control.reservations
    if not reservations.epoch.is_open():
        return []
    dump = reservations.dump()  # before the record: what is reserved later cannot look like an orphan
    with control.store.read() as session:
        vms = {vm.id: vm for vm in session.scalars(select(Vm).where(Vm.deleted_at.is_(None)))}
        busy = set(session.scalars(select(Operation.live_vm).where(Operation.live_vm.is_not(None))))
        nodes = list(session.scalars(select(ServerNode).where(ServerNode.state.in_(IN_POOL))))
    found = _without_owner(control, dump, vms, busy)
    before = set(json.loads(reservations.notes.read(_NOTE).get("found", "[]")))
    reservations.notes.write(_NOTE, "found", json.dumps(sorted(found)), _NOTE_TTL_S)
    twice = sorted(set(found) & before)
    left: dict[str, list[tuple[str, str]]] = {node.name: [] for node in nodes}
    for name in twice:
        _free(control, found[name], left)
        log.warning("reservation without owner", what=name)
    for node in nodes:
        message = {"claims": left[node.name]}
        expires_s = control.settings.lease_ttl_s
        send(control.celery, TIDY_TASK, message, quick_queue(node.domain_node, node.name), expires_s=expires_s)
    return twice


def _without_owner(control: Control, dump: Snapshot, vms: dict[str, Vm], busy: set[str | None]) -> dict[str, Any]:
    """What nobody owns, by a name that says what it is."""
    found: dict[str, Any] = {f"MAC of {vm}": ("mac", vm) for vm in dump.macs if vm not in vms}
    for domain_node, pool in dump.pools.items():
        cooling = control.reservations.ports.cooling(domain_node)
        found |= {f"disk of {vm}": ("disk", domain_node, vm) for vm in pool.disks if vm not in vms}
        found |= {
            f"port {port} of {vm}": ("port", domain_node, vm) for vm, port in pool.ports.items()
            if vm not in cooling and vm not in busy and (vm not in vms or vms[vm].server_node is None)
        }  # fmt: skip
        found |= {
            f"claim of {c.vm} on {c.node} by {c.step}": c for c in pool.claims
            if c.vm not in busy and (c.vm not in vms or vms[c.vm].server_node != c.node)
        }  # fmt: skip
    return found


def _free(control: Control, what: Any, left: dict[str, list[tuple[str, str]]]) -> None:
    reservations = control.reservations
    if isinstance(what, Claim):
        # A server node that is away may hold the guest still: its claim waits for it.
        if what.node in left:
            left[what.node].append((what.vm, what.step))
    elif what[0] == "mac":
        reservations.macs.release(what[1])
    elif what[0] == "disk":
        reservations.disks.release(what[1], what[2])
    else:
        reservations.ports.cool(what[1], what[2], control.settings.port_cooling_s)
