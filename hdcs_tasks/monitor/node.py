"""Watching a server node's guests: one bulk sample per sweep, and libvirt's own events in between."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from typing import Any

import psutil

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.hypervisor import agent, guests, stats
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.events import GuestEvent, Watch
from hdcs_tasks.hypervisor.stats import GuestSample
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import NodeContext
from hdcs_tasks.operations.sending import send
from hdcs_tasks.pool.node import storage_facts
from hdcs_tasks.routing import CONTROL

log = logger(__name__)

_last: dict[str, tuple[float, int]] = {}
_lock = threading.Lock()


def sample(ctx: NodeContext) -> None:
    """Sample every guest of this node and send it to control: ``{node, at, guests, storage}``."""
    host = ctx.host()
    found = [guest for guest in stats.sample(host) if guest.state in ("running", "paused")]
    ports = {guest.vm_id: guest.console_port for guest in guests.list_guests(host)}
    clients = _console_clients()
    at = time.time()
    shown = [
        asdict(guest) | {"cpu_percent": _cpu_percent(guest, at), "console_clients": clients.get(ports[guest.vm_id], 0)}
        for guest in found if guest.vm_id in ports
    ]  # fmt: skip
    message = {"node": ctx.server_node, "at": at, "guests": shown, "storage": storage_facts(ctx)}
    send(ctx.celery, "monitor.sampled", {"sample": message}, CONTROL, expires_s=60)


def _cpu_percent(guest: GuestSample, at: float) -> float | None:
    """CPU time since this process's last sample of the guest, in percent of one vCPU; None for the first."""
    with _lock:
        before = _last.get(guest.vm_id)
        _last[guest.vm_id] = (at, guest.cpu_ns)
    if before is None or guest.cpu_ns < before[1] or at - before[0] < 0.5:
        return None
    return 100.0 * (guest.cpu_ns - before[1]) / 1e9 / (at - before[0]) / max(1, guest.vcpus)


def _console_clients() -> dict[int, int]:
    """Established TCP connections by local port: who looks at a console right now."""
    counts: dict[int, int] = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED and connection.laddr:
            counts[connection.laddr.port] = counts.get(connection.laddr.port, 0) + 1
    return counts


class Watcher:
    """A thread that keeps libvirt's events flowing to control, over lost connections and libvirtd restarts."""

    def __init__(self, ctx: NodeContext) -> None:
        self._ctx = ctx
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
                self._send("agent_up", guest.vm_id)

    def _told(self, event: GuestEvent) -> None:
        self._send(event.kind, event.vm_id)

    def _send(self, kind: str, vm_id: str) -> None:
        message: dict[str, Any] = {"node": self._ctx.server_node, "vm_id": vm_id, "kind": kind, "at": time.time()}
        try:
            send(self._ctx.celery, "monitor.guest_event", {"event": message}, CONTROL, expires_s=300)
        except Exception as error:  # noqa: BLE001 - broker errors come in many classes; the next sample tells it too
            log.warning("guest event not sent", vm=vm_id, kind=kind, error=str(error))
