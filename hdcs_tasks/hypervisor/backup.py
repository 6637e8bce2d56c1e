"""Backups of a VM's own disk layer: full ones since the seed bitmap, increments from checkpoint to checkpoint.

A running guest is backed up by a libvirt push job, which copies the disk of one moment while the guest goes on; its
file systems are frozen around that moment when its agent answers. A stopped VM gets a guest that never runs, just to
let QEMU read the bitmaps. The file written is a qcow2 whose backing file is the previous point, or the base image.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from hdcs_tasks.errors import BackupBroken, Conflict, HypervisorRefused, OutcomeUnknown, WrongState
from hdcs_tasks.hypervisor import agent, keys
from hdcs_tasks.hypervisor.checkpoints import (
    DISK_TARGET,
    SEED,
    checkpoint_names,
    checkpoint_xml,
    define_seed,
    delete_all_checkpoints,
    delete_checkpoint,
    redefine_checkpoints,
)
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.hypervisor.holder import holder
from hdcs_tasks.hypervisor.jobs import (
    POLL_S,
    IsCancelled,
    OnProgress,
    abort,
    completed_job,
    completed_stats,
    job_of,
    stop_reason,
)
from hdcs_tasks.hypervisor.keys import Key
from hdcs_tasks.hypervisor.layers import Backing, create_layer, extract_layer, set_backing
from hdcs_tasks.hypervisor.pacing import Pace

_FIRST_POLL_S = 0.01
_STATS_WAIT_S = 5.0


@dataclass(frozen=True)
class BackupResult:
    """``bytes``: size of the file. ``consistency``: "filesystem" (frozen by the agent) or "crash".

    ``kind``: "full" or "inc". ``checkpoint_xml``: libvirt's record of the new checkpoint, to be kept with the point
    and given to ``redefine_checkpoints`` at the next start.
    """

    kind: str
    bytes: int
    seconds: float
    consistency: str
    checkpoint_xml: str


def backup_running(
    host: Host,
    vm_id: str,
    *,
    target: Path,
    checkpoint: str,
    backing: Backing | None,
    incremental_from: str | None = None,
    key: Key | None = None,
    disk_target: str = DISK_TARGET,
    freeze: bool = True,
    bandwidth_mib_s: int | None = None,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    deadline_s: float = 3600,
) -> BackupResult:
    """Write the disk of the running (or paused) guest, as of now, to the new file ``target``.

    With ``incremental_from`` (a checkpoint's name) what changed since then, on ``backing`` = the previous
    point's file; without it the VM's own layer, on ``backing`` = the base image (None: the VM has no base image). A new
    checkpoint named ``checkpoint`` marks the moment; ``checkpoints.keep_checkpoints`` afterwards drops older ones.
    ``bandwidth_mib_s`` limits the copying; ``key``: the file is encrypted with it.

    Raises BackupBroken (a bitmap is missing or broken: all checkpoints are deleted, the next backup is a full one),
    Cancelled, HypervisorRefused (libvirt said no, or ``deadline_s`` passed), WrongState, Conflict (another job, or
    ``target`` exists), OutcomeUnknown. After any but the last, neither ``target`` nor ``checkpoint`` is left.
    """
    if target.exists():
        raise Conflict(f"{target.name} exists", next="Name each attempt's partial file anew, or delete it")
    guest = host.guest(vm_id)
    started = time.monotonic()
    job = _Push(host, vm_id, guest, disk_target, on_progress, cancelled, started + deadline_s, bandwidth_mib_s, key)
    try:
        since = incremental_from or job.seed(backing)
        # Without a seed only the whole disk can be had; the base is taken out of it afterwards.
        whole = target.with_name(target.name + ".whole") if since is None and backing is not None else target
        if key is not None:
            job.make_encrypted(whole, backing if whole is target else None)
        consistency = job.push(whole, checkpoint, since, freeze)
        job.settle(whole, target, backing, rebase_only=since is not None)
        _fsync(target)
        xml = job.record(checkpoint)
    except OutcomeUnknown:
        raise  # the job may go on: whoever observes it cleans up
    except BaseException as error:
        job.undo(target, checkpoint)
        if isinstance(error, BackupBroken):
            delete_all_checkpoints(host, vm_id)
        raise
    kind = "full" if incremental_from is None else "inc"
    return BackupResult(kind, target.stat().st_size, time.monotonic() - started, consistency, xml)


def backup_stopped(
    host: Host,
    vm_id: str,
    *,
    disk: Path,
    target: Path,
    checkpoint: str,
    backing: Backing | None,
    incremental_from: str | None = None,
    key: Key | None = None,
    disk_key: Key | None = None,
    checkpoints: tuple[str, ...] = (),
    bandwidth_mib_s: int | None = None,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    deadline_s: float = 3600,
) -> BackupResult:
    """As ``backup_running`` for a VM that runs nowhere. ``checkpoints``: their XML (parents first) as kept;
    ``disk_key``: of the VM's disk, if that is encrypted.

    A guest that never runs holds the disk meanwhile: QEMU's image lock keeps the VM from being started elsewhere.
    It ends with this call, and with this process's connection. Consistency is "filesystem": nothing is in flight.
    Raises also Conflict when the guest is on this host or its disk is open.
    """
    with holder(host, vm_id, disk, disk_key):
        redefine_checkpoints(host, vm_id, checkpoints)
        result = backup_running(
            host, vm_id, target=target, checkpoint=checkpoint, backing=backing, incremental_from=incremental_from,
            key=key, freeze=False, bandwidth_mib_s=bandwidth_mib_s, on_progress=on_progress, cancelled=cancelled,
            deadline_s=deadline_s,
        )  # fmt: skip
    return BackupResult(result.kind, result.bytes, result.seconds, "filesystem", result.checkpoint_xml)


def discard_left_behind(host: Host, vm_id: str, target: Path, checkpoint: str | None) -> None:
    """Undo what an attempt that died left: its job, frozen file systems, partial ``target`` and ``checkpoint``.

    Raises OutcomeUnknown if its job does not end.
    """
    guest = host.lookup(vm_id)
    if guest is not None:
        _thaw(host, vm_id, guest)  # first: until then the guest hangs
        job = job_of(guest)
        if job is not None and job.kind == "backup" and not abort(guest):
            raise OutcomeUnknown(f"the backup of guest {vm_id} does not end", next="Look again")
    _discard(host, vm_id, target, checkpoint)


def copy_running(
    host: Host, vm_id: str, target: Path, *, key: Key | None = None, on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None, deadline_s: float = 3600,
) -> str:  # fmt: skip
    """Write the whole disk of a running or paused guest, as of now and flattened, to the new qcow2 ``target``; returns
    its consistency. The guest goes on and its backup chain is left alone. ``key``: the file is encrypted with it.
    Raises as ``backup_running``."""
    job = _Push(
        host, vm_id, host.guest(vm_id), DISK_TARGET, on_progress, cancelled, time.monotonic() + deadline_s, None, key
    )
    try:
        if key is not None:
            job.make_encrypted(target, None)
        consistency = job.push(target, None, None, freeze=True)
        _fsync(target)
    except OutcomeUnknown:
        raise
    except BaseException:
        job.undo(target, None)
        raise
    return consistency


class _Push:
    """One push job, and what has to be cleaned up or rewritten around it."""

    def __init__(
        self,
        host: Host,
        vm_id: str,
        guest: Any,
        disk_target: str,
        on_progress: OnProgress | None,
        cancelled: IsCancelled | None,
        deadline: float,
        bandwidth_mib_s: int | None,
        key: Key | None = None,
    ) -> None:
        self.host = host
        self.key = key
        self.bandwidth_mib_s = bandwidth_mib_s
        self.vm_id = vm_id
        self.guest = guest
        self.disk_target = disk_target
        self.on_progress = on_progress
        self.cancelled = cancelled
        self.deadline = deadline
        self.what = f"backup of guest {vm_id}"
        self.begun = False

    def undo(self, target: Path, checkpoint: str | None) -> None:
        """Leave nothing of this attempt, and touch nothing of another's whose job or checkpoint was in the way."""
        if self.begun and not abort(self.guest):
            raise OutcomeUnknown(f"{self.what} was aborted but does not end", next="Look again")
        _discard(self.host, self.vm_id, target, checkpoint if self.begun else None)

    def seed(self, backing: Backing | None) -> str | None:
        """The checkpoint a full backup starts from: the seed, or None to copy the whole disk."""
        if backing is None:
            return None
        return SEED if define_seed(self.guest, self.disk_target) else None

    def make_encrypted(self, target: Path, backing: Backing | None) -> None:
        """The file libvirt is to fill: its own would cost a second to open, for each layer of a chain."""
        with libvirt_errors(f"back up guest {self.vm_id}"):
            size_bytes = self.guest.blockInfo(self.disk_target)[0]
        create_layer(target, backing, size_bytes, self.key)
        keys.give_to_libvirt(self.host, self.key)

    def push(self, target: Path, checkpoint: str | None, since: str | None, freeze: bool) -> str:
        """Run the job to its end; returns the consistency of the moment it was begun. ``checkpoint`` None: it leaves no
        mark, and the backup chain does not hear of it."""
        others = [name for name in self._disks() if name != self.disk_target]
        self._refuse_unknown(since)
        limit = None if self.bandwidth_mib_s is None else self.bandwidth_mib_s << 20
        with completed_job(self.host, self.guest) as wait_stats:
            pace = Pace(self.guest, self.disk_target, target, limit)
            consistency = self._begin(
                _backup_xml(target, since, self.disk_target, others, self.key),
                checkpoint_xml(checkpoint, self.disk_target, others=others) if checkpoint else None,
                freeze,
                pace,
            )
            self._watch(pace)
            stats = wait_stats(_STATS_WAIT_S)
        if not stats.get("success", False):
            # The event may be a late one, of the job of an attempt before, or be late itself.
            stats = completed_stats(self.guest) or stats
        if not stats.get("success", False):
            why = stats.get("errmsg") or "libvirt did not say why"
            raise HypervisorRefused(
                f"{self.what} failed: {why}", next="Check the free space and health of the backup storage"
            )
        return consistency

    def _disks(self) -> list[str]:
        with libvirt_errors(f"back up guest {self.vm_id}"):
            root = ElementTree.fromstring(self.guest.XMLDesc(0))
        disks = [d for d in root.findall("./devices/disk") if d.get("device", "disk") == "disk"]
        found = [t.get("dev", "") for d in disks for t in d.findall("target")]
        if self.disk_target not in found:
            raise WrongState(
                f"guest {self.vm_id} has no disk {self.disk_target}", next="Its disks: " + ", ".join(found)
            )
        return found

    def _refuse_unknown(self, since: str | None) -> None:
        if since is not None and since not in checkpoint_names(self.guest):
            raise BackupBroken(
                f"guest {self.vm_id} has no checkpoint {since}", next="The next backup of this VM is a full one"
            )

    def _may_go_on(self) -> None:
        reason = stop_reason(self.what, self.cancelled, self.deadline)
        if reason is not None:
            raise reason

    def _begin(self, backup_xml: str, point_xml: str | None, freeze: bool, pace: Pace) -> str:
        self._may_go_on()
        with libvirt_errors(f"back up guest {self.vm_id}"):
            running = self.guest.state()[0] == libvirt.VIR_DOMAIN_RUNNING  # a paused one has no agent to wait for
        with ExitStack() as stack:
            held = freeze and running and stack.enter_context(agent.frozen(self.host, self.vm_id))
            with libvirt_errors(f"begin the {self.what}", unsure=True):
                flags = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL if self.key else 0
                self.guest.backupBegin(backup_xml, point_xml, flags)
            self.begun = True
            pace.hold()  # before the thaw, which takes as long as copying many MiB
        return "filesystem" if held else "crash"

    def _watch(self, pace: Pace) -> None:
        pause = _FIRST_POLL_S
        while True:
            job = job_of(self.guest)
            # Asked also when it just ended: a cancelled backup is not kept because it was quick.
            self._may_go_on()
            if job is None:
                pace.wait(self.deadline, self._may_go_on)
                return
            pace.hold()
            if self.on_progress is not None:
                self.on_progress(job.percent, job.phase, job.eta_s)
            time.sleep(pause)
            pause = min(pause * 2, POLL_S)

    def settle(self, whole: Path, target: Path, backing: Backing | None, *, rebase_only: bool) -> None:
        """Make ``target`` stand on ``backing``: libvirt left the live disk as its backing file."""
        if backing is None or (rebase_only and self.key is not None):
            return
        if rebase_only:
            set_backing(target, backing, None)
            return
        try:
            extract_layer(
                whole, target, backing, self.on_progress, self.cancelled, self.deadline - time.monotonic(),
                keys=(self.key,), key=self.key,
            )  # fmt: skip
        finally:
            whole.unlink(missing_ok=True)

    def record(self, checkpoint: str) -> str:
        with libvirt_errors(f"read checkpoint {checkpoint}"):
            found = self.guest.checkpointLookupByName(checkpoint, 0)
            return str(found.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN))


