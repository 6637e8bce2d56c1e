"""A virtual clock, actors that wait on it, and the places where a fault may strike. Everything from one seed.

An actor is a greenlet: the project's own synchronous code runs in it unchanged, and gives way only where it waits or
reaches a point. A process is what a fault kills, freezes or cuts off: its actors die with it.
"""

from __future__ import annotations

import heapq
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from greenlet import GreenletExit, getcurrent, greenlet
from kombu.exceptions import OperationalError

from hdcs_tasks.clock import Clock
from hdcs_tasks.errors import HdcsError

START_S = 1_800_000_000.0
STEP_S = 0.25
"""How often an actor that waits for something looks whether it has come."""


class Crashed(BaseException):
    """The process of this actor is dead: nothing it does has an effect any more."""


class Process:
    """Something that dies, stops or is cut off as a whole. ``parent``: it dies with that one."""

    def __init__(self, name: str, parent: Process | None = None) -> None:
        self.name = name
        self.parent = parent
        self._alive = True
        self._frozen_until = 0.0
        self._cut = False

    @property
    def alive(self) -> bool:
        return self._alive and (self.parent is None or self.parent.alive)

    @property
    def frozen_until(self) -> float:
        return max(self._frozen_until, self.parent.frozen_until if self.parent else 0.0)

    @property
    def cut(self) -> bool:
        return self._cut or (self.parent is not None and self.parent.cut)

    def die(self) -> None:
        self._alive = False

    def freeze(self, until: float) -> None:
        self._frozen_until = until

    def cut_off(self, cut: bool) -> None:
        self._cut = cut


@dataclass(eq=False)
class Actor:
    """One line of work of a process. ``kind``: control | node | client | member."""

    process: Process
    name: str
    kind: str
    greenlet: greenlet
    facts: dict[str, object] = field(default_factory=dict)
    ended: Callable[[], None] | None = None
    locked: int = 0
    """How many transactions it is in: while it is in one it does not give way (one writer at a time)."""


@dataclass(frozen=True)
class Odds:
    """How likely a fault is at each point, in this history."""

    crash: float = 0.0
    freeze: float = 0.0
    give_way: float = 0.15
    twice: float = 0.0
    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0


