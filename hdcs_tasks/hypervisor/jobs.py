"""libvirt's long jobs on a guest (migration, backup): watch, cancel, end, and find what a dead worker left.

A guest has at most one such job. It belongs to libvirtd, not to who asked for it: it goes on when the worker dies,
and any connection may watch or abort it. Figures come from ``virDomainGetJobStats``; bytes everywhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import libvirt

from hdcs_tasks.errors import Cancelled, HypervisorRefused, NotFound, OutcomeUnknown, WrongState
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.hypervisor.guests import active

# on_progress(percent 0..100, phase, seconds left or None). The first word of phase is the phase itself.
OnProgress = Callable[[float, str, float | None], None]
IsCancelled = Callable[[], bool]

POLL_S = 0.1
ABORT_TIMEOUT_S = 30.0
_MIB = 1024 * 1024
_NO_FIGURES = "backup job data missing"

_KINDS = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "migration_in",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "migration_out",
    libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: "backup",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
    libvirt.VIR_DOMAIN_JOB_OPERATION_START: "start",
    libvirt.VIR_DOMAIN_JOB_OPERATION_RESTORE: "restore",
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
}


@dataclass(frozen=True)
class JobInfo:
    """A job as libvirt shows it. ``kind``: migration_out, migration_in, backup, save, …; bytes and seconds.

    ``over``: it has succeeded or failed, and libvirt tidies up after it, which a cut network makes long. Until then no
    other job may begin. ``memory_to_come``: the guest's memory, while a migration copies disks first.
    """

    kind: str
    elapsed_s: float
    disk_total: int
    disk_done: int
    memory_total: int
    memory_left: int
    bytes_per_s: int
    iteration: int = 0
    over: bool = False
    memory_to_come: int = 0

    @property
    def phase(self) -> str:
        """ "prepare", "disk 12/27 MiB" or "memory 100/128 MiB": word first, so that it can be read and sorted."""
        if not self.disk_total and not self.memory_total:
            return "prepare"
        if self.disk_total and (self.disk_done < self.disk_total or not self.memory_total):
            return f"disk {self.disk_done // _MIB}/{self.disk_total // _MIB} MiB"
        done = self.memory_total - self.memory_left
        return f"memory {done // _MIB}/{self.memory_total // _MIB} MiB"

    @property
    def percent(self) -> float:
        total = self.disk_total + self.memory_total + self.memory_to_come
        left = max(self.disk_total - self.disk_done, 0) + self.memory_left + self.memory_to_come
        return 100.0 * (total - left) / total if total else 0.0

    @property
    def eta_s(self) -> float | None:
        """From the mean speed so far; None before anything moved."""
        percent = self.percent
        if percent <= 0 or self.elapsed_s <= 0:
            return None
        return self.elapsed_s * (100.0 - percent) / percent


def _info(stats: dict[str, Any], memory_to_come: int) -> JobInfo:
    return JobInfo(
        kind=_KINDS.get(stats.get("operation", 0), "other"),
        memory_to_come=memory_to_come,
        elapsed_s=stats.get("time_elapsed", 0) / 1000,
        disk_total=stats.get("disk_total", 0),
        disk_done=stats.get("disk_processed", 0),
        memory_total=stats.get("memory_total", 0),
        memory_left=stats.get("memory_remaining", 0),
        bytes_per_s=stats.get("memory_bps", 0) or stats.get("disk_bps", 0),
        iteration=stats.get("memory_iteration", 0),
        over=stats.get("type") not in (libvirt.VIR_DOMAIN_JOB_BOUNDED, libvirt.VIR_DOMAIN_JOB_UNBOUNDED),
    )


def job_of(guest: Any) -> JobInfo | None:
    """The job of ``guest`` (a virDomain), or None. A guest that vanished has none."""
    try:
        with libvirt_errors("ask for the guest's job"):
            stats = _stats_of(guest)
            to_come = guest.maxMemory() * 1024 if _copies_disks_first(stats) else 0
    except (NotFound, WrongState):
        return None
    return None if stats.get("type", 0) == libvirt.VIR_DOMAIN_JOB_NONE else _info(stats, to_come)


def _copies_disks_first(stats: dict[str, Any]) -> bool:
    """libvirt counts the memory only from where it begins: until then the end of the disks would look like the end."""
    moves = stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT
    return moves and bool(stats.get("disk_total")) and not stats.get("memory_total")


def _stats_of(guest: Any) -> dict[str, Any]:
    """libvirt's figures; of a backup that just begins or ends it has none to tell yet or any more, and fails."""
    try:
        return dict(guest.jobStats())
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_INTERNAL_ERROR or _NO_FIGURES not in str(error):
            raise
    return {"type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED, "operation": libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP}


def current_job(host: Host, vm_id: str) -> JobInfo | None:
    """The job running on the guest of ``vm_id``, or None (also when there is no guest)."""
    guest = host.lookup(vm_id)
    return None if guest is None else job_of(guest)


def completed_stats(guest: Any) -> dict[str, Any]:
    """libvirt's figures of the last ended job; empty when it keeps none (libvirtd restarted, guest gone)."""
    flags = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
    try:
        return dict(guest.jobStats(flags))
    except libvirt.libvirtError:
        return {}


@contextmanager
def completed_job(host: Host, guest: Any) -> Iterator[Callable[[float], dict[str, Any]]]:
    """Yields ``wait(timeout_s) -> stats`` of the job that ends inside the block, ``{}`` if it did not come.

    An event, as a migration takes the guest away from its source, and what ``jobStats`` knew with it.
    """
    ended = threading.Event()
    seen: dict[str, Any] = {}

    def on_completed(_conn: Any, _guest: Any, params: dict[str, Any], _opaque: Any) -> None:
        seen.update(params)
        ended.set()

    def wait(timeout_s: float) -> dict[str, Any]:
        ended.wait(timeout_s)
        return dict(seen)

    with libvirt_errors("listen for the end of a job"):
        handle = host.conn.domainEventRegisterAny(guest, libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, on_completed, None)
    try:
        yield wait
    finally:
        conn = host.conn
        if conn is not None and host.alive():
            with suppress(libvirt.libvirtError):  # a connection that goes away takes its callbacks with it
                conn.domainEventDeregisterAny(handle)


def abort(guest: Any, *, timeout_s: float = ABORT_TIMEOUT_S) -> bool:
    """Abort the job of ``guest`` and wait for its end. True if none runs any more; False if it would not end."""
    deadline = time.monotonic() + timeout_s
    while job_of(guest) is not None:
        # It may have ended this moment, or be in a phase that cannot be aborted yet: look again.
        with suppress(libvirt.libvirtError):
            guest.abortJob()
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def stop_reason(what: str, cancelled: IsCancelled | None, deadline: float) -> Exception | None:
    """Why ``what`` must stop now: Cancelled, HypervisorRefused (too slow), or None to go on.

    ``deadline`` is ``time.monotonic()`` seconds. What ``cancelled`` itself raises (a lost claim) passes through.
    """
    if cancelled is not None and cancelled():
        return Cancelled(f"{what} was cancelled")
    if time.monotonic() >= deadline:
        return HypervisorRefused(
            f"{what} did not end before its deadline and was aborted",
            next="Ask again with more time, more bandwidth, or while the guest is less busy",
        )
    return None


def share(on_progress: OnProgress | None, number: int, steps: int, phase: str) -> OnProgress | None:
    """Progress of one of several equal steps as progress of the whole."""
    if on_progress is None:
        return None

    def tell(percent: float, _phase: str, _eta_s: float | None) -> None:
        on_progress((number * 100.0 + percent) / steps, phase, None)

    return tell


@dataclass(frozen=True)
class JobEnd:
    """How a job that was found ended. ``ended``: "none" (there was none), "completed", "failed", "aborted"."""

    kind: str
    ended: str
    stats: dict[str, Any]


def adopt_or_abort_job(
    host: Host,
    vm_id: str,
    *,
    adopt: bool = True,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    deadline_s: float = 3600,
) -> JobEnd:
    """Take over the job a dead worker left on the guest of ``vm_id``: watch it to its end, or abort it.

    ``adopt=False`` aborts at once. While adopting, ``cancelled`` or ``deadline_s`` abort it, too. "completed" is
    libvirt's word when it still has the figures; a guest that left this host counts as "completed" for
    migration_out: confirm with ``whereabouts.observe``. Raises OutcomeUnknown if an abort has no effect.
    """
    guest = host.lookup(vm_id)
    found = None if guest is None else job_of(guest)
    if guest is None or found is None:
        return JobEnd("none", "none", {} if guest is None else completed_stats(guest))
    deadline = time.monotonic() + (deadline_s if adopt else 0)
    what = f"{found.kind} of guest {vm_id}"
    try:
        while (job := job_of(guest)) is not None:
            if stop_reason(what, cancelled, deadline) is not None:
                return _aborted(guest, found.kind, what)
            if on_progress is not None:
                on_progress(job.percent, job.phase, job.eta_s)
            time.sleep(POLL_S)
    except BaseException:
        abort(guest)
        raise
    return _ended(host, vm_id, found.kind)


def _aborted(guest: Any, kind: str, what: str) -> JobEnd:
    if not abort(guest):
        raise OutcomeUnknown(f"{what} was aborted but does not end", next="Look again; it may hang on a cut network")
    return JobEnd(kind, "aborted", completed_stats(guest))


def _ended(host: Host, vm_id: str, kind: str) -> JobEnd:
    guest = host.lookup(vm_id)
    if guest is None or not active(guest, vm_id):
        return JobEnd(kind, "completed" if kind == "migration_out" else "failed", {})
    stats = completed_stats(guest)
    good = bool(stats.get("success", kind != "migration_out"))
    return JobEnd(kind, "completed" if good and stats else "failed", stats)
