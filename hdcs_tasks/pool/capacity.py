"""Capacity: how many more VMs of a profile fit, by the same numbers the scheduler claims from."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.errors import NotFound
from hdcs_tasks.operations.control import Control
from hdcs_tasks.pool.rules import memory_need_mib
from hdcs_tasks.store.models import DomainNode, Profile


def capacity(control: Control, profile_name: str) -> dict[str, Any]:
    """Per server node, per domain node and in all; each with what limits it.

    Returns ``{profile, vms, domain_nodes: {name: {vms, limit, server_nodes: {name: {vms, limit}}}}}``.
    """
    with control.store.read() as session:
        profile = session.get(Profile, profile_name)
        names = [row.name for row in session.query(DomainNode).order_by(DomainNode.name)]
    if profile is None:
        raise NotFound(f"there is no profile {profile_name!r}", next="See: hdcs profile list")
    need = memory_need_mib(profile.memory_mib, profile.vcpus, 1, control.settings.capacity)
    found = {}
    for name in names:
        free_ports = control.reservations.ports.usage(name).free
        nodes = control.reservations.pool.capacity(name, profile.vcpus, need, free_ports)
        total = nodes.pop("")
        found[name] = {
            "vms": total.vms, "limit": total.limit,
            "server_nodes": {node: {"vms": c.vms, "limit": c.limit} for node, c in sorted(nodes.items())},
        }  # fmt: skip
    return {"profile": profile_name, "vms": sum(pool["vms"] for pool in found.values()), "domain_nodes": found}
