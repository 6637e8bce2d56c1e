"""Watching a server node's guests: one bulk sample per sweep, and libvirt's own events in between."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.hypervisor import agent, guests, stats
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.events import GuestEvent, Watch
from hdcs_tasks.hypervisor.stats import GuestSample
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor.node_clients import console_clients
from hdcs_tasks.operations.node import NodeContext
from hdcs_tasks.operations.sending import send
from hdcs_tasks.pool.node import storage_facts
from hdcs_tasks.routing import CONTROL

log = logger(__name__)

LEAST_APART_S = 0.5
"""Rates between samples closer together would be noise."""


looked_at: dict[str, float] = {}
"""When idle reclamation last looked into a guest, by this process: the guest worked for that, not for a user."""


@dataclass(frozen=True)
class _Seen:
    """A guest as the sample before saw it."""

    at: float
    run: int
    cpu_ns: int
    disk_bytes: int
    net_bytes: int


class Sampler:
    """Samples of one process; rates are between its own last two. Each run of a guest is asked for its port once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}
        self._ports: dict[tuple[str, int], int | None] = {}
        self._host: tuple[float, int, int] | None = None
        self.clock_skew_s: float | None = None

    def sample(self, host: Host, node: str) -> dict[str, Any]:
        """What runs here and how busy the host is: ``{node, at, host, guests}``, guests as ``Samples.FIELDS`` and
        ``{vm_id, console_port}``. Asks libvirt one question for all guests."""
        found = [guest for guest in stats.sample(host) if guest.state in ("running", "paused")]
        ports = self._console_ports(host, found)
        clients = console_clients()
        at = time.time()
        with self._lock:
            guests_seen = [self._guest(guest, at, port, clients.get(port, 0)) for guest, port in ports]
            self._seen = {guest.vm_id: _seen(guest, at) for guest, _ in ports}
            for gone in looked_at.keys() - self._seen.keys():
                looked_at.pop(gone, None)
            return {"node": node, "at": at, "host": self._host_facts(at), "guests": guests_seen}

    def _console_ports(self, host: Host, found: list[GuestSample]) -> list[tuple[GuestSample, int]]:
        """HDCS's own guests among those found, each with its console port."""
        with self._lock:
            known = self._ports
        ports = {}
        for guest in found:
            key = (guest.vm_id, guest.run)
            ports[key] = known[key] if key in known else guests.console_port(host, guest.vm_id)
        with self._lock:
            self._ports = ports
        return [(guest, port) for guest in found if (port := ports[guest.vm_id, guest.run]) is not None]

    def _guest(self, guest: GuestSample, at: float, port: int, clients: int) -> dict[str, Any]:
        before = self._seen.get(guest.vm_id)
        now = _seen(guest, at)
        cpu = disk = net = None
        if before is not None and before.run == now.run and now.at - before.at >= LEAST_APART_S:
            span_s = now.at - before.at
            cpu = round(max(0, now.cpu_ns - before.cpu_ns) / 1e7 / span_s, 2)
            if not guest.partial:
                disk = round(max(0, now.disk_bytes - before.disk_bytes) / span_s)
                net = round(max(0, now.net_bytes - before.net_bytes) / span_s)
        return {
            "vm_id": guest.vm_id, "state": guest.state, "cpu_percent": cpu, "console_clients": clients,
            "memory_mib": guest.memory_mib, "unused_mib": guest.unused_mib, "rss_mib": guest.rss_mib,
            "disk_bytes_s": disk, "net_bytes_s": net, "partial": guest.partial, "console_port": port,
            "looked": before is not None and looked_at.get(guest.vm_id, 0.0) >= before.at,
        }  # fmt: skip

    def _host_facts(self, at: float) -> dict[str, Any]:
        memory, net = psutil.virtual_memory(), psutil.net_io_counters(nowrap=True)
        totals = (net.bytes_recv, net.bytes_sent) if net is not None else (0, 0)
        before, self._host = self._host, (at, *totals)
        span_s = at - before[0] if before is not None else 0.0
        rates: tuple[int | None, int | None] = (None, None)
        if before is not None and span_s >= LEAST_APART_S:
            rates = (max(0, round((totals[0] - before[1]) / span_s)), max(0, round((totals[1] - before[2]) / span_s)))
        return {
            "cpu_percent": psutil.cpu_percent(None), "load_1m": round(os.getloadavg()[0], 2),
            "memory_total_mib": memory.total >> 20, "memory_available_mib": memory.available >> 20,
            "net_rx_bytes_s": rates[0], "net_tx_bytes_s": rates[1],
        }  # fmt: skip


def _seen(guest: GuestSample, at: float) -> _Seen:
    return _Seen(
        at, guest.run, guest.cpu_ns, guest.disk_read_bytes + guest.disk_write_bytes,
        guest.net_rx_bytes + guest.net_tx_bytes,
    )  # fmt: skip


_sampler = Sampler()


def sample(ctx: NodeContext) -> None:
    """Sample every guest of this node into Redis, in one pipeline, and tell control that it is there."""
    config = ctx.settings
    found = _sampler.sample(ctx.host(), ctx.server_node) | {"storage": storage_facts(ctx)}
    found["host"]["clock_skew_s"] = _sampler.clock_skew_s  # of the sample before: asking by itself is a round trip
    skew_s = ctx.reservations.samples.write(
        found, kept=config.samples_kept, ttl_s=config.samples_kept * config.sample_s
    )
    _sampler.clock_skew_s = round(skew_s, 3)
    message = {"node": ctx.server_node, "at": found["at"]}
    send(ctx.celery, "monitor.sampled", {"sample": message}, CONTROL, expires_s=60)


class Watcher:
    """A thread that keeps libvirt's events flowing to control, over lost connections and libvirtd restarts.

    ``booted``: told of each VM whose agent came up, before control is."""

    def __init__(self, ctx: NodeContext, booted: Callable[[str], None]) -> None:
        self._ctx = ctx
        self._booted = booted
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guest-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        watched: Host | None = None
        while not self._stop.is_set():
            try:
                host = self._ctx.host()
                if host is not watched:
                    Watch(host, self._told).open()
                    watched = host
                    self._tell_present(host)
            except HdcsError as error:
                watched = None
                log.warning("guests are not watched", error=str(error))
            self._stop.wait(2.0)

    def _tell_present(self, host: Host) -> None:
        """What came up while nobody listened."""
        for guest in guests.list_guests(host):
            if guest.active and agent.ping(host, guest.vm_id, 2):
                self._send("agent_up", guest.vm_id, heard=False)

    def _told(self, event: GuestEvent) -> None:
        if event.kind == "agent_up":
            self._booted(event.vm_id)
        self._send(event.kind, event.vm_id)

    def _send(self, kind: str, vm_id: str, *, heard: bool = True) -> None:
        message: dict[str, Any] = {
            "node": self._ctx.server_node, "vm_id": vm_id, "kind": kind, "at": time.time(), "heard": heard,
        }  # fmt: skip
        try:
            send(self._ctx.celery, "monitor.guest_event", {"event": message}, CONTROL, expires_s=300)
        except Exception as error:  # noqa: BLE001 - broker errors come in many classes; the next sample tells it too
            log.warning("guest event not sent", vm=vm_id, kind=kind, error=str(error))
