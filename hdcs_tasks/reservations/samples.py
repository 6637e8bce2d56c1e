"""Samples: what monitoring saw last, and a short history. All of it may be lost, and ends by itself.

| key | type | what |
| --- | --- | --- |
| ``sample:node:<server node>`` | string | the newest sample as taken: JSON ``{node, at, host, storage, guests}`` |
| ``sample:host:<server node>`` | list | JSON ``{at, **host}``, newest first, at most ``kept`` |
| ``sample:vm:<vm id>`` | list | JSON array in the order of ``FIELDS``, newest first, at most ``kept`` |
| ``sample:look:<vm id>`` | string | who used it when it was last looked into: JSON, see ``monitor.node_idle.look`` |
| ``sweep:last`` | hash | sweep → JSON ``{at, took_s, period_s}`` of its last run to the end |
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hdcs_tasks.reservations.link import Link
from hdcs_tasks.reservations.scripts import Value

FIELDS = (
    "at", "node", "state", "cpu_percent", "console_clients", "memory_mib", "unused_mib", "rss_mib", "disk_bytes_s",
    "net_bytes_s", "partial", "looked",
)  # fmt: skip
"""Of one VM: Unix time, server node, running | paused, CPU in percent of one vCPU, console clients, guest memory and
what of it is free, host memory of its QEMU, bytes per second read and written, received and sent; rates are null where
there was no sample before; ``looked``: idle reclamation looked into the guest meanwhile. New fields go to the end."""

_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Samples:
    """Samples of server nodes and VMs, each with a time to live."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def write(self, sample: Mapping[str, Any], *, kept: int, ttl_s: float) -> float:
        """One server node's sample, in one round trip: ``{node, at, host, storage, guests: [{vm_id, **FIELDS}]}``.
        Returns how many seconds this host's clock is ahead of that of Redis, as far as the round trip tells."""
        node, at = str(sample["node"]), sample["at"]
        keys = [self._link.key("sample", "node", node), self._link.key("sample", "host", node)]
        rows: list[Value] = [_encode(sample), _encode({"at": at, **sample["host"]})]
        for guest in sample["guests"]:
            known = {**guest, "at": at, "node": node}
            keys.append(self._link.key("sample", "vm", guest["vm_id"]))
            rows.append(_encode([known.get(field) for field in FIELDS]))
        before = time.time()
        seconds, micros = self._link.call("sample_write", keys, kept, round(ttl_s * 1000), *rows)
        return (before + time.time()) / 2 - (int(seconds) + int(micros) / 1e6)

    def node(self, name: str) -> dict[str, Any] | None:
        """The newest sample of a server node; None: none that is fresh enough."""
        found = self._link.do("GET", self._link.key("sample", "node", name))
        return None if found is None else dict(json.loads(found))

    def nodes(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The newest samples of those server nodes that have one."""
        if not names:
            return {}
        found = self._link.do("MGET", *(self._link.key("sample", "node", name) for name in names))
        return {name: json.loads(text) for name, text in zip(names, found, strict=True) if text is not None}

    def hosts(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The newest ``{at, **host}`` of those server nodes that have one, without their guests."""
        found = self._link.commands([("LINDEX", self._link.key("sample", "host", name), 0) for name in names])
        return {name: json.loads(text) for name, text in zip(names, found, strict=True) if text is not None}

    def host_history(self, name: str, limit: int = 100) -> list[dict[str, Any]]:
        """``{at, **host}`` of a server node, newest first."""
        return [json.loads(text) for text in self._link.do(
            "LRANGE", self._link.key("sample", "host", name), 0, limit - 1)]  # fmt: skip

    def vms(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The newest sample of each of these VMs that has one."""
        found = self._link.commands([("LINDEX", self._link.key("sample", "vm", vm_id), 0) for vm_id in ids])
        return {vm_id: _row(text) for vm_id, text in zip(ids, found, strict=True) if text is not None}

    def vm_history(self, vm_id: str, limit: int = 100) -> list[dict[str, Any]]:
        """Samples of one VM, newest first."""
        return [_row(text) for text in self._link.do("LRANGE", self._link.key("sample", "vm", vm_id), 0, limit - 1)]

    def write_looks(self, looks: Sequence[Mapping[str, Any]], *, at: float, ttl_s: float) -> None:
        """What was seen inside guests: ``[{vm_id, …}]``, all at the same time ``at`` (Unix)."""
        self._link.commands([
            ("SET", self._link.key("sample", "look", look["vm_id"]), _encode({**look, "at": at}), "PX",
             round(ttl_s * 1000))
            for look in looks
        ])  # fmt: skip

    def looks(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The newest look into each of these VMs that has one: ``{at, vm_id, …}``."""
        found = self._link.commands([("GET", self._link.key("sample", "look", vm_id)) for vm_id in ids])
        return {vm_id: json.loads(text) for vm_id, text in zip(ids, found, strict=True) if text is not None}

    def swept(self, name: str, at: float, took_s: float, period_s: float) -> None:
        """A sweep has run to its end."""
        told = _encode({"at": at, "took_s": round(took_s, 3), "period_s": period_s})
        self._link.do("HSET", self._link.key("sweep", "last"), name, told)

    def sweeps(self) -> dict[str, dict[str, float]]:
        """Of every sweep that ever ran: when it last did, how long it took and how often it is to run."""
        pairs = self._link.pairs(self._link.do("HGETALL", self._link.key("sweep", "last")))
        return {name: json.loads(text) for name, text in pairs.items()}

    def clock_skew_s(self) -> float:
        """How far this host's clock is ahead of that of Redis."""
        before = time.time()
        seconds, micros = self._link.do("TIME")
        return (before + time.time()) / 2 - (int(seconds) + int(micros) / 1e6)

    def queue_lengths(self, names: Sequence[str]) -> dict[str, int]:
        """Messages that wait in each of these queues."""
        found = self._link.commands([("LLEN", self._link.prefix + name) for name in names])
        return {name: int(length) for name, length in zip(names, found, strict=True)}


def _row(text: str) -> dict[str, Any]:
    # An older row may be shorter.
    return dict(zip(FIELDS, json.loads(text), strict=False))
