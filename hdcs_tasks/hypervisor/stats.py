"""What guests use, for a whole host in one question.

One hung QEMU blocks that question for the whole host (even with NOWAIT), so it is asked in a thread one can give up
on; what libvirt knows without asking any QEMU is then the answer. It has a connection of its own, as a call that hangs
slows the other calls of its connection down.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import libvirt

from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors

_GROUPS = (
    libvirt.VIR_DOMAIN_STATS_STATE
    | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
    | libvirt.VIR_DOMAIN_STATS_BALLOON
    | libvirt.VIR_DOMAIN_STATS_BLOCK
    | libvirt.VIR_DOMAIN_STATS_INTERFACE
)
_FLAGS = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
_PAUSED = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED)


@dataclass(frozen=True)
class GuestSample:
    """Totals since the guest's start: ``cpu_ns`` nanoseconds of CPU, bytes read, written, received, sent.

    ``memory_mib``: the guest's memory; ``unused_mib``: of it, what the guest calls free; ``rss_mib``: what its QEMU
    takes from the host; 0 where unknown. ``partial``: the host had a hung QEMU; only state, CPU and memory are known.
    ``run``: libvirt's number of this run of the guest; another number is another start.
    """

    vm_id: str
    name: str
    state: str
    cpu_ns: int
    vcpus: int
    memory_mib: int
    unused_mib: int = 0
    rss_mib: int = 0
    disk_read_bytes: int = 0
    disk_write_bytes: int = 0
    net_rx_bytes: int = 0
    net_tx_bytes: int = 0
    partial: bool = False
    run: int = 0


class _Question:
    """One getAllDomainStats in its own thread."""

    def __init__(self, own: Host) -> None:
        self.own = own
        self.answer: list[tuple[Any, dict[str, Any]]] | None = None
        self.error: libvirt.libvirtError | None = None
        self.thread = threading.Thread(target=self._ask, name="libvirt-stats", daemon=True)
        self.thread.start()

    def _ask(self) -> None:
        try:
            self.answer = self.own.conn.getAllDomainStats(_GROUPS, _FLAGS)
        except libvirt.libvirtError as error:
            self.error = error


_asked: WeakKeyDictionary[Host, _Question] = WeakKeyDictionary()
_asked_lock = threading.Lock()


def sample(host: Host, timeout_s: float = 3) -> list[GuestSample]:
    """A sample of every running guest of the host, at most ``timeout_s`` seconds later, by name.

    While a hung QEMU blocks the full question it is not asked a second time. Raises Unreachable.
    """
    with _asked_lock:
        last = _asked.get(host)
        if last is not None and last.thread.is_alive():
            pending = None
        else:
            own = last.own if last is not None and last.own.alive() else host.another()
            pending = _asked[host] = _Question(own)
    if pending is not None:
        pending.thread.join(timeout_s)
    if pending is None or pending.thread.is_alive():
        return _without_qemu(host)
    with libvirt_errors("sample guests"):
        if pending.error is not None:
            raise pending.error
        found = [_read(guest, values) for guest, values in pending.answer or ()]
    return sorted(found, key=lambda s: s.name)


def _total(values: dict[str, Any], group: str, name: str) -> int:
    count = int(values.get(f"{group}.count", 0))
    return sum(int(values.get(f"{group}.{n}.{name}", 0)) for n in range(count))


def _read(guest: Any, values: dict[str, Any]) -> GuestSample:
    return GuestSample(
        vm_id=guest.UUIDString(),
        name=guest.name(),
        state="paused" if values.get("state.state") in _PAUSED else "running",
        cpu_ns=int(values.get("cpu.time", 0)),
        vcpus=0,
        memory_mib=int(values.get("balloon.current", 0)) // 1024,
        unused_mib=int(values.get("balloon.unused", 0)) // 1024,
        rss_mib=int(values.get("balloon.rss", 0)) // 1024,
        disk_read_bytes=_total(values, "block", "rd.bytes"),
        disk_write_bytes=_total(values, "block", "wr.bytes"),
        net_rx_bytes=_total(values, "net", "rx.bytes"),
        net_tx_bytes=_total(values, "net", "tx.bytes"),
        run=guest.ID(),
    )


def _without_qemu(host: Host) -> list[GuestSample]:
    """What libvirt and the kernel know: enough to see who runs and who burns CPU."""
    found = []
    with libvirt_errors("sample guests"):
        guests = host.conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
    for guest in guests:
        try:
            state, _, memory_kib, vcpus, cpu_ns = guest.info()
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                continue  # it ended while we looked
            with libvirt_errors("sample guests"):
                raise
        shown = "paused" if state in _PAUSED else "running"
        vm_id, memory_mib = guest.UUIDString(), memory_kib // 1024
        found.append(GuestSample(vm_id, guest.name(), shown, cpu_ns, vcpus, memory_mib, partial=True, run=guest.ID()))
    return sorted(found, key=lambda s: s.name)