def _backup_xml(target: Path, since: str | None, disk_target: str, others: list[str], key: Key | None) -> str:
    root = ElementTree.Element("domainbackup", mode="push")
    if since is not None:
        ElementTree.SubElement(root, "incremental").text = since
    disks = ElementTree.SubElement(root, "disks")
    disk = ElementTree.SubElement(disks, "disk", name=disk_target, type="file", backup="yes")
    file = ElementTree.SubElement(disk, "target", file=os.path.abspath(target))
    keys.encryption_element(file, key.name if key else None)
    ElementTree.SubElement(disk, "driver", type="qcow2")
    for other in others:
        ElementTree.SubElement(disks, "disk", name=other, backup="no")
    return ElementTree.tostring(root, encoding="unicode")


def _discard(host: Host, vm_id: str, target: Path, checkpoint: str | None) -> None:
    target.unlink(missing_ok=True)
    target.with_name(target.name + ".whole").unlink(missing_ok=True)
    if checkpoint is not None and host.alive():
        delete_checkpoint(host, vm_id, checkpoint)


def _thaw(host: Host, vm_id: str, guest: Any) -> None:
    if guest.state()[0] == libvirt.VIR_DOMAIN_RUNNING and agent.ping(host, vm_id):
        agent.thaw(host, vm_id)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
