"""Plans over a snapshot of a pool: who goes next, a bulk start, the explanation of a decision. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.pool.policy import Order
from hdcs_tasks.pool.rules import Candidate, NodeVerdict, Shape, Terms, in_order, judge_nodes, put_on

BEST = 5
"""How many server nodes an operation's decision names."""


class Waiter(NamedTuple):
    """A VM that wants a server node of this pool; ``key`` names it to the asker."""

    key: str
    shape: Shape
    terms: Terms


class Planned(NamedTuple):
    """Where a VM would go: ``node`` None, and the verdicts say why."""

    key: str
    node: str | None
    verdicts: tuple[NodeVerdict, ...]
    pool_why: str


def plan(
    candidate: Candidate, waiters: Iterable[Waiter], settings: CapacitySettings
) -> tuple[list[Planned], Candidate]:
    """Each VM in turn on the server node layer two would take, counting those before it; and the pool after all."""
    found: list[Planned] = []
    refused: dict[tuple[Shape, Terms], Planned] = {}
    for waiter in waiters:
        # Room only shrinks on the way: what was refused once is refused to all of its kind.
        kind = (waiter.shape, replace(waiter.terms, vm=""))
        if kind in refused:
            found.append(refused[kind]._replace(key=waiter.key))
            continue
        planned = _one(candidate, waiter, settings)
        found.append(planned)
        if planned.node is None:
            refused[kind] = planned
        else:
            candidate = put_on(candidate, planned.node, waiter.shape, settings, waiter.terms)
    return found, candidate


def _one(candidate: Candidate, waiter: Waiter, settings: CapacitySettings) -> Planned:
    verdicts = judge_nodes(candidate.nodes, waiter.shape, waiter.terms, settings)
    why = ""
    if candidate.free_ports is not None and candidate.free_ports < 1:
        why = "all console ports are in use or cooling"
    elif waiter.terms.start and candidate.free_starts is not None and candidate.free_starts < 1:
        why = "as many starts are under way on its storage as may be"
    fitting = [] if why else in_order(verdicts, candidate.order)
    return Planned(waiter.key, fitting[0].node if fitting else None, verdicts, why)


def next_in_line(candidate: Candidate, waiters: Iterable[Waiter], settings: CapacitySettings) -> list[str]:
    """Keys of those that fit now, the oldest first; ``waiters`` oldest first."""
    planned, _ = plan(candidate, waiters, settings)
    return [p.key for p in planned if p.node is not None]


# ---- explaining


def decision(verdicts: Sequence[NodeVerdict], order: Order, *, pool_why: str = "", full: bool = True) -> dict[str, Any]:
    """A decision as operations keep it and a dry run prints it.

    ``{node, pool_why, counts: {reason: server nodes}, best: [{node, free_vcpus, free_memory_mib, vms}], nodes: […]}``;
    ``nodes`` (every server node with its ``why``, '' where it fits) only where ``full``. ``best``: in the order layer
    two tries them.
    """
    fitting = in_order(verdicts, order)
    counts = Counter(v.reason or "fits" for v in verdicts)
    found: dict[str, Any] = {
        "node": fitting[0].node if fitting and not pool_why else None, "pool_why": pool_why, "counts": dict(counts),
        "best": [_shown(v) for v in fitting[:BEST]],
    }  # fmt: skip
    if full:
        ranked = {v.node: place for place, v in enumerate(fitting, 1)}
        found["nodes"] = [
            _shown(v) | {"rank": ranked.get(v.node), "why": v.why}
            for v in sorted(verdicts, key=lambda v: (ranked.get(v.node, len(verdicts) + 1), v.node))
        ]  # fmt: skip
    return found


def _shown(verdict: NodeVerdict) -> dict[str, Any]:
    return {
        "node": verdict.node, "free_vcpus": verdict.free_vcpus, "free_memory_mib": verdict.free_memory_mib,
        "vms": verdict.vms,
    }  # fmt: skip


def refusal_words(label: str, where: str, verdicts: Sequence[NodeVerdict], pool_why: str = "", named: int = 5) -> str:
    """A refusal in one sentence, as layer two words it."""
    if pool_why:
        return f"domain node {where} cannot take {label}: {pool_why}"
    said = [f"{v.node} {v.why}" for v in verdicts[:named]]
    if len(verdicts) > named:
        said.append(f"and {len(verdicts) - named} more")
    return f"no server node of {where} fits {label}: {', '.join(said) or 'it has none'}"
