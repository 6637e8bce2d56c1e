"""Values the reservations take and give. Plain data: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple


class ClaimAnswer(StrEnum):
    """Answer to ``Steps.claim``. Only ``claimed`` allows work."""

    CLAIMED = "claimed"
    TAKEN = "taken"
    STALE = "stale"
    MISSING = "missing"
    DONE = "done"
    CANCELLED = "cancelled"


Check = Literal["ok", "lost", "cancel"]


class StepStatus(NamedTuple):
    """What Redis knows of a step. ``leased``: the holder's lease lives. ``percent`` 0 to 100."""

    attempt: int
    holder: str | None
    node: str | None
    leased: bool
    done: bool
    cancel: bool
    percent: float | None
    phase: str
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class PoolNode:
    """A server node as its pool counts it: what may be promised to guests (after overcommit and host reserve).

    ``subnet`` in CIDR text, '' for none; ``max_starts`` 0 for no limit; ``min_starts``: down to which the node itself
    may lower it for a while (0: it may not); ``tags`` lower-case words.
    """

    name: str
    vcpus: int
    memory_mib: int
    subnet: str = ""
    max_starts: int = 0
    schedulable: bool = True
    tags: tuple[str, ...] = ()
    min_starts: int = 0


@dataclass(frozen=True, slots=True)
class PoolNodeView:
    """A server node with what is claimed on it and what is free. ``starts``: starts under way (0 where unlimited);
    ``max_starts``: the bound in force, between ``min_starts`` and ``starts_ceiling``."""

    name: str
    vcpus: int
    memory_mib: int
    free_vcpus: int
    free_memory_mib: int
    free_ips: int
    subnet: str
    max_starts: int
    starts: int
    schedulable: bool
    tags: tuple[str, ...]
    min_starts: int = 0
    starts_ceiling: int = 0


class MixEntry(NamedTuple):
    """One profile of the expected mix of VMs, with its share (any positive weight)."""

    vcpus: int
    memory_mib: int
    weight: float


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """What a VM needs of a server node. ``memory_mib`` counts the per-VM overhead in.

    ``step`` names the request: asked again, the same placement. ``pin``: this server node or none. ``prefer``: this
    one if it has room.
    ``order``: ``pack`` fills nodes (room stays for big VMs), ``spread`` takes the emptiest.
    ``mix``: the VMs expected next; with it ``pack`` takes the node where the fewest of them are lost, and so does
    ``spread`` from when only three quarters of the nodes take the largest of them.
    ``tags``: a node must have them all. ``mac``: take the VM's MAC too.
    ``start_s``: how long a start counts against ``max_starts`` unless ``Pool.started`` says it ended; 0: is no start.
    ``marks``: what this VM is to others; ``shuns``: marks it must not meet on a node, ``seeks``: marks it must meet
    where another VM has them. ``told``: so many of the server nodes that were weighed are told. ``label``: what a
    refusal calls the VM ("profile small (128 MiB)"), ``hint``: what to do.
    """

    domain_node: str
    vm: str
    step: str
    vcpus: int
    memory_mib: int
    pin: str | None = None
    exclude: tuple[str, ...] = ()
    console_port: bool = True
    ip: bool = True
    mac: bool = False
    order: Literal["pack", "spread"] = "pack"
    mix: tuple[MixEntry, ...] = ()
    tags: tuple[str, ...] = ()
    start_s: float = 120.0
    marks: tuple[str, ...] = ()
    shuns: tuple[str, ...] = ()
    seeks: tuple[str, ...] = ()
    told: int = 0
    label: str = ""
    hint: str = ""
    prefer: str | None = None


class Weighed(NamedTuple):
    """A server node as the choice saw it. ``score``: future VMs lost by taking it (the least wins); None: the order
    alone decided. ``why``: what kept it out, '' where nothing did."""

    node: str
    free_vcpus: int
    free_memory_mib: int
    score: float | None
    why: str


class Fence(NamedTuple):
    """The attempt of a step that must be in its holder's hands for something to be done."""

    step: str
    attempt: int
    holder: str


class Placed(NamedTuple):
    """Where a VM goes. ``port`` 0, ``ip`` '' and ``mac`` '' where not asked for. ``weighed``: the best of those that
    were weighed, as the choice tried them; empty where not asked for, and where the VM held its claim already."""

    node: str
    port: int
    ip: str
    mac: str
    weighed: tuple[Weighed, ...] = ()


class Claim(NamedTuple):
    """What a VM holds on a server node. ``ip`` '' and ``port`` 0 where none."""

    domain_node: str
    vm: str
    node: str
    vcpus: int
    memory_mib: int
    port: int
    ip: str
    step: str


class Standing(NamedTuple):
    """What a pool looks like to a VM of one size: how many server nodes it has, how many of them take VMs at all, how
    many have room; and those layer two would take next, best first: (node, free vCPU, free MiB)."""

    nodes: int
    open: int
    fitting: int
    best: tuple[tuple[str, int, int], ...]


class PortUsage(NamedTuple):
    used: int
    cooling: int
    free: int


class NodeCapacity(NamedTuple):
    """How many more VMs of a shape fit, and what limits them: memory | vcpus | ips | draining | ports."""

    vms: int
    limit: str


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """One domain node's reservations. ``ports``: VM -> port; ``disks``: VM -> bytes; ``marks``: VM -> its marks;
    ``max_starts``: starts under way at once on its storage (0: no limit)."""

    port_first: int
    port_last: int
    nodes: tuple[PoolNode, ...] = ()
    claims: tuple[Claim, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)
    disks: Mapping[str, int] = field(default_factory=dict)
    marks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_starts: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every reservation, as record and world have it. ``macs``: VM -> MAC; ``subnets``: server node -> CIDR;
    ``pools``: by domain node."""

    macs: Mapping[str, str] = field(default_factory=dict)
    subnets: Mapping[str, str] = field(default_factory=dict)
    pools: Mapping[str, PoolSnapshot] = field(default_factory=dict)


class Orphans(NamedTuple):
    """Reservations whose owner is unknown to the asker: VMs, by kind; claims in full."""

    macs: tuple[str, ...]
    ports: tuple[tuple[str, str], ...]
    disks: tuple[tuple[str, str], ...]
    claims: tuple[Claim, ...]