class Kernel(Clock):
    """Virtual time and the actors that live in it."""

    def __init__(self, seed: int, *, tell: bool = False) -> None:
        self.rng = random.Random(seed)
        self.ids = random.Random(seed ^ 0x5EED)
        self.time = START_S
        self.odds = Odds()
        self.faults: Counter[str] = Counter()
        self.violations: list[dict[str, str]] = []
        self.story: list[str] | None = [] if tell else None
        self.actors: dict[greenlet, Actor] = {}
        self.on_crash: Callable[[Actor], None] = lambda actor: None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._main = getcurrent()

    # --- what the product asks (hdcs_tasks.clock)

    def now_s(self) -> float:
        return self.time

    def now_ms(self) -> int:
        return int(self.time * 1000)

    def monotonic_s(self) -> float:
        return self.time - START_S

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        end = self.time + timeout_s
        while not event.is_set() and self.time < end:
            self.sleep(min(timeout_s, end - self.time))
        return event.is_set()

    def start_thread(self, target: Callable[[], None], name: str) -> None:
        here = self.actor()
        self.spawn(here.process, name, here.kind, target)

    def random_hex(self, size_bytes: int) -> str:
        return f"{self.ids.getrandbits(8 * size_bytes):0{2 * size_bytes}x}"

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.ids.getrandbits(128), version=4))

    # --- time

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run ``action`` after ``delay_s``, in the order it was asked for among equals."""
        self._count += 1
        heapq.heappush(self._queue, (self.time + delay_s, self._count, action))

    def run(self, until: float, done: Callable[[], bool] | None = None) -> bool:
        """Let time pass up to ``until``, or until ``done`` (asked after each event); whether it is done."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            at, _, action = heapq.heappop(queue)
            self.time = max(self.time, at)
            action()
            if done is not None and done():
                return True
        self.time = max(self.time, until)
        return False

    # --- actors

    def actor(self) -> Actor:
        return self.actors[getcurrent()]

    def present(self) -> Actor | None:
        """The actor at work, None for the kernel itself."""
        return self.actors.get(getcurrent())

    def spawn(
        self, process: Process, name: str, kind: str, target: Callable[[], object],
        ended: Callable[[], None] | None = None,
    ) -> Actor:  # fmt: skip
        """Begin an actor now. ``ended`` is called however it ends."""

        def body() -> None:
            try:
                target()
            except (Crashed, GreenletExit):
                pass
            except Exception as error:
                self._unforeseen(name, error)
            finally:
                self.actors.pop(getcurrent(), None)
                if ended is not None:
                    self.at(0.0, ended)

        made = greenlet(body, parent=self._main)
        actor = Actor(process, name, kind, made, ended=ended)
        self.actors[made] = actor
        self.at(0.0, lambda: self._resume(actor))
        return actor

    def _unforeseen(self, name: str, error: Exception) -> None:
        """A Celery task that raises is logged and gone; ours may, but only with an error of ours or of the broker."""
        self.tell(f"{name} raised {type(error).__name__}: {str(error)[:160]}")
        if not isinstance(error, HdcsError | ConnectionError | OperationalError):
            self.violated("unforeseen error", f"{name}: {type(error).__name__}: {str(error)[:300]}")

    def _resume(self, actor: Actor) -> None:
        if actor.greenlet.dead:
            return
        if not actor.process.alive:
            self._bury(actor)
        elif actor.process.frozen_until > self.time:
            self.at(min(1.0, actor.process.frozen_until - self.time), lambda: self._resume(actor))
        else:
            actor.greenlet.switch()

    def _bury(self, actor: Actor) -> None:
        if actor.greenlet.gr_frame is not None:
            actor.greenlet.throw(Crashed)
            return
        # It had not begun.
        if self.actors.pop(actor.greenlet, None) is not None and actor.ended is not None:
            self.at(0.0, actor.ended)

    def close(self) -> None:
        """End every actor and forget what is to come: what would keep a finished history alive."""
        self._queue.clear()
        for actor in list(self.actors.values()):
            actor.process.die()
            if actor.greenlet.gr_frame is not None:
                actor.greenlet.throw(GreenletExit)
        self.actors.clear()
        self._queue.clear()
        self.on_crash = lambda actor: None

    def kill(self, process: Process) -> None:
        """End a process and what belongs to it, at once."""
        process.die()
        for actor in list(self.actors.values()):
            if not actor.process.alive:
                self.at(0.0, lambda actor=actor: self._resume(actor))  # type: ignore[misc]

    def sleep(self, seconds: float) -> None:
        """The actor at work waits."""
        actor = self.actor()
        self.at(seconds, lambda: self._resume(actor))
        self._main.switch()
        if not actor.process.alive:
            raise Crashed

    def wait_for(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """The actor at work waits until ``ready``, looking every STEP_S; whether it is."""
        end = self.time + timeout_s
        while not ready():
            if self.time >= end:
                return False
            self.sleep(min(STEP_S, max(end - self.time, 0.001)))
        return True

    def point(self, where: str) -> None:
        """A place where the actor at work may crash, be stopped for long, or give way to others."""
        actor = self.present()
        if actor is None:
            return
        if not actor.process.alive:
            raise Crashed
        odds, drawn = self.odds, self.rng.random()
        if drawn < odds.crash:
            self._crash(actor, where)
        drawn -= odds.crash
        if actor.locked:
            return
        if drawn < odds.freeze:
            self._freeze(actor, where)
        elif drawn < odds.freeze + odds.give_way:
            self.sleep(self.rng.choice((0.001, 0.01, 0.1, 0.5)))

    def _crash(self, actor: Actor, where: str) -> None:
        if actor.kind == "member":
            return
        self.fault("crash " + actor.kind, f"{actor.name} at {where}")
        self.on_crash(actor)
        raise Crashed

    def _freeze(self, actor: Actor, where: str) -> None:
        seconds = self.rng.choice((3.0, 12.0, 25.0, 50.0))
        self.fault("stopped past its lease" if seconds > 10 else "stopped", f"{actor.name} {seconds:g} s at {where}")
        actor.process.freeze(self.time + seconds)
        self.sleep(0.001)

    # --- what is seen

    def fault(self, kind: str, what: str = "") -> None:
        self.faults[kind] += 1
        self.tell(f"FAULT {kind}: {what}")

    def violated(self, what: str, where: str) -> None:
        self.violations.append({"what": what, "where": where})
        self.tell(f"VIOLATION {what}: {where}")

    def tell(self, text: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.time - START_S:9.3f}  {text}")
