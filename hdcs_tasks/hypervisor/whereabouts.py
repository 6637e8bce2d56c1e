"""Where a guest is during and after a migration, seen from both ends: no outcome is guessed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import libvirt

from hdcs_tasks.errors import HdcsError, HypervisorRefused, NotFound
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.hypervisor.jobs import current_job, job_of


class Presence(StrEnum):
    """What one host knows of a guest. ``unknown``: the host could not be asked."""

    ABSENT = "absent"
    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shutoff"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Whereabouts:
    """A guest seen from both ends of a migration; ``busy`` says that a migration job still runs at the source."""

    source: Presence
    target: Presence
    busy: bool = False

    @property
    def verdict(self) -> str:
        """ "source", "target", "both" or "neither" hold the living guest; "unknown" if nothing may be concluded.

        While the job runs the target's paused copy is not yet the guest. Afterwards a paused side beside a running
        one is the leftover of libvirt's hand-over, whichever end it is on.
        """
        running, paused = Presence.RUNNING, Presence.PAUSED
        if Presence.UNKNOWN in (self.source, self.target):
            return "unknown"
        here, there = self.source in (running, paused), self.target in (running, paused)
        if not (here and there):
            return "source" if here else "target" if there else "neither"
        if self.busy or (self.source, self.target) == (running, paused):
            return "source"
        if (self.source, self.target) == (paused, running):
            return "target"
        return "both"

    @property
    def doubled(self) -> bool:
        """Whether the guest runs twice. The target's libvirt let it run, its answer was lost with the network, so the
        source's took the hand-over for failed and let it go on there too. (On a shared disk QEMU's lock forbids it.)"""
        return not self.busy and self.source is self.target is Presence.RUNNING

    @property
    def held_by(self) -> str:
        """ "source" or "target", where that may be concluded; else "unknown". A doubled one is its source's: there
        libvirt drove the move, and says that it failed.

        A source that cannot be asked may still hold it: then only a guest that runs at the target is an answer, or one
        that is not there at all (it is where it was). One that has ended is held where its definition is: libvirt gives
        the target one when the guest runs there, and takes the source's away after that. Nowhere: it is where it was.
        """
        if self.source is Presence.UNKNOWN:
            return {Presence.RUNNING: "target", Presence.ABSENT: "source"}.get(self.target, "unknown")
        if self.doubled:
            return "source"
        if self.target is Presence.SHUTOFF and self.source in (Presence.ABSENT, Presence.SHUTOFF):
            return "target" if self.source is Presence.ABSENT else "unknown"
        return {"target": "target", "source": "source", "neither": "source"}.get(self.verdict, "unknown")


def observe(source: Host | None, target: Host | None, vm_id: str) -> Whereabouts:
    """Where the guest of ``vm_id`` is, after an outcome nobody saw. None for a host that cannot be reached.

    Never raises for a host that does not answer: it is ``unknown`` then.
    """
    here, there = _presence(source, vm_id), _presence(target, vm_id)
    if here is there is Presence.RUNNING:
        # Handed over between the two looks? Then it does not run at its source any more.
        here = _presence(source, vm_id)
    try:
        job = None if source is None else current_job(source, vm_id)
    except HdcsError:
        here, job = Presence.UNKNOWN, None
    return Whereabouts(here, there, job is not None and job.kind == "migration_out" and not job.over)


def _presence(host: Host | None, vm_id: str) -> Presence:
    if host is None:
        return Presence.UNKNOWN
    try:
        guest = host.lookup(vm_id)
        if guest is None:
            return Presence.ABSENT
        with libvirt_errors(f"look at guest {vm_id}"):
            state = guest.state()[0]
    except NotFound:
        return Presence.ABSENT  # it left between two questions
    except HdcsError:
        return Presence.UNKNOWN
    if state in (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED):
        return Presence.PAUSED
    dead = (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_NOSTATE)
    return Presence.SHUTOFF if state in dead else Presence.RUNNING


def finish_at_target(host: Host, vm_id: str) -> None:
    """Let a guest run that a broken migration left paused at the target, once ``observe`` said "target"."""
    guest = host.guest(vm_id)
    with libvirt_errors(f"resume guest {vm_id}"):
        if guest.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            guest.resume()
    job = job_of(guest)
    if job is not None and not job.over:
        raise HypervisorRefused(f"guest {vm_id} still has a job", next="Look again when it has ended")
