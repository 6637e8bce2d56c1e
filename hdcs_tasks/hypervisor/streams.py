"""The TCP connections through which a QEMU sends a move, and their end where the other side is not heard any more.

QEMU waits for the other side's answers with its main loop standing still (those of a disk that is let go, those of a
TLS handshake), without time-out or keepalive. If the other side gave the connection up while the network was cut, that
is for ever: the guest hangs, its monitor does not answer, and libvirt's call waits with it. So the kernel ends the
connection under it (``ss -K``; Linux with CONFIG_INET_DIAG_DESTROY, as Debian builds it): QEMU reads an error, libvirt
calls the move off, and the guest goes on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import libvirt
import psutil

from hdcs_tasks.hypervisor import processes
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.logs import logger

log = logger(__name__)

SILENT_S = 20.0
"""Heard of for that long by nothing, not even an acknowledgement: cut off. As long as for a connection to libvirtd."""

PORTS = range(49152, 49216)
"""Where a target listens for memory and disks: libvirt's own (migration_port_min and _max of qemu.conf)."""

_TO_TARGETS = f"( dport >= :{PORTS.start} and dport < :{PORTS.stop} )"
_TIMEOUT_S = 10.0
_POSTCOPY = (libvirt.VIR_DOMAIN_PAUSED_POSTCOPY, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED)
_LINE = re.compile(r"^\S+\s+\d+\s+\d+\s+(?P<local>\S+)\s+(?P<peer>\S+)\s+users:\((?P<users>.*?)\)\)\s")
_HEARD = re.compile(r"\blast(?:rcv|ack):(\d+)")


@dataclass(frozen=True)
class Stream:
    """One connection to a target: both ends as "address:port", who has it open, and since when nothing was heard."""

    local: str
    peer: str
    pids: tuple[int, ...]
    silent_s: float


def read(text: str) -> list[Stream]:
    """Those connections to a target among the lines of ``ss -HOtnpi``."""
    found = []
    for line in text.splitlines():
        seen = _LINE.match(line)
        if seen is None or _port(seen["peer"]) not in PORTS or _port(seen["local"]) in PORTS:
            continue
        pids = tuple(int(pid) for pid in re.findall(r"pid=(\d+)", seen["users"]))
        # Left out by ss where it is 0: heard this millisecond.
        heard = [int(ms) for ms in _HEARD.findall(line)]
        found.append(Stream(seen["local"], seen["peer"], pids, min(heard) / 1000 if len(heard) == 2 else 0.0))
    return found


def _port(end: str) -> int:
    return int(end.rpartition(":")[2])


def end_silent(host: Host, *, vm_id: str | None = None, silent_s: float = SILENT_S) -> list[str]:
    """End every connection to a target of the guests (of ``vm_id`` alone, if given) whose targets have all not been
    heard of for ``silent_s``; the ids of those guests. 0: whatever was heard.

    A guest whose memory is at the target already (post-copy) is left alone: it would lose it. Raises HypervisorRefused,
    Unavailable (``ss``) and what libvirt's errors become.
    """
    # Who has a connection open costs a look at every process of the host: asked only where there is one.
    if not processes.run(["ss", "-HOtn", _TO_TARGETS], timeout_s=_TIMEOUT_S).stdout.strip():
        return []
    seen = read(processes.run(["ss", "-HOtnpi", _TO_TARGETS], timeout_s=_TIMEOUT_S).stdout)
    by_guest = {guest: links for guest, links in _by_guest(seen).items() if vm_id in (None, guest)}
    silent = [guest for guest, links in by_guest.items() if min(link.silent_s for link in links) >= silent_s]
    ended = [guest for guest in silent if not _in_postcopy(host, guest)]
    for guest in ended:
        log.warning("target not heard of: its connections are ended", vm=guest, peers=[s.peer for s in by_guest[guest]])
        for link in by_guest[guest]:
            processes.run(["ss", "-HtnK", "src", link.local, "dst", link.peer], timeout_s=_TIMEOUT_S)
    return ended


def _by_guest(found: Iterable[Stream]) -> dict[str, list[Stream]]:
    by_guest: dict[str, list[Stream]] = defaultdict(list)
    for link in found:
        for guest in filter(None, map(_guest_of, link.pids)):
            by_guest[guest].append(link)
    return by_guest


def _guest_of(pid: int) -> str | None:
    """The id of the guest whose QEMU that is; None of another program, or one that has ended."""
    try:
        argv = psutil.Process(pid).cmdline()
    except psutil.Error:
        return None
    return argv[argv.index("-uuid") + 1] if "-uuid" in argv[:-1] else None


def _in_postcopy(host: Host, vm_id: str) -> bool:
    guest = host.lookup(vm_id)
    if guest is None:
        return False
    with libvirt_errors(f"look at guest {vm_id}"):
        state, reason = guest.state()
    return state == libvirt.VIR_DOMAIN_PAUSED and reason in _POSTCOPY
