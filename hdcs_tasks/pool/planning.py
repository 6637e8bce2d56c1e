"""Plans over a snapshot of a pool: who goes next, a bulk start, the explanation of a decision. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.pool.rules import (
    Candidate,
    Choice,
    NodeVerdict,
    PoolVerdict,
    Shape,
    Terms,
    judge_nodes,
    need_of,
    put_on,
)
from hdcs_tasks.pool.weighing import in_order, tried

BEST = 5
"""How many server nodes an operation's decision names."""


class Waiter(NamedTuple):
    """A VM that wants a server node of this pool; ``key`` names it to the asker."""

    key: str
    shape: Shape
    terms: Terms


class Planned(NamedTuple):
    """Where a VM would go: ``node`` None, and the verdicts say why. ``room``: the pool as this VM found it."""

    key: str
    node: str | None
    verdicts: tuple[NodeVerdict, ...]
    pool_why: str
    room: Candidate


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
    best = None if why else next(tried(candidate, verdicts, need_of(waiter.shape, settings)), None)
    return Planned(waiter.key, best.node if best else None, verdicts, why, candidate)


def next_in_line(candidate: Candidate, waiters: Iterable[Waiter], settings: CapacitySettings) -> list[str]:
    """Keys of those that fit now, the oldest first; ``waiters`` oldest first."""
    planned, _ = plan(candidate, waiters, settings)
    return [p.key for p in planned if p.node is not None]


# ---- explaining


def decision(
    room: Candidate, verdicts: Sequence[NodeVerdict], shape: Shape, settings: CapacitySettings, *, pool_why: str = "",
    full: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """A decision as operations keep it and a dry run prints it.

    ``{node, pool_why, order, mix, counts: {reason: server nodes}, best: [{node, free_vcpus, free_memory_mib, vms,
    score}], nodes: […]}``; ``nodes`` (every server node with its ``why``, '' where it fits) only where ``full``.
    ``best``: in the order layer two tries them, by the scores it goes by (weighing.tried).
    """
    fitting = in_order(room, verdicts, shape, settings, None if full else BEST)
    counts = Counter(v.reason or "fits" for v in verdicts)
    found: dict[str, Any] = {
        "node": fitting[0].node if fitting and not pool_why else None, "pool_why": pool_why, "order": room.order,
        "mix": [list(entry) for entry in room.mix], "counts": dict(counts),
        "best": [_shown(v) for v in fitting[:BEST]],
    }  # fmt: skip
    if full:
        refused = sorted((v for v in verdicts if v.why), key=lambda v: v.node)
        found["nodes"] = [
            *(_shown(v) | {"rank": place, "why": ""} for place, v in enumerate(fitting, 1)),
            *(_shown(v) | {"rank": None, "why": v.why} for v in refused),
        ]
    return found


def pool_shown(
    verdict: PoolVerdict, rooms: Sequence[Candidate], shape: Shape, settings: CapacitySettings, *, full: bool = True
) -> dict[str, Any]:
    """What layer one thinks of one domain node, with layer two's decision there."""
    room = next(room for room in rooms if room.domain_node == verdict.domain_node)
    return {
        "domain_node": verdict.domain_node, "why": verdict.why, "load": round(verdict.load, 3), "vms": verdict.vms,
        "has_image": verdict.has_image, "decision": decision(room, verdict.nodes, shape, settings, full=full),
    }  # fmt: skip


def home_decision(
    choice: Choice, rooms: Sequence[Candidate], shape: Shape, settings: CapacitySettings
) -> dict[str, Any]:
    """Layer one's decision as an operation keeps it: the pools by what they were ranked by, and of each the counts and
    the best server nodes."""
    pools = [pool_shown(verdict, rooms, shape, settings, full=False) for verdict in choice.verdicts]
    best = [{"domain_node": pool["domain_node"]} | node for pool in pools if not pool["why"]
            for node in pool["decision"]["best"]]  # fmt: skip
    shown = [
        {key: pool[key] for key in ("domain_node", "why", "load", "vms", "has_image")}
        | {"counts": pool["decision"]["counts"]} for pool in pools[:BEST]
    ]  # fmt: skip
    return {"domain_node": choice.domain_node, "domain_nodes": shown, "best": best[:BEST]}


def _shown(verdict: NodeVerdict) -> dict[str, Any]:
    return {
        "node": verdict.node, "free_vcpus": verdict.free_vcpus, "free_memory_mib": verdict.free_memory_mib,
        "vms": verdict.vms, "score": None if verdict.score is None else round(verdict.score, 4),
    }  # fmt: skip


def refusal_words(label: str, where: str, verdicts: Sequence[NodeVerdict], pool_why: str = "", named: int = 5) -> str:
    """A refusal in one sentence, as layer two words it."""
    if pool_why:
        return f"domain node {where} cannot take {label}: {pool_why}"
    said = [f"{v.node} {v.why}" for v in verdicts[:named]]
    if len(verdicts) > named:
        said.append(f"and {len(verdicts) - named} more")
    return f"no server node of {where} fits {label}: {', '.join(said) or 'it has none'}"
