"""The message layer: what HDCS uses of Celery, over lists in the Redis model, with messages lost, doubled and late."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from kombu.exceptions import OperationalError

from tests.chaos.sim.kernel import Kernel, Process
from tests.chaos.sim.redis_model import RedisModel

Handler = Callable[[dict[str, Any]], None]


class Worker:
    """Consumes queues with so many slots. ``handle(name, message)`` does the work, in an actor of a process of its own
    where ``forks`` (kill -9 of a pool child) or in the worker's."""

    def __init__(
        self, name: str, kind: str, process: Process, queues: list[str], slots: int, forks: bool,
        handle: Callable[[Process, str, dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self.name, self.kind, self.process, self.queues = name, kind, process, queues
        self.slots, self.forks, self.handle = slots, forks, handle
        self.busy = 0


class Broker:
    """The queues, and who takes messages out of them."""

    def __init__(self, kernel: Kernel, redis: RedisModel) -> None:
        self.kernel = kernel
        self.redis = redis
        self.up = True
        self.workers: list[Worker] = []
        self._sent = 0

    def celery_of(self, process: Process) -> SimCelery:
        return SimCelery(self, process)

    def reachable(self, process: Process) -> bool:
        return self.up and not process.cut

    def put(self, name: str, message: dict[str, Any], queue: str, expires_s: float | None) -> None:
        """A message on its way: maybe lost, maybe twice, maybe late."""
        kernel, odds = self.kernel, self.kernel.odds
        self._sent += 1
        body = json.dumps([name, message, None if expires_s is None else kernel.time + expires_s])
        draw = kernel.rng.random()
        if draw < odds.drop:
            kernel.fault("message lost", f"{name} to {queue}")
            return
        copies = 1
        if draw < odds.drop + odds.duplicate:
            kernel.fault("message doubled", f"{name} to {queue}")
            copies = 2
        for _ in range(copies):
            delay = kernel.rng.uniform(0.001, 0.05)
            if kernel.rng.random() < odds.delay:
                delay = kernel.rng.choice((0.5, 2.0, 8.0, 30.0))
                kernel.fault("message late", f"{name} to {queue}, {delay:g} s")
            kernel.at(delay, lambda: self._arrive(queue, body))

    def _arrive(self, queue: str, body: str) -> None:
        if self.up:
            self.redis.run("RPUSH", f"q:{queue}", body)
            self.deliver()

    def deliver(self) -> None:
        """Give what waits to workers with a free slot, chosen by chance."""
        if not self.up:
            return
        for key in [key for key in self.redis.keys if key.startswith("q:")]:
            queue = key[2:]
            while self._has(key) and (free := [w for w in self.workers if self._free(w, queue)]):
                worker = free[0] if len(free) == 1 else self.kernel.rng.choice(free)
                self._hand(worker, key)

    def _has(self, key: str) -> bool:
        return bool(self.redis.run("LLEN", key))

    def _free(self, worker: Worker, queue: str) -> bool:
        process = worker.process
        return (
            queue in worker.queues and worker.busy < worker.slots and process.alive and not process.cut
            and process.frozen_until <= self.kernel.time
        )  # fmt: skip

    def _hand(self, worker: Worker, key: str) -> None:
        waiting = self.redis.run("LLEN", key)
        if waiting > 1 and self.kernel.rng.random() < self.kernel.odds.delay:
            self.kernel.fault("messages out of order", key)
            self.redis.run("RPUSH", key, self.redis.run("LPOP", key))
        name, message, expires = json.loads(self.redis.run("LPOP", key))
        if expires is not None and expires < self.kernel.time:
            return
        process = Process(f"{worker.name}/{self._sent}", worker.process) if worker.forks else worker.process
        worker.busy += 1

        def ended() -> None:
            worker.busy -= 1
            self.deliver()

        actor = self.kernel.spawn(
            process, f"{worker.name} {name}", worker.kind, lambda: worker.handle(process, name, message), ended
        )
        actor.facts.update(name=name, message=message)


class SimCelery:
    """One process's door to the broker: what ``operations.sending`` uses of a Celery app and of its producer.

    All are equal: ``sending`` keeps one (mute) event dispatcher per app, and thousands of histories share it.
    """

    def __init__(self, broker: Broker, process: Process) -> None:
        self._broker = broker
        self._process = process
        self.events = SimpleNamespace(Dispatcher=MuteDispatcher)
        self._held: list[tuple[str, dict[str, Any], str, Any]] = []

    @property
    def producer_pool(self) -> SimCelery:
        return self

    @property
    def amqp(self) -> SimCelery:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimCelery)

    def __hash__(self) -> int:
        return hash(SimCelery)

    @contextmanager
    def acquire(self, block: bool = True, timeout: float | None = None) -> Iterator[SimCelery]:
        self._check()
        yield self

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Messages leave together at the end of the block: all or none, and who sent them may not learn which."""
        held: list[tuple[str, dict[str, Any], str, Any]] = []
        self._held = held
        yield
        broker = self._broker
        broker.kernel.point(f"send {held[0][0] if held else 'nothing'}")
        self._check()
        for name, message, queue, expires in held:
            broker.put(name, message, queue, expires)
        broker.kernel.point("sent")

    def _check(self) -> None:
        if not self._broker.reachable(self._process):
            raise OperationalError("the broker does not answer")

    def as_task_v2(self, task_id: str, name: str, *, kwargs: dict[str, Any], **_: Any) -> SimpleNamespace:
        body = (name, json.loads(json.dumps(kwargs)))
        return SimpleNamespace(body=body, headers={}, properties={}, sent_event=None)

    def publish(
        self, body: tuple[str, dict[str, Any]], *, routing_key: str, expiration: float | None, **_: Any
    ) -> None:
        name, message = body
        shown = " ".join(f"{k}={v}" for k, v in (message.get("spec") or {}).get("shown", {}).items())
        self._broker.kernel.tell(f"{self._process.name} sends {name} {shown} to {routing_key}")
        self._held.append((name, message, routing_key, expiration))


class MuteDispatcher:
    """Flower's events are no part of what is judged."""

    def __init__(self, enabled: bool) -> None:
        assert not enabled

    def publish(self, kind: str, fields: dict[str, Any], producer: SimCelery, retry: bool) -> None:
        return None
