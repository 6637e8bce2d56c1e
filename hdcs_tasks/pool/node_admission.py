"""A server node measures itself and publishes how many starts it may have under way (rule: admission_rules.py).

A thread of its own: a storage that hangs must not keep the lease from being renewed.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from pathlib import Path

import psutil

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import NodeContext
from hdcs_tasks.pool.admission_rules import Bound, Measured, next_bound

log = logger(__name__)

LOOK_EVERY_S = 5.0
BOOTS_OF_LATE_S = 120.0


class Admission:
    """The node's bound, from its worker's start on; it begins at the ceiling."""

    def __init__(self, ctx: NodeContext) -> None:
        self._ctx = ctx
        self._bound: Bound | None = None
        self._boots: deque[tuple[float, float]] = deque(maxlen=100)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="admission", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def booted(self, vm_id: str) -> None:
        """A guest's agent answers: how long that took since its place was claimed."""
        ctx = self._ctx
        try:
            began = ctx.reservations.pool.start_began(ctx.server_node, vm_id, ctx.settings.boot_slot_s)
        except HdcsError:
            return
        if began is not None:
            self._boots.append((time.time(), max(0.0, time.time() - began)))

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                self.look()
            except HdcsError as error:
                log.warning("starts not measured this time", error=str(error))
            except Exception:  # the thread must outlive a broker's and a storage's every mood
                log.exception("starts not measured")

    def look(self) -> Bound | None:
        """Measure, decide, publish. None: the node is in no pool now, or its bound is fixed."""
        ctx = self._ctx
        limits = ctx.reservations.pool.bounds(ctx.server_node)
        if limits is None:
            return None
        seen = self.measured()
        floor, ceiling = limits
        self._bound = next_bound(self._bound or Bound(ceiling), seen, floor=floor, ceiling=ceiling)
        facts = {
            "why": self._bound.why, "cpu_pressure": _text(seen.cpu_pressure),
            "memory_pressure": _text(seen.memory_pressure), "storage_ms": _text(seen.storage_ms),
            "boots": str(len(seen.boots_s)), "usual_boot_s": _text(self._bound.usual_boot_s),
            "at": f"{time.time():.0f}",
        }  # fmt: skip
        ctx.reservations.pool.bound_starts(ctx.server_node, self._bound.starts, facts)
        return self._bound

    def measured(self) -> Measured:
        since = time.time() - BOOTS_OF_LATE_S
        boots = [took_s for at, took_s in list(self._boots) if at >= since]
        cpu = pressure("cpu")
        if cpu is None:
            # A kernel without pressure stall information: two runnable tasks a core are as much as it can bear.
            cpu = 50.0 * psutil.getloadavg()[0] / (psutil.cpu_count() or 1)
        return Measured(cpu, pressure("memory"), synced_write_ms(self._ctx.settings.storage_root), boots)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def pressure(resource: str, root: Path = Path("/proc/pressure")) -> float | None:
    """``some avg10`` of /proc/pressure in percent (kernel: Documentation/accounting/psi.rst); None: not to be had."""
    try:
        line = (root / resource).read_text().splitlines()[0]
        return float(line.split("avg10=")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None


def synced_write_ms(storage_root: Path) -> float | None:
    """How long the domain node's storage takes to keep 4 KiB for good; None where it cannot be written."""
    path = storage_root / "state" / f".probe-{os.uname().nodename}-{os.getpid()}"
    began = time.monotonic()
    try:
        with path.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        return (time.monotonic() - began) * 1000
    except OSError:
        return None
    finally:
        path.unlink(missing_ok=True)
