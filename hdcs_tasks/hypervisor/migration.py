"""Live migration of a guest to another server node, with or without its disks, and where it is afterwards.

Peer to peer: the source's libvirtd drives, so a migration survives the death of the worker that asked for it
(``jobs.adopt_or_abort_job`` finds it again). The definition moves with the guest: none stays at the source. Checkpoint
metadata does not move (the bitmaps do): ``checkpoints.export`` before, ``checkpoints.redefine`` at the target.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from hdcs_tasks.errors import Cancelled, HdcsError, HypervisorRefused, OutcomeUnknown, Unreachable
from hdcs_tasks.hypervisor import streams
from hdcs_tasks.hypervisor.connection import Host, answered, probe
from hdcs_tasks.hypervisor.errors import libvirt_errors, translate
from hdcs_tasks.hypervisor.jobs import (
    ABORT_TIMEOUT_S,
    POLL_S,
    IsCancelled,
    OnProgress,
    adopt_or_abort_job,
    completed_job,
    completed_stats,
    job_of,
    stop_reason,
)
from hdcs_tasks.logs import logger

log = logger(__name__)

ANSWER_S = 10.0
"""A guest whose QEMU takes longer to tell of its disk is in no state to be moved."""

ABORTED_S = 10.0  # an abort that has not ended the move by then will not: QEMU does not answer

_STATS_WAIT_S = 2.0
_GUARD_S = 2.0
_PROBE_S = 5.0
# Post-copy starts after this many passes over the memory, as what a guest keeps dirtying never ends otherwise.
_POSTCOPY_AFTER = 2


@dataclass(frozen=True)
class MigrationResult:
    """Milliseconds and bytes, from libvirt's own figures. ``bytes`` = memory and disks as sent.

    ``downtime_ms`` is how long the guest stood still; -1 if libvirt did not tell.
    """

    total_ms: int
    downtime_ms: int
    bytes: int
    memory_bytes: int
    disk_bytes: int


def migrate_live(
    host: Host,
    vm_id: str,
    *,
    target_uri: str,
    target_address: str,
    graphics_uri: str | None = None,
    unsafe: bool = False,
    bandwidth_mib_s: int | None = None,
    auto_converge: bool = True,
    postcopy: bool = False,
    console_port: int | None = None,
    console_listen: str | None = None,
    tls: bool = False,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    deadline_s: float = 3600,
) -> MigrationResult:
    """Move the guest of ``vm_id`` to ``target_uri`` inside one storage; returns when it runs there.

    ``target_uri`` is how the source's libvirtd reaches the target's, ``target_address`` where the memory is sent.
    ``graphics_uri`` ("spice://<address the desktop's user reaches>") keeps a SPICE session alive; without it the
    session is lost. ``unsafe``: the storage is shared though libvirt takes it for local. ``console_port`` and
    ``console_listen`` replace the guest's at the target.

    ``tls``: memory is sent encrypted, by QEMU's own certificates.

    Raises Cancelled (``cancelled`` said so; the guest runs on at the source), HypervisorRefused (libvirt said no, or
    ``deadline_s`` passed; the same), OutcomeUnknown (ask ``whereabouts.observe``), NotFound, WrongState. A cancel that
    comes too late returns the result: the guest is at the target.
    """
    flags = libvirt.VIR_MIGRATE_UNSAFE if unsafe else 0
    return _Migration(host, vm_id, target_uri, on_progress, cancelled, deadline_s).run(
        flags | _flags(auto_converge, postcopy, tls),
        _params(target_address, graphics_uri, bandwidth_mib_s),
        _Console(console_port, console_listen),
    )


def migrate_with_storage(
    host: Host,
    vm_id: str,
    *,
    target_uri: str,
    target_address: str,
    graphics_uri: str | None = None,
    bandwidth_mib_s: int | None = None,
    auto_converge: bool = True,
    console_port: int | None = None,
    console_listen: str | None = None,
    tls: bool = False,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    deadline_s: float = 3600,
) -> MigrationResult:
    """Move the guest and the VM's own disk layer to a server node of another domain node.

    The target must already hold, at the same paths, the base image and an empty overlay on it of the same virtual
    size (``disks.create_overlay``); only the clusters of the VM's layer travel, and its bitmaps. The files at
    the source stay after success, the half-written ones at the target after a failure: the caller deletes them.
    Contract otherwise as ``migrate_live``. No post-copy: disks have none.
    """
    return _Migration(host, vm_id, target_uri, on_progress, cancelled, deadline_s).run(
        libvirt.VIR_MIGRATE_NON_SHARED_INC | _flags(auto_converge, postcopy=False, tls=tls),
        _params(target_address, graphics_uri, bandwidth_mib_s),
        _Console(console_port, console_listen),
    )


class Adopted(StrEnum):
    """What became of the migration an earlier attempt had begun: there was none, the guest left, the guest stayed."""

    NONE = "none"
    LEFT = "left"
    STAYED = "stayed"


def adopt(
    host: Host,
    vm_id: str,
    *,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    deadline_s: float = 3600,
) -> Adopted:
    """Watch the migration that an earlier attempt began, and died, to its end: libvirt goes on without it.

    Raises Cancelled (it was aborted, the guest runs on here), OutcomeUnknown (an abort has no effect), Unreachable.
    """
    if host.lookup(vm_id) is None:
        return Adopted.LEFT
    end = adopt_or_abort_job(host, vm_id, on_progress=on_progress, cancelled=cancelled, deadline_s=deadline_s)
    if end.kind != "migration_out":
        return Adopted.NONE
    if end.ended == "aborted":
        raise Cancelled(f"migration of guest {vm_id} was aborted")
    return Adopted.LEFT if end.ended == "completed" else Adopted.STAYED


def disk_sizes(host: Host, vm_id: str) -> tuple[int, int]:
    """Of a running guest's first disk: the bytes a guest sees, and those its own layer takes on the storage.

    HypervisorRefused where its QEMU hangs."""
    what = f"look at the disk of guest {vm_id}"

    def look() -> tuple[int, int]:
        (path, *_) = disk_paths(host, vm_id)
        with libvirt_errors(what):
            virtual, allocated, _ = host.guest(vm_id).blockInfo(str(path))
        return int(virtual), int(allocated)

    return answered(look, ANSWER_S, what)


def arrived(host: Host, vm_id: str) -> MigrationResult | None:
    """libvirt's figures of the move that brought the guest here, at the target; None when it keeps none."""
    stats = completed_stats(host.guest(vm_id))
    return _result(stats, -1) if stats.get("memory_processed") else None


