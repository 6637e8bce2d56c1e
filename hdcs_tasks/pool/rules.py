"""Capacity and the choice of a domain node: pure decisions, values in, values out.

Layer one (here) chooses the domain node of a new VM: a pool with a server node that really fits, not the one with the
most free memory in sum. Layer two, the server node, is chosen and claimed in one Redis script
(reservations/pool_place.lua); ``judge_nodes`` says what that script says, of a snapshot: for a dry run, for who of the
waiting may go next, and for capacity. A property test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.pool.policy import Order


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A server node's hardware, as libvirt reports it. ``max_vcpus``: the hypervisor's limit for one guest; 0: none."""

    cpu_mhz: int
    sockets: int
    cores_per_socket: int
    threads_per_core: int
    max_vcpus: int
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What one VM asks for. ``disk_bytes``: its virtual disk; ``graphics``: graphics devices; of vCPUs and memory only
    the part the overcommit ratios leave is claimed (2.0: half)."""

    vcpus: int
    memory_mib: int
    graphics: int = 1
    disk_bytes: int = 0
    memory_overcommit: float = 1.0
    vcpu_overcommit: float = 1.0


@dataclass(frozen=True, slots=True)
class Free:
    """What is left: on a server node, or (ports, disk) in its domain node. None: not limited."""

    vcpus: int
    memory_mib: int
    ips: int | None = None
    ports: int | None = None
    disk_bytes: int | None = None


class Need(NamedTuple):
    """What a VM claims of a server node: vCPUs, and memory with the host's overhead in MiB."""

    vcpus: int
    memory_mib: int


class Capacity(NamedTuple):
    """How many VMs fit and what stops the next one:
    memory | vcpus | ghz | max vcpus | ips | ports | disk | draining."""

    vms: int
    limit: str


# ---- one server node


def effective_cores(facts: NodeFacts, settings: CapacitySettings) -> float:
    """Cores, a second hardware thread counted as ``ht_credit`` of one."""
    cores = facts.sockets * facts.cores_per_socket
    return cores * (1 + settings.ht_credit * (facts.threads_per_core - 1))


def vcpus_by_cores(facts: NodeFacts, settings: CapacitySettings) -> int:
    return math.floor(effective_cores(facts, settings) * settings.vcpu_overcommit)


def vcpus_by_mhz(facts: NodeFacts, settings: CapacitySettings) -> int:
    """vCPUs the clock sustains at ``target_utilisation``. A host that tells no MHz (0) is not limited by it."""
    if facts.cpu_mhz <= 0:
        return vcpus_by_cores(facts, settings)
    cores = facts.sockets * facts.cores_per_socket
    return math.floor(facts.cpu_mhz * cores * settings.target_utilisation / settings.mhz_per_vcpu)


def schedulable_vcpus(facts: NodeFacts, settings: CapacitySettings) -> int:
    """vCPUs that may be promised to guests: the lesser of what cores and clock give."""
    return max(0, min(vcpus_by_cores(facts, settings), vcpus_by_mhz(facts, settings)))


def schedulable_memory_mib(facts: NodeFacts, settings: CapacitySettings) -> int:
    """Memory that may be promised to guests, after overcommit and host reserve."""
    return max(0, math.floor(facts.memory_mib * settings.memory_overcommit) - settings.host_reserve_mib)


def memory_need_mib(memory_mib: int, vcpus: int, graphics: int, settings: CapacitySettings) -> int:
    """Host memory a guest takes: its own, page tables, and QEMU with its devices."""
    overhead = memory_mib * settings.overhead_ratio + settings.overhead_mib
    overhead += settings.overhead_per_vcpu_mib * vcpus + settings.overhead_graphics_mib * graphics
    return math.ceil(memory_mib + overhead)


def need_of(shape: Shape, settings: CapacitySettings) -> Need:
    """What a VM of this shape claims of a server node."""
    overhead = memory_need_mib(shape.memory_mib, shape.vcpus, shape.graphics, settings) - shape.memory_mib
    memory_mib = math.ceil(shape.memory_mib / shape.memory_overcommit) + overhead
    return Need(max(1, math.ceil(shape.vcpus / shape.vcpu_overcommit)), memory_mib)


