"""Time, waiting and chance as the orchestrator sees them: one seam, so that a simulation can drive them from a seed.

What really waits for something outside (libvirt, a caller at a terminal) asks the operating system itself.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime


class Clock:
    """The machine's own time and chance. A simulation replaces every method."""

    def now_s(self) -> float:
        """Unix time."""
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Wait until the event is set, at most ``timeout_s``; whether it is."""
        return event.wait(timeout_s)

    def start_thread(self, target: Callable[[], None], name: str) -> None:
        """Run ``target`` beside the caller, for as long as the process lives."""
        threading.Thread(target=target, name=name, daemon=True).start()

    def random_hex(self, size_bytes: int) -> str:
        """``size_bytes`` random bytes, in hex; not for secrets."""
        return os.urandom(size_bytes).hex()

    def new_id(self) -> str:
        """A new UUID, as text."""
        return str(uuid.uuid4())


_clock = Clock()


@contextmanager
def driven_by(clock: Clock) -> Iterator[None]:
    """Let ``clock`` stand for time and chance in the whole process, inside the block."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before


def now_s() -> float:
    """Unix time in seconds."""
    return _clock.now_s()


def now() -> datetime:
    """The present moment, in UTC."""
    return datetime.fromtimestamp(_clock.now_s(), UTC)


def monotonic_s() -> float:
    """Seconds that never go back; only differences mean something."""
    return _clock.monotonic_s()


def wait(event: threading.Event, timeout_s: float) -> bool:
    """Wait until the event is set, at most ``timeout_s``; whether it is."""
    return _clock.wait(event, timeout_s)


def start_thread(target: Callable[[], None], name: str) -> None:
    """Run ``target`` in a thread that ends with the process."""
    _clock.start_thread(target, name)


def random_hex(size_bytes: int) -> str:
    """``size_bytes`` random bytes, in hex; not for secrets."""
    return _clock.random_hex(size_bytes)


def new_id() -> str:
    """A new UUID, as text."""
    return _clock.new_id()