def disk_paths(host: Host, vm_id: str) -> list[Path]:
    """The files the guest's own disks live in (top layer of each), in the order of its definition."""
    with libvirt_errors(f"read the disks of guest {vm_id}"):
        root = ElementTree.fromstring(host.guest(vm_id).XMLDesc(0))
    found = (source.get("file") for source in root.findall("./devices/disk[@device='disk']/source"))
    return [Path(path) for path in found if path]


def _flags(auto_converge: bool, postcopy: bool, tls: bool) -> int:
    flags = (
        libvirt.VIR_MIGRATE_PEER2PEER
        | libvirt.VIR_MIGRATE_LIVE
        | libvirt.VIR_MIGRATE_PERSIST_DEST
        | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
        | libvirt.VIR_MIGRATE_ABORT_ON_ERROR
    )
    if auto_converge:
        flags |= libvirt.VIR_MIGRATE_AUTO_CONVERGE
    if postcopy:
        flags |= libvirt.VIR_MIGRATE_POSTCOPY
    if tls:
        flags |= libvirt.VIR_MIGRATE_TLS
    return int(flags)


def _params(target_address: str, graphics_uri: str | None, bandwidth_mib_s: int | None) -> dict[str, Any]:
    shown = f"[{target_address}]" if ":" in target_address else target_address
    params: dict[str, Any] = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{shown}"}
    if graphics_uri is not None:
        params[libvirt.VIR_MIGRATE_PARAM_GRAPHICS_URI] = graphics_uri
    if bandwidth_mib_s is not None:
        params[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = bandwidth_mib_s
    return params


@dataclass(frozen=True)
class _Console:
    port: int | None
    listen: str | None

    def apply(self, xml: str) -> str:
        """``xml`` with the target's console port and listen address."""
        root = ElementTree.fromstring(xml)
        for graphics in root.findall("./devices/graphics[@type='spice']"):
            if self.port is not None:
                graphics.set("port", str(self.port))
                graphics.set("autoport", "no")
            if self.listen is not None:
                graphics.set("listen", self.listen)
                for listen in graphics.findall("listen[@type='address']"):
                    listen.set("address", self.listen)
        return ElementTree.tostring(root, encoding="unicode")

    def params(self, guest: Any) -> dict[str, Any]:
        if self.port is None and self.listen is None:
            return {}
        # Secure: without it the console's ticket would not travel, and the open session would be refused.
        live = guest.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE)
        kept = guest.XMLDesc(
            libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE
        )
        return {
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: self.apply(live),
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: self.apply(kept),
        }


