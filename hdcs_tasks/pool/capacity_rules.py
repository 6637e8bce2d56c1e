"""How many more VMs fit, and what if: a server node gone, one more, one kept free, or a mix of profiles. Pure.

Counted by the scheduler's own judgement (rules.judge_nodes), on the same snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.pool.rules import Candidate, Free, NodeRoom, Shape, Terms, judge_nodes, need_of, put_on
from hdcs_tasks.pool.weighing import taken


class NodeCount(NamedTuple):
    """``limit``: what stops the next one there, or why it takes none."""

    vms: int
    limit: str


@dataclass(frozen=True, slots=True)
class PoolCount:
    """One domain node. ``vms``: how many fit; ``n_plus_one``: how many fit with any one server node kept free, so that
    its VMs have where to go; ``limit``: what stops the next one in the pool."""

    domain_node: str
    vms: int
    n_plus_one: int
    limit: str
    nodes: dict[str, NodeCount]


@dataclass(frozen=True, slots=True)
class MixCount:
    """``rounds``: whole times the mix fits into the domain nodes; ``vms``: VMs placed before the first refusal."""

    rounds: int
    vms: int
    stopped_by: str


NEW_NODE = "new-node"


def what_if(candidate: Candidate, without: Sequence[str], new: Sequence[NodeRoom]) -> Candidate:
    """The pool without these server nodes and with these new ones."""
    return replace(candidate, nodes=(*(n for n in candidate.nodes if n.name not in without), *new))


def new_node(number: int, vcpus: int, memory_mib: int) -> NodeRoom:
    """A server node that promises this much to guests and has nothing on it."""
    return NodeRoom(f"{NEW_NODE}-{number}", Free(vcpus, memory_mib), vcpus, memory_mib)


def count(candidate: Candidate, shape: Shape, terms: Terms, settings: CapacitySettings) -> PoolCount:
    """How many VMs of one shape the domain node takes.

    Server nodes do not influence each other as long as no rule keeps VMs together or apart, so the sum is exact; with
    such a rule the VMs are placed one by one as layer two would.
    """
    verdicts = judge_nodes(candidate.nodes, shape, terms, settings)
    nodes = {v.node: NodeCount(v.vms, v.reason) for v in verdicts}
    if terms.together or terms.apart:
        per_node = _placed(candidate, shape, terms, settings)
        nodes = {name: NodeCount(per_node.get(name, 0), found.limit) for name, found in nodes.items()}
    nodes = {v.node: NodeCount(nodes[v.node].vms, _limit(candidate, v.node, nodes[v.node], shape, terms, settings))
             for v in verdicts}  # fmt: skip
    by_nodes = sum(found.vms for found in nodes.values())
    vms, limit = _pool_limit(candidate, shape, by_nodes)
    spared = by_nodes - max((found.vms for found in nodes.values()), default=0)
    return PoolCount(candidate.domain_node, vms, min(vms, spared), limit, nodes)


def _limit(
    candidate: Candidate, name: str, found: NodeCount, shape: Shape, terms: Terms, settings: CapacitySettings
) -> str:
    """What stops the next VM on this server node: why it is refused once those that fit are there."""
    if not found.vms:
        return found.limit
    full = put_on(candidate, name, shape, settings, replace(terms, start=False), times=found.vms)
    verdict = next(v for v in judge_nodes(full.nodes, shape, terms, settings) if v.node == name)
    return verdict.reason


def _pool_limit(candidate: Candidate, shape: Shape, by_nodes: int) -> tuple[int, str]:
    limits = [(by_nodes, "server nodes")]
    if candidate.free_ports is not None:
        limits.append((max(0, candidate.free_ports), "ports"))
    if candidate.free_disk_bytes is not None and shape.disk_bytes:
        limits.append((max(0, candidate.free_disk_bytes) // shape.disk_bytes, "disk"))
    return min(limits, key=lambda pair: pair[0])


def _placed(candidate: Candidate, shape: Shape, terms: Terms, settings: CapacitySettings) -> dict[str, int]:
    """VMs per server node when they are placed one by one."""
    per_node: dict[str, int] = {}
    while (chosen := taken(candidate, shape, terms, settings)) is not None:
        per_node[chosen.node] = per_node.get(chosen.node, 0) + 1
        candidate = put_on(candidate, chosen.node, shape, settings, terms)
    return per_node


def count_mix(
    candidates: Sequence[Candidate], mix: Sequence[tuple[str, Shape, Terms, int]], settings: CapacitySettings
) -> MixCount:
    """How often a mix (name, shape, terms, how many of it) fits: placed round by round, the big ones first, each on the
    server node layer two would take of the domain node with most room for it. A plan, not a bound: a cleverer packing
    may hold a few more. Layer two is aware of this very mix, as it is of the mix of a domain node's VMs."""
    order = sorted(mix, key=lambda entry: (entry[1].memory_mib, entry[1].vcpus), reverse=True)
    total = sum(times for *_, times in mix)
    if not total:
        return MixCount(0, 0, "an empty mix")
    expected = tuple((*need_of(shape, settings), times / total) for _, shape, _, times in mix if times)
    left = [replace(candidate, mix=expected) for candidate in candidates]
    rounds = vms = 0
    while True:
        for name, shape, terms, times in order:
            for _ in range(times):
                at = _roomiest(left, shape, terms, settings)
                chosen = None if at is None else taken(left[at], shape, terms, settings)
                if at is None or chosen is None:
                    return MixCount(rounds, vms, name)
                left[at] = put_on(left[at], chosen.node, shape, settings, terms)
                vms += 1
        rounds += 1


def _roomiest(candidates: Sequence[Candidate], shape: Shape, terms: Terms, settings: CapacitySettings) -> int | None:
    counts = [(count(c, shape, terms, settings).vms, -at) for at, c in enumerate(candidates)]
    vms, at = max(counts, default=(0, 0))
    return -at if vms else None
