"""Watching what really runs: every QEMU process of a lab, from outside HDCS and libvirt, all the time.

A process is the truth: it is seen while libvirtd is dead or its node is cut off. One that waits for an incoming
migration, or only holds a disk for a backup, does not run its guest; every other one does.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.lab.space import Space, pids, start_time

EVERY_S = 0.1


@dataclass
class Seen:
    """One QEMU process: whose guest, on which server node, from when until when (epoch seconds; None: still there)."""

    vm: str
    node: str
    pid: int
    began: float
    ended: float | None = None
    incoming: bool = False
    holder: bool = False

    @property
    def is_start(self) -> bool:
        """Whether this process is a start of the guest, not the target of a migration nor the holder of a disk."""
        return not self.incoming and not self.holder

    def overlaps(self, other: Seen) -> float:
        """Seconds both were there."""
        end = min(self.ended or time.time(), other.ended or time.time())
        return max(0.0, end - max(self.began, other.began))


class Observer:
    """A thread that notes every QEMU process of the given spaces, by the argument list libvirt starts it with."""

    def __init__(self, spaces: Mapping[str, Space]) -> None:
        self._spaces = spaces
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._present: dict[tuple[int, int], Seen] = {}
        self._others: set[tuple[int, int]] = set()
        self._past: list[Seen] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def seen(self) -> list[Seen]:
        """All that was ever seen, oldest first."""
        return sorted([*self._past, *self._present.values()], key=lambda one: one.began)

    def running(self) -> list[Seen]:
        """What is there right now."""
        self.look()
        return list(self._present.values())

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.look()

    def look(self) -> None:
        nodes = {_namespace(space.pid): name for name, space in self._spaces.items() if space.on}
        there: set[tuple[int, int]] = set()
        for pid in pids():
            key = (pid, start_time(pid))
            if key in self._others or not key[1]:
                continue
            there.add(key)
            if key not in self._present:
                self._note(key, nodes)
        for key in set(self._present) - there:
            gone = self._present.pop(key)
            gone.ended = time.time()
            self._past.append(gone)

    def _note(self, key: tuple[int, int], nodes: Mapping[str, str]) -> None:
        argv = _argv(key[0])
        if not argv:
            return  # a thread of the kernel, or not yet begun: looked at again
        node = nodes.get(_namespace(key[0]))
        if "qemu-system" not in os.path.basename(argv[0]) or node is None or "-uuid" not in argv:
            # libvirt forks before it executes QEMU: what is in a node may still become one
            if node is None or "libvirtd" not in argv[0]:
                self._others.add(key)
            return
        name = argv[argv.index("-name") + 1] if "-name" in argv else ""
        self._present[key] = Seen(
            argv[argv.index("-uuid") + 1], node, key[0], time.time(), None, "-incoming" in argv, "guest=backup-" in name
        )


def _argv(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    return []


def _namespace(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""