class _Call(threading.Thread):
    """The blocking migrate call, in a thread one can stop waiting for: libvirt may hang on a cut network."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(name="migrate", daemon=True)
        self._call = call
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 handed to the thread that waits
            self.error = error

    def ended_within(self, timeout_s: float) -> bool:
        self.join(timeout_s)
        return not self.is_alive()


class _Migration:
    def __init__(
        self,
        host: Host,
        vm_id: str,
        target_uri: str,
        on_progress: OnProgress | None,
        cancelled: IsCancelled | None,
        deadline_s: float,
    ) -> None:
        self.host = host
        self.vm_id = vm_id
        self.what = f"migration of guest {vm_id} to {target_uri}"
        self.action = f"migrate guest {vm_id} to {target_uri}"
        self.target_uri = target_uri
        self.guest = host.guest(vm_id)
        self.on_progress = on_progress
        self.cancelled = cancelled
        self.deadline = time.monotonic() + deadline_s
        self.abort_asked: float | None = None  # s, monotonic

    def run(self, flags: int, params: dict[str, Any], console: _Console) -> MigrationResult:
        try:
            # The source's libvirtd would wait two minutes for a host that is off.
            probe(self.target_uri, _PROBE_S)
        except Unreachable as error:
            raise HypervisorRefused(error.message, next="The guest runs on at its source") from error
        with libvirt_errors(self.action):
            params = params | console.params(self.guest)
        started = time.monotonic()
        # On a connection of its own: the answer to a call that lasts lies unread while others are asked on the same.
        with completed_job(self.host, self.guest) as wait_stats, self.host.another() as own:
            guest = own.guest(self.vm_id)
            call = _Call(lambda: guest.migrateToURI3(self.target_uri, params, flags))
            call.start()
            threading.Thread(target=self._guard, args=(call,), name="migrate-guard", daemon=True).start()
            stopped = self._watch(call, bool(flags & libvirt.VIR_MIGRATE_POSTCOPY))
            self._check(call, stopped)
            if self.on_progress is not None:
                self.on_progress(100.0, "done", None)  # a quick one may have been over between two looks
            elapsed_ms = round((time.monotonic() - started) * 1000)
            return _result(wait_stats(_STATS_WAIT_S), elapsed_ms)

    def _watch(self, call: _Call, postcopy: bool) -> Exception | None:
        """Until the call ends. Returns why it was aborted, if it was; an exception of the callbacks aborts, too."""
        try:
            while call.is_alive():
                reason = stop_reason(self.what, self.cancelled, self.deadline)
                if reason is not None:
                    self._abort(call)
                    return reason
                job = job_of(self.guest)
                if job is not None and job.kind == "migration_out":
                    if self.on_progress is not None:
                        self.on_progress(job.percent, job.phase, job.eta_s)
                    if postcopy and job.iteration >= _POSTCOPY_AFTER:
                        postcopy = not self._start_postcopy()
                call.join(POLL_S)
        except Unreachable:
            call.join(ABORT_TIMEOUT_S)  # libvirtd is gone: the call ends by itself and tells
        except BaseException:
            self._abort(call)
            raise
        return None

    def _guard(self, call: _Call) -> None:
        """Beside ``_watch``, which may wait in libvirt for a QEMU that waits for a target which was cut off."""
        while not call.ended_within(_GUARD_S):
            asked = self.abort_asked
            late = asked is not None and time.monotonic() - asked > ABORTED_S
            try:
                streams.end_silent(self.host, vm_id=self.vm_id, silent_s=0 if late else streams.SILENT_S)
            except HdcsError as error:
                log.warning("connections of a move not looked at", vm=self.vm_id, error=str(error))

    def _start_postcopy(self) -> bool:
        try:
            self.guest.migrateStartPostCopy(0)
        except libvirt.libvirtError:
            return False  # not in a phase that can switch: try at the next look
        return True

    def _abort(self, call: _Call) -> None:
        """Abort until the call ends: an abort before libvirt has begun the job is refused, so once is not enough."""
        self.abort_asked = time.monotonic()
        give_up = self.abort_asked + ABORT_TIMEOUT_S
        while call.is_alive() and time.monotonic() < give_up:
            with suppress(libvirt.libvirtError):  # not begun, or just ended: the call's own end decides
                self.guest.abortJob()
            call.join(POLL_S)

    def _check(self, call: _Call, stopped: Exception | None) -> None:
        if call.is_alive():
            raise OutcomeUnknown(
                f"{self.what} does not end",
                next="The network to the target may be cut. Observe the guest before deciding",
            )
        if call.error is None:
            return  # even if a cancel came: too late, the guest is at the target
        if not isinstance(call.error, libvirt.libvirtError):
            raise call.error
        error = translate(call.error, self.action, unsure=True)
        if isinstance(error, OutcomeUnknown) and self._runs_here():
            # It was the target that could not be reached.
            error = HypervisorRefused(
                error.message, next="Is the target up, with room? The guest runs on at its source"
            )
        if stopped is not None and not isinstance(error, OutcomeUnknown):
            raise stopped from call.error
        raise error from call.error

    def _runs_here(self) -> bool:
        """Whether the guest is seen to run on at its source, with nothing under way: then it was not handed over."""
        try:
            running = self.guest.state()[0] in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED)
            return running and job_of(self.guest) is None
        except (libvirt.libvirtError, HdcsError):
            return False


def _result(stats: dict[str, Any], elapsed_ms: int) -> MigrationResult:
    memory, disk = int(stats.get("memory_processed", 0)), int(stats.get("disk_processed", 0))
    return MigrationResult(
        total_ms=int(stats.get("time_elapsed", elapsed_ms)),
        downtime_ms=int(stats.get("downtime", -1)),
        bytes=memory + disk,
        memory_bytes=memory,
        disk_bytes=disk,
    )
