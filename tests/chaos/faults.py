"""Faults, injected into a running data center from outside: each is one call that breaks, waits and mends.

What died is started again as its service manager would (``Restart=always``); nothing else is helped along.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from deploy.lab.center import Center, wait_for
from deploy.lab.space import command_line, start_time
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.states import StepState
from hdcs_tasks.store.models import Step

KINDS = (
    "kill_pool_child", "kill_node_worker", "kill_control", "kill_beat", "stop_worker", "terminate_worker",
    "redis_restart", "redis_wipe", "libvirtd_kill", "cut_node",
)  # fmt: skip
"""Methods of Faults."""

RESTART_S = 1.0
WATCH_EVERY_S = 0.05
WATCH_ROUNDS = 200
GIVE_UP_S = 180.0


@dataclass(frozen=True)
class Interrupted:
    """A step whose executor was killed: which attempt, and when (epoch seconds)."""

    fault: str
    step: str
    attempt: int
    at: float


@dataclass
class Faults:
    """The faults of one data center, counted. ``say`` is told each."""

    center: Center
    dice: random.Random
    say: Callable[[str], None]
    counts: dict[str, int] = field(default_factory=dict)
    interrupted: list[Interrupted] = field(default_factory=list)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    rebuilt_s: list[float] = field(default_factory=list)
    """From Redis's answering again to reservations being given out again, in seconds, each time."""

    def inject(self, kind: str) -> None:
        began = time.time()
        what: str = getattr(self, kind)()
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.spans.append((kind, began, time.time()))
        self.say(f"fault {kind}: {what} ({time.time() - began:.1f} s)")

    # --- who works where

    def _node(self) -> str:
        """A server node, rather one at work."""
        busy = sorted({node for _, _, node, _ in self._held()} & set(self.center.lab.nodes))
        return self.dice.choice(busy if busy and self.dice.random() < 0.8 else self.center.lab.nodes)

    def _held(self) -> list[tuple[str, int, str, int]]:
        """Steps somebody holds right now: step, attempt, server node, pid inside the node."""
        control = self.center.cloud.control
        with contextlib.suppress(HdcsError):
            with control.store.read() as session:
                ids = list(session.scalars(select(Step.id).where(Step.state == StepState.PUBLISHED)))
            statuses = control.reservations.steps.statuses(ids)
            holders = [(step, s, (s.holder or "").split(":")) for step, s in zip(ids, statuses, strict=True) if s]
            return [(step, s.attempt, words[0], int(words[1])) for step, s, words in holders
                    if len(words) == 3 and not s.done]  # fmt: skip
        return []

    def _interrupt(self, fault: str, node: str, pids: set[int] | None = None) -> None:
        """Note whose work a kill is about to end; ``pids`` as the node itself numbers them, None for all."""
        at = time.time()
        self.interrupted += [
            Interrupted(fault, step, attempt, at)
            for step, attempt, where, pid in self._held() if where == node and (pids is None or pid in pids)
        ]  # fmt: skip

    def _programs(self, node: str) -> list[int]:
        """Host pids of the node program's processes: supervisor, both workers, pool children."""
        return [pid for pid, line in self.center.lab.space(node).processes() if "workers.server_node" in line]

    # --- the faults

    def kill_pool_child(self) -> str:
        """One that is in the middle of a step, if one is within some seconds."""
        for _ in range(WATCH_ROUNDS):
            for _, _, node, inner in self._held():
                found = [pid for pid in self._programs(node) if _inner_pid(pid) == inner and _is_pool_child(pid)]
                if found:
                    self._interrupt("kill_pool_child", node, {inner})
                    _kill(found[0], signal.SIGKILL)
                    return f"{node}, at work"
            time.sleep(WATCH_EVERY_S)
        node = self.dice.choice(self.center.lab.nodes)
        idle = [pid for pid in self._programs(node) if _is_pool_child(pid)]
        _kill(idle[0], signal.SIGKILL) if idle else None
        return f"{node}, idle"

    def kill_node_worker(self) -> str:
        for _ in range(WATCH_ROUNDS):
            if self._held():
                break
            time.sleep(WATCH_EVERY_S)
        node = self._node()
        pids = self._programs(node)
        self._interrupt("kill_node_worker", node)
        for pid in pids:
            _kill(pid, signal.SIGKILL)
        time.sleep(RESTART_S)
        self.center.start_node(node)
        return f"{node}, {len(pids)} processes"

    def kill_control(self) -> str:
        self._kill_and_wait("control")
        time.sleep(RESTART_S)
        self.center.start_control()
        return "started again"

    def kill_beat(self) -> str:
        self._kill_and_wait("beat")
        time.sleep(RESTART_S)
        self.center.start_beat()
        return "started again"

    def _kill_and_wait(self, name: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.center.stop(name, signal.SIGKILL)

    def stop_worker(self) -> str:
        """Longer than its leases live: it must find out that its work is no longer its own."""
        node = self._node()
        ttl = self.center.cloud.control.settings.lease_ttl_s
        pids = self._programs(node)
        for pid in pids:
            _kill(pid, signal.SIGSTOP)
        time.sleep(1.6 * ttl)
        # nsenter, outside, stops itself with the process it waits for
        for pid in [*pids, *(int(parent) for parent in _status(self.center.pids[node], "PPid"))]:
            _kill(pid, signal.SIGCONT)
        return node

    def terminate_worker(self) -> str:
        """In order: it finishes or hands back what it has, within its time."""
        node = self._node()
        began = time.monotonic()
        pid = self.center.pids.pop(node)
        others = self._programs(node)
        _kill(pid, signal.SIGTERM)
        limit = self.center.cloud.control.celery.conf.worker_soft_shutdown_timeout + 15
        wait_for(f"{node}'s worker to end", lambda: not any(start_time(p) for p in others), limit)
        took = time.monotonic() - began
        self.center.start_node(node)
        return f"{node}, ended after {took:.1f} s"

    def redis_restart(self) -> str:
        return self._redis(wipe=False)

    def redis_wipe(self) -> str:
        return self._redis(wipe=True)

    def _redis(self, wipe: bool) -> str:
        away_s = self.dice.uniform(0.2, 4.0)
        self.center.lab.redis.kill(wipe=wipe)
        time.sleep(away_s)
        self.center.lab.redis.start(self.center.lab.hub)
        threading.Thread(target=self._watch_rebuild, args=(time.monotonic(),), daemon=True).start()
        return f"away for {away_s:.1f} s"

    def _watch_rebuild(self, began: float) -> None:
        reservations = Reservations.from_settings(self.center.cloud.control.settings)
        while time.monotonic() - began < GIVE_UP_S:
            with contextlib.suppress(HdcsError):
                if reservations.epoch.is_open():
                    break
            time.sleep(0.2)
        self.rebuilt_s.append(time.monotonic() - began)

    def libvirtd_kill(self) -> str:
        """Not in the moment between a guest's definition and its process: libvirt 9.0 then holds it for ever as
        starting, over every restart of its own (docs/chaos.md)."""
        node = self._node()
        for _ in range(WATCH_ROUNDS):
            if not self._without_process(node):
                break
            time.sleep(WATCH_EVERY_S / 5)
        for pid, line in self.center.lab.space(node).processes():
            if line.startswith("libvirtd"):
                _kill(pid, signal.SIGKILL)
        return f"{node}: it comes back by itself"

    def _without_process(self, node: str) -> list[Path]:
        """What libvirt notes of guests whose process it has not heard of yet."""
        notes = Path(f"/proc/{self.center.lab.space(node).pid}/root/run/libvirt/qemu").glob("*.xml")
        found = []
        for path in notes:
            with contextlib.suppress(OSError):
                found += [path] if "pid='0'" in path.read_text()[:1000] else []
        return found

    def cut_node(self) -> str:
        node = self._node()
        self.center.lab.cut(node)
        time.sleep(1.6 * self.center.cloud.control.settings.lease_ttl_s)
        self.center.lab.mend(node)
        return node


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _status(pid: int, name: str) -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.split()[1:]
    return []


def _inner_pid(pid: int) -> int:
    """The pid its own namespace knows the process by; 0: gone."""
    return int((_status(pid, "NSpid") or ["0"])[-1])


def _is_pool_child(pid: int) -> bool:
    """Whether the process was forked by the prefork worker: its parent has the same command line."""
    parent = int((_status(pid, "PPid") or ["0"])[0])
    return "--role long" in command_line(pid) and "--role long" in command_line(parent)
