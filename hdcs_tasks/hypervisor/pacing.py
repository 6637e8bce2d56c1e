"""A push job held to its bandwidth from the first byte.

libvirt takes a limit only for a job that runs, and by then QEMU has dozens of requests under way: up to some 64 MiB go
as fast as the storage takes them, all of a small backup. That cannot be kept from happening; but what came too early is
waited for. The job crawls until it may have come so far, then it goes on at the limit, and one that ended too early
ends when it should have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.hypervisor.jobs import POLL_S, job_of

_CRAWL_BYTES_S = 64 << 10
_AHEAD_S = 0.5
"""How far ahead of its limit a job may be before it crawls: QEMU counts in requests of 1 MiB and slices of 0.1 s."""


class Pace:
    """The pace of the job that writes the file ``target``, begun now; ``limit_bytes_s`` None: as fast as it can."""

    def __init__(self, guest: Any, disk_target: str, target: Path, limit_bytes_s: int | None) -> None:
        self.guest = guest
        self.disk_target = disk_target
        self.target = target
        self.limit_bytes_s = limit_bytes_s
        self.begun = time.monotonic()
        self._before_bytes = self._size_bytes()
        self._set_to: int | None = None

    def hold(self) -> None:
        """Call it once the job runs, and whenever it is looked at."""
        if self.limit_bytes_s is None:
            return
        ahead_s = self._due() - time.monotonic()
        crawls = self._set_to == _CRAWL_BYTES_S
        wanted = _CRAWL_BYTES_S if ahead_s > (0 if crawls else _AHEAD_S) else self.limit_bytes_s
        if wanted != self._set_to:
            self._set(wanted)

    def wait(self, deadline: float, may_go_on: Callable[[], None]) -> None:
        """After the job's end: until it may have come so far, or ``deadline``. ``may_go_on`` raises to stop it."""
        if self.limit_bytes_s is None:
            return
        while (left_s := min(self._due(), deadline) - time.monotonic()) > 0:
            may_go_on()
            time.sleep(min(left_s, POLL_S))

    def _due(self) -> float:
        """When what is written may have been written."""
        return self.begun + (self._size_bytes() - self._before_bytes) / (self.limit_bytes_s or 1)

    def _size_bytes(self) -> int:
        try:
            return self.target.stat().st_size
        except FileNotFoundError:
            return 0

    def _set(self, bytes_s: int) -> None:
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
        try:
            with libvirt_errors(f"limit the backup to {self.target.name}"):
                self.guest.blockJobSetSpeed(self.disk_target, bytes_s, flags)
        except HdcsError:
            job = job_of(self.guest)
            if job is not None and not job.over:
                raise
        self._set_to = bytes_s
