"""The bounds on starts under way, on the control plane: what is shown of them, and the one of each storage.

A server node keeps its own bound (node_admission.py). What they all share, the storage, is judged here by what they
measured of it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from hdcs_tasks.clock import now_s
from hdcs_tasks.operations.control import Control
from hdcs_tasks.pool.admission_rules import Bound, Measured, next_bound
from hdcs_tasks.pool.policy import PoolPolicy, read
from hdcs_tasks.store.models import DomainNode

FRESH_S = 30.0
"""What a node measured longer ago says nothing."""


def storage_sweep(control: Control) -> int:
    """Move the bound of every storage an operator gave a floor and a ceiling; how many were looked at."""
    with control.store.read() as session:
        ruled = [(row.name, read(PoolPolicy, row.rules)) for row in session.scalars(select(DomainNode))]
    adapting = [(name, policy) for name, policy in ruled if policy.max_starts and policy.min_starts]
    for name, policy in adapting:
        _look(control, name, policy)
    return len(adapting)


def _look(control: Control, domain_node: str, policy: PoolPolicy) -> None:
    pool = control.reservations.pool
    slowest_ms = None
    for node in pool.nodes(domain_node):
        facts = pool.admission(node.name)
        if facts.get("storage_ms") and now_s() - float(facts.get("at", 0)) < FRESH_S:
            slowest_ms = max(slowest_ms or 0.0, float(facts["storage_ms"]))
    kept = pool.admission(f"{domain_node}|")
    bound = Bound(pool.start_limit(domain_node) or policy.max_starts, settling=int(kept.get("settling", 0)))
    bound = next_bound(
        bound, Measured(storage_ms=slowest_ms), floor=policy.min_starts, ceiling=policy.max_starts
    )  # fmt: skip
    pool.limit_starts(domain_node, bound.starts)
    slowest = "" if slowest_ms is None else f"{slowest_ms:.1f}"
    facts = {"why": bound.why, "settling": str(bound.settling), "storage_ms": slowest, "at": f"{now_s():.0f}"}
    pool.storage_facts(domain_node, facts)


def node_starts(control: Control, domain_node: str, name: str) -> dict[str, Any] | None:
    """Of a server node: ``{under_way, bound, floor, ceiling, why, cpu_pressure, memory_pressure, storage_ms, boots,
    usual_boot_s, measured_at}``; None: it is in no pool. Pressures in percent of the last ten seconds."""
    view = next((node for node in control.reservations.pool.nodes(domain_node) if node.name == name), None)
    if view is None:
        return None
    shown: dict[str, Any] = {
        "under_way": view.starts, "bound": view.max_starts or None, "floor": view.min_starts or None,
        "ceiling": view.starts_ceiling or None,
    }  # fmt: skip
    return shown | _measured(control.reservations.pool.admission(name))


def storage_starts(control: Control, domain_node: str) -> dict[str, Any]:
    """Of a domain node's storage: ``{bound, free, why, storage_ms, measured_at}``; ``bound`` None: any."""
    pool = control.reservations.pool
    shown = {"bound": pool.start_limit(domain_node) or None, "free": pool.free_starts(domain_node)}
    return shown | _measured(pool.admission(f"{domain_node}|"))


def _measured(facts: dict[str, str]) -> dict[str, Any]:
    numbers = ("cpu_pressure", "memory_pressure", "storage_ms", "boots", "usual_boot_s")
    shown: dict[str, Any] = {key: float(facts[key]) for key in numbers if facts.get(key)}
    if facts:
        shown |= {"why": facts.get("why", ""), "age_s": round(max(0.0, now_s() - float(facts.get("at", 0))), 1)}
    return shown