def capacity(facts: NodeFacts, shape: Shape, settings: CapacitySettings, free: Free | None = None) -> Capacity:
    """How many more VMs of ``shape`` the server node takes. ``free``: what is left of it; None: it is empty."""
    left = free or Free(schedulable_vcpus(facts, settings), schedulable_memory_mib(facts, settings))
    if facts.max_vcpus and shape.vcpus > facts.max_vcpus:
        return Capacity(0, "max vcpus")
    found = capacity_left(shape, settings, left)
    by_clock = vcpus_by_mhz(facts, settings) < vcpus_by_cores(facts, settings)
    return Capacity(found.vms, "ghz") if found.limit == "vcpus" and by_clock else found


def capacity_left(shape: Shape, settings: CapacitySettings, free: Free) -> Capacity:
    """How many VMs of ``shape`` fit into what is left: the least of all limits, and which it is."""
    need = need_of(shape, settings)
    limits = [(free.memory_mib // need.memory_mib, "memory"), (free.vcpus // need.vcpus, "vcpus")]
    if free.ips is not None:
        limits.append((free.ips, "ips"))
    if free.ports is not None:
        limits.append((free.ports, "ports"))
    if free.disk_bytes is not None and shape.disk_bytes:
        limits.append((free.disk_bytes // shape.disk_bytes, "disk"))
    vms, limit = min(limits, key=lambda pair: pair[0])
    return Capacity(max(0, vms), limit)


# ---- one domain node

Mix = tuple[tuple[int, int, float], ...]
"""The profiles of the VMs expected next: vCPUs, MiB with the host's overhead, share."""


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """A server node as the scheduler sees it. ``total_*``: what may be promised in all; ``state``: why it takes nothing
    where not ``schedulable``; ``tags``: its own; ``members``: tag -> the VMs with it that hold a claim there;
    ``free_starts``: how many more starts may be under way (None: any)."""

    name: str
    free: Free
    total_vcpus: int
    total_memory_mib: int
    schedulable: bool = True
    max_vcpus: int = 0
    tags: tuple[str, ...] = ()
    members: Mapping[str, frozenset[str]] = field(default_factory=dict)
    free_starts: int | None = None
    state: str = "draining"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A domain node with its server nodes and what is left of ports, storage and starts. ``has_image``: no copy
    needed; ``order``: how its server nodes are filled; ``mix``: the VMs expected next."""

    domain_node: str
    nodes: tuple[NodeRoom, ...]
    free_ports: int | None = None
    free_disk_bytes: int | None = None
    has_image: bool = False
    order: Order = "spread"
    free_starts: int | None = None
    mix: Mix = ()


@dataclass(frozen=True, slots=True)
class Terms:
    """Where a VM may run, beside needing room. ``pin``: this server node or none; ``exclude``: none of these;
    ``node_tags``: a server node must have them all; ``together``, ``apart``: tags of other VMs; ``tags``: its own;
    ``vm``: its id, for it is no company to itself; ``start``: counts as a start under way."""

    pin: str | None = None
    exclude: tuple[str, ...] = ()
    node_tags: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    vm: str = ""
    start: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """What this VM is to the others: its tags, and whom it shuns."""
        return marks_of(self.tags, self.apart)

    @property
    def shuns(self) -> tuple[str, ...]:
        """Marks it must not meet: keeping apart holds both ways, whoever starts first."""
        return shuns_of(self.tags, self.apart)


def marks_of(tags: Sequence[str], apart: Sequence[str]) -> tuple[str, ...]:
    return (*tags, *(f"!{tag}" for tag in apart))


def shuns_of(tags: Sequence[str], apart: Sequence[str]) -> tuple[str, ...]:
    return (*apart, *(f"!{tag}" for tag in tags))


@dataclass(frozen=True, slots=True)
class HomeRequest:
    """What layer one looks for. ``exclude``: domain nodes that refused; ``pin``: this one or none."""

    shape: Shape
    count: int = 1
    pin: str | None = None
    exclude: tuple[str, ...] = ()
    terms: Terms = Terms()
    order: Order = "spread"


class NodeVerdict(NamedTuple):
    """Why a server node cannot take the VM in words, and in one word (``reason``); both '' where it can. ``free_*``:
    what is free there; ``vms``: how many of the shape fit; ``score``: by which it was ranked (weighing.tried)."""

    node: str
    vms: int
    why: str
    reason: str
    free_vcpus: int
    free_memory_mib: int
    score: float | None = None


class PoolVerdict(NamedTuple):
    """What layer one thinks of one domain node. ``why`` '' where it fits; ``vms``: how many of the shape it takes;
    ``load``: promised share of its scarcer resource, 0 to 1."""

    domain_node: str
    why: str
    vms: int
    has_image: bool
    load: float
    nodes: tuple[NodeVerdict, ...]


# Spreading to the very end leaves a little unusable room in every pool; filling the nearly full ones in turn does not.
FULL = 0.85


class Choice(NamedTuple):
    """``domain_node`` None: refused, ``explain`` says why. ``verdicts``: best first, then the refused."""

    domain_node: str | None
    verdicts: tuple[PoolVerdict, ...]


def judge_nodes(
    nodes: Sequence[NodeRoom], shape: Shape, terms: Terms, settings: CapacitySettings
) -> tuple[NodeVerdict, ...]:
    """Each server node of one domain node: whether it takes the VM, and why not."""
    company = {tag: {n.name for n in nodes if _others(n, tag, terms)} for tag in terms.together}
    return tuple(_judge(room, shape, terms, settings, company) for room in nodes)


def _judge(
    room: NodeRoom, shape: Shape, terms: Terms, settings: CapacitySettings, company: Mapping[str, set[str]]
) -> NodeVerdict:
    free = room.free

    def refused(reason: str, why: str) -> NodeVerdict:
        return NodeVerdict(room.name, 0, why, reason, free.vcpus, free.memory_mib)

    ruled = _ruled_out(room, terms, company)
    if ruled is not None:
        return refused(*ruled)
    if room.max_vcpus and shape.vcpus > room.max_vcpus:
        return refused("max vcpus", f"takes guests of at most {room.max_vcpus} vCPU")
    found = capacity_left(shape, settings, free)
    if not found.vms:
        words = {"memory": f"{free.memory_mib} MiB free", "vcpus": f"{free.vcpus} vCPU free", "ips": "has no free IP"}
        return refused(found.limit, words.get(found.limit, f"no {found.limit} left"))
    if terms.start and room.free_starts is not None and room.free_starts < 1:
        return refused("starts", "has as many starts under way as it may")
    return NodeVerdict(room.name, found.vms, "", "", free.vcpus, free.memory_mib)


def _ruled_out(room: NodeRoom, terms: Terms, company: Mapping[str, set[str]]) -> tuple[str, str] | None:
    """The first rule that keeps the VM off this server node, in one word and in words."""
    if terms.pin and room.name != terms.pin:
        return "unpinned", "is not the pinned server node"
    if room.name in terms.exclude:
        return "excluded", "is excluded"
    if not room.schedulable:
        return room.state, room.state
    missing = [tag for tag in terms.node_tags if tag not in room.tags]
    if missing:
        return f"tag {missing[0]}", f"lacks tag {missing[0]}"
    for tag in terms.shuns:
        if _others(room, tag, terms):
            return f"apart {tag}", apart_words(tag)
    for tag, there in company.items():
        if there and room.name not in there:
            return f"together {tag}", together_words(tag)
    return None


def _others(room: NodeRoom, tag: str, terms: Terms) -> bool:
    return bool(room.members.get(tag, frozenset()) - {terms.vm})


def apart_words(mark: str) -> str:
    if mark.startswith("!"):
        return f"runs a VM that is kept apart from tag {mark[1:]}"
    return f"runs a VM tagged {mark}, to be kept apart"


def together_words(tag: str) -> str:
    return f"runs no VM tagged {tag}, to be kept together"


def pool_load(nodes: Iterable[NodeRoom]) -> float:
    """Promised share of memory or vCPU, whichever is scarcer, over the nodes that take guests."""
    rooms = [n for n in nodes if n.schedulable]
    memory, vcpus = sum(n.total_memory_mib for n in rooms), sum(n.total_vcpus for n in rooms)
    if not memory or not vcpus:
        return 1.0
    return 1 - min(sum(n.free.memory_mib for n in rooms) / memory, sum(n.free.vcpus for n in rooms) / vcpus)


def judge_pool(candidate: Candidate, request: HomeRequest, settings: CapacitySettings) -> PoolVerdict:
    nodes = judge_nodes(candidate.nodes, request.shape, request.terms, settings)
    vms = sum(n.vms for n in nodes)
    why = ""
    if request.pin and candidate.domain_node != request.pin:
        why = "is not the pinned domain node"
    elif candidate.domain_node in request.exclude:
        why = "excluded"
    elif candidate.free_disk_bytes is not None and candidate.free_disk_bytes < request.shape.disk_bytes:
        why = f"storage can promise {max(0, candidate.free_disk_bytes)} more bytes"
    elif candidate.free_ports is not None and candidate.free_ports < 1:
        why = "no console port is free"
    elif not vms:
        why = ", ".join(f"{n.node} {n.why}" for n in nodes) or "it has no server node"
    if candidate.free_ports is not None:
        vms = min(vms, candidate.free_ports)
    if candidate.free_disk_bytes is not None and request.shape.disk_bytes:
        vms = min(vms, max(0, candidate.free_disk_bytes) // request.shape.disk_bytes)
    return PoolVerdict(
        candidate.domain_node, why, 0 if why else vms, candidate.has_image, pool_load(candidate.nodes), nodes
    )


def choose_domain_node(candidates: Sequence[Candidate], request: HomeRequest, settings: CapacitySettings) -> Choice:
    """The home of a new VM: of the pools that really fit (all ``count`` where any does), one that has the image, then
    by balance: the least loaded (``spread``; from ``FULL`` on one after the other) or the most (``pack``)."""
    return choose_among([judge_pool(candidate, request, settings) for candidate in candidates], request)


def choose_among(verdicts: Sequence[PoolVerdict], request: HomeRequest) -> Choice:
    """``choose_domain_node`` for who keeps the verdicts of pools nothing was placed in since."""

    def balance(load: float) -> float:
        return load if request.order == "spread" and load < FULL else 2 - load

    def rank(v: PoolVerdict) -> tuple[bool, bool, bool, float, str]:
        return bool(v.why), v.vms < request.count, not v.has_image, balance(v.load), v.domain_node

    ranked = sorted(verdicts, key=rank)
    chosen = ranked[0].domain_node if ranked and not ranked[0].why else None
    return Choice(chosen, tuple(ranked))


def split_over_pools(
    candidates: Sequence[Candidate], request: HomeRequest, settings: CapacitySettings
) -> tuple[Mapping[str, int], int]:
    """Where ``count`` VMs go when no pool takes them all: domain node -> how many, and how many found no room.
    Pools are filled in the order ``choose_domain_node`` ranks them."""
    left, plan = request.count, {}
    for verdict in choose_domain_node(candidates, request, settings).verdicts:
        take = 0 if verdict.why else min(left, verdict.vms)
        if take:
            plan[verdict.domain_node] = take
            left -= take
    return plan, left


def put_on(
    candidate: Candidate, node: str, shape: Shape, settings: CapacitySettings, terms: Terms, *, times: int = 1
) -> Candidate:
    """The domain node with ``times`` more VMs of ``shape`` on this server node (-1: one fewer)."""
    need = need_of(shape, settings)
    nodes = tuple(_with(n, need, terms, times) if n.name == node else n for n in candidate.nodes)
    return replace(
        candidate, nodes=nodes, free_ports=_less(candidate.free_ports, times),
        free_disk_bytes=_less(candidate.free_disk_bytes, times * shape.disk_bytes),
        free_starts=_less(candidate.free_starts, times) if terms.start else candidate.free_starts,
    )  # fmt: skip


def _with(room: NodeRoom, need: Need, terms: Terms, times: int) -> NodeRoom:
    free = replace(
        room.free, memory_mib=room.free.memory_mib - times * need.memory_mib,
        vcpus=room.free.vcpus - times * need.vcpus, ips=_less(room.free.ips, times),
    )  # fmt: skip
    members = dict(room.members)
    for mark in terms.marks:
        there = members.get(mark, frozenset())
        # A VM that has no id yet is somebody else than the next one.
        members[mark] = there | {terms.vm or f"#{len(there)}"} if times > 0 else there - {terms.vm}
    starts = _less(room.free_starts, times) if terms.start else room.free_starts
    return replace(room, free=free, members=members, free_starts=starts)


def _less(amount: int | None, by: int) -> int | None:
    return None if amount is None else amount - by


def n_plus_one(per_node: Mapping[str, int]) -> int:
    """How many VMs of one profile fit when the server node that takes most is kept free."""
    return sum(per_node.values()) - max(per_node.values(), default=0)
