"""Capacity and the choice of a domain node: pure decisions, values in, values out.

Layer one (here) chooses the domain node of a new VM: a pool with a server node that really fits, not the one with the
most free memory in sum. Layer two, the server node, is chosen and claimed in one Redis script
(reservations/pool_place.lua).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from hdcs_tasks.config import CapacitySettings


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
    """What one VM asks for. ``disk_bytes``: its virtual disk; ``graphics``: graphics devices."""

    vcpus: int
    memory_mib: int
    graphics: int = 1
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Free:
    """What is left: on a server node, or (ports, disk) in its domain node. None: not limited."""

    vcpus: int
    memory_mib: int
    ips: int | None = None
    ports: int | None = None
    disk_bytes: int | None = None


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
    need = memory_need_mib(shape.memory_mib, shape.vcpus, shape.graphics, settings)
    limits = [(free.memory_mib // need, "memory"), (free.vcpus // shape.vcpus, "vcpus")]
    if free.ips is not None:
        limits.append((free.ips, "ips"))
    if free.ports is not None:
        limits.append((free.ports, "ports"))
    if free.disk_bytes is not None and shape.disk_bytes:
        limits.append((free.disk_bytes // shape.disk_bytes, "disk"))
    vms, limit = min(limits, key=lambda pair: pair[0])
    return Capacity(max(0, vms), limit)


# ---- one domain node


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """A server node as layer one sees it. ``total_memory_mib`` and ``total_vcpus``: what may be promised in all."""

    name: str
    free: Free
    total_vcpus: int
    total_memory_mib: int
    schedulable: bool = True
    max_vcpus: int = 0
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A domain node with its server nodes and what is left of ports and storage. ``has_image``: no copy needed."""

    domain_node: str
    nodes: tuple[NodeRoom, ...]
    free_ports: int | None = None
    free_disk_bytes: int | None = None
    has_image: bool = False


@dataclass(frozen=True, slots=True)
class HomeRequest:
    """What layer one looks for. ``exclude``: domain nodes that refused; ``pin``: this one or none."""

    shape: Shape
    count: int = 1
    pin: str | None = None
    exclude: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    order: Literal["pack", "spread"] = "spread"


class NodeVerdict(NamedTuple):
    """Why a server node cannot take the VM in words; '' where it can."""

    node: str
    vms: int
    why: str


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


def judge_node(room: NodeRoom, request: HomeRequest, settings: CapacitySettings) -> NodeVerdict:
    shape = request.shape
    if not room.schedulable:
        return NodeVerdict(room.name, 0, "draining")
    missing = [tag for tag in request.tags if tag not in room.tags]
    if missing:
        return NodeVerdict(room.name, 0, f"lacks tag {missing[0]}")
    if room.max_vcpus and shape.vcpus > room.max_vcpus:
        return NodeVerdict(room.name, 0, f"takes guests of at most {room.max_vcpus} vCPU")
    found = capacity_left(shape, settings, room.free)
    if found.vms:
        return NodeVerdict(room.name, found.vms, "")
    words = {
        "memory": f"{room.free.memory_mib} MiB free",
        "vcpus": f"{room.free.vcpus} vCPU free",
        "ips": "has no free IP",
    }
    return NodeVerdict(room.name, 0, words.get(found.limit, f"no {found.limit} left"))


def pool_load(nodes: Iterable[NodeRoom]) -> float:
    """Promised share of memory or vCPU, whichever is scarcer, over the nodes that take guests."""
    rooms = [n for n in nodes if n.schedulable]
    memory, vcpus = sum(n.total_memory_mib for n in rooms), sum(n.total_vcpus for n in rooms)
    if not memory or not vcpus:
        return 1.0
    return 1 - min(sum(n.free.memory_mib for n in rooms) / memory, sum(n.free.vcpus for n in rooms) / vcpus)


def judge_pool(candidate: Candidate, request: HomeRequest, settings: CapacitySettings) -> PoolVerdict:
    nodes = tuple(judge_node(room, request, settings) for room in candidate.nodes)
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
    verdicts = [judge_pool(candidate, request, settings) for candidate in candidates]

    def balance(load: float) -> float:
        return load if request.order == "spread" and load < FULL else 2 - load

    def rank(v: PoolVerdict) -> tuple[bool, bool, bool, float, str]:
        return bool(v.why), v.vms < request.count, not v.has_image, balance(v.load), v.domain_node

    verdicts.sort(key=rank)
    chosen = verdicts[0].domain_node if verdicts and not verdicts[0].why else None
    return Choice(chosen, tuple(verdicts))


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


def with_one_more(candidate: Candidate, shape: Shape, settings: CapacitySettings) -> Candidate:
    """The domain node after one more VM of ``shape``, on the fitting server node with most memory left (as ``spread``
    places it): what layer one plans the next VM of a bulk request with."""
    need = memory_need_mib(shape.memory_mib, shape.vcpus, shape.graphics, settings)
    fitting = [n for n in candidate.nodes if n.schedulable and capacity_left(shape, settings, n.free).vms]
    if not fitting:
        return candidate
    best = max(fitting, key=lambda n: (n.free.memory_mib, n.free.vcpus))
    ips = None if best.free.ips is None else best.free.ips - 1
    free = replace(best.free, memory_mib=best.free.memory_mib - need, vcpus=best.free.vcpus - shape.vcpus, ips=ips)
    return replace(
        candidate, nodes=tuple(replace(n, free=free) if n is best else n for n in candidate.nodes),
        free_ports=None if candidate.free_ports is None else candidate.free_ports - 1,
        free_disk_bytes=None if candidate.free_disk_bytes is None else candidate.free_disk_bytes - shape.disk_bytes,
    )  # fmt: skip


def explain(choice: Choice, shape: Shape, profile: str = "") -> str:
    """The choice in words: why this pool, or why none, naming every server node."""
    name = f"profile {profile} " if profile else ""
    wanted = f"{name}({shape.vcpus} vCPU, {shape.memory_mib} MiB)"
    if choice.domain_node is None:
        refused = "; ".join(f"{v.domain_node}: {v.why}" for v in choice.verdicts)
        return f"no domain node fits {wanted}: {refused or 'there is none'}"
    best = choice.verdicts[0]
    image = "has the image" if best.has_image else "needs the image brought"
    others = "; ".join(f"{v.domain_node}: {v.why or f'{v.vms} fit, load {v.load:.0%}'}" for v in choice.verdicts[1:])
    return f"{best.domain_node} takes {wanted}: {best.vms} fit, {image}, load {best.load:.0%}" + (
        f". Others: {others}" if others else ""
    )


def n_plus_one(per_node: Mapping[str, int]) -> int:
    """How many VMs of one profile fit when the server node that takes most is kept free."""
    return sum(per_node.values()) - max(per_node.values(), default=0)
