"""Reservations, leases and step claims in Redis. All of it can be lost: ``Reservations.rebuild`` writes it again.

One Redis primary (no Cluster: scripts reach keys of several owners). Lua files stand beside the Python that calls them;
each names every key it touches.
"""

from __future__ import annotations

from collections.abc import Collection

import redis

from hdcs_tasks.config import Settings
from hdcs_tasks.reservations import rebuild as _rebuild
from hdcs_tasks.reservations.addresses import AddressBook, Addresses
from hdcs_tasks.reservations.epoch import Epoch
from hdcs_tasks.reservations.leases import Leases
from hdcs_tasks.reservations.link import Link, connect
from hdcs_tasks.reservations.marks import Marks
from hdcs_tasks.reservations.model import (
    Check,
    Claim,
    ClaimAnswer,
    Fence,
    MixEntry,
    NodeCapacity,
    Orphans,
    Placed,
    PlaceRequest,
    PoolNode,
    PoolNodeView,
    PoolSnapshot,
    PortUsage,
    Snapshot,
    Standing,
    StepStatus,
    Weighed,
)
from hdcs_tasks.reservations.names import Disks, Macs, Ports, Subnets
from hdcs_tasks.reservations.notes import Notes
from hdcs_tasks.reservations.pool import Pool
from hdcs_tasks.reservations.samples import Samples
from hdcs_tasks.reservations.steps import Steps

__all__ = [
    "Addresses", "Check", "Claim", "ClaimAnswer", "Fence", "MixEntry", "NodeCapacity", "Orphans", "PlaceRequest",
    "Placed", "PoolNode", "PoolNodeView", "PoolSnapshot", "PortUsage", "Reservations", "Snapshot", "Standing",
    "StepStatus", "Weighed",
]  # fmt: skip


class Reservations:
    """Everything HDCS keeps in Redis beside its messages. Safe to share between threads.

    Errors of every method: Unreachable (Redis does not answer), RebuildPending (allocating methods, while closed).
    """

    def __init__(self, client: redis.Redis, prefix: str = "hdcs:", mac_prefix: str = "52:54:00") -> None:
        """``client`` must decode responses; ``from_settings`` makes a fitting one."""
        self._link = Link(client, prefix)
        self.epoch = Epoch(self._link)
        self.leases = Leases(self._link)
        self.steps = Steps(self._link)
        self.macs = Macs(self._link, mac_prefix)
        self.subnets = Subnets(self._link)
        self.ports = Ports(self._link)
        self.disks = Disks(self._link)
        self.notes = Notes(self._link)
        self.addresses = AddressBook(self._link, mac_prefix)
        self.pool = Pool(self._link, self.macs.propose)
        self.marks = Marks(self._link)
        self.samples = Samples(self._link)

    @classmethod
    def from_settings(cls, settings: Settings) -> Reservations:
        return cls(connect(settings.redis_url), settings.key_prefix, settings.mac_prefix)

    def rebuild(self, snapshot: Snapshot, port_cooling_s: float = 120.0, token: str | None = None) -> None:
        """Replace every reservation by the snapshot's and open the epoch; allocation is closed until it is done.

        Server nodes that registered but are not in the snapshot stay registered. Ports of VMs without a claim cool for
        ``port_cooling_s`` from now; IPs that cooled are free again, but given out after all never used. Invalid: the
        snapshot gives something twice. ``token``: of ``epoch.take_rebuild``, asked for before the snapshot was read;
        Conflict: somebody else has taken the rebuild in hand since. If Redis restarts meanwhile allocation stays
        closed: rebuild again. Steps and leases are left alone.
        """
        _rebuild.rebuild(self._link, self.epoch, self.dump(), snapshot, port_cooling_s, token)

    def dump(self) -> Snapshot:
        """Every reservation as it stands."""
        pools = sorted({*self.pool.domain_nodes(), *self.ports.ranges()})
        return Snapshot(self.macs.all(), self.subnets.all(), {d: self._dump_pool(d) for d in pools})

    def _dump_pool(self, domain_node: str) -> PoolSnapshot:
        first, last = self.ports.ranges().get(domain_node, (0, 0))
        nodes = tuple(
            PoolNode(n.name, n.vcpus, n.memory_mib, n.subnet, n.starts_ceiling, n.schedulable, n.tags, n.min_starts)
            for n in self.pool.nodes(domain_node)
        )
        claims = tuple(self.pool.claims(domain_node))
        return PoolSnapshot(first, last, nodes, claims, self.ports.all(domain_node), self.disks.all(domain_node),
                            self.marks.all(domain_node), self.pool.start_limit(domain_node))  # fmt: skip

    def orphans(self, vms: Collection[str]) -> Orphans:
        """Reservations of VMs not among ``vms`` (all that exist). Cooling ports are no orphans."""
        return _rebuild.orphans(self.dump(), {d: self.ports.cooling(d) for d in self.ports.ranges()}, set(vms))
