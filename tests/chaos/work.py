"""Mixed work on a data center: each worker thread owns a few VMs and asks for one thing after the other.

A request counts when it was acknowledged; one that was not is asked again with the same key until it is, or is refused.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery.exceptions import CeleryError
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from deploy.lab.center import Center
from hdcs_tasks.cloud import ENDED, Operation
from hdcs_tasks.errors import Conflict, HdcsError, NotFound, Rejected, Unavailable
from hdcs_tasks.operations.sending import unwrap
from tests.chaos import notes

ACK_S = 90.0
SETTLE_S = 240.0
MAKES = ("clone", "restore")
"""What begins a disk anew."""

Ask = Callable[[str], Any]
"""Asks with an idempotency key; returns an Operation."""


@dataclass
class Desk:
    """A VM of this run: its name, what is written in its disk, and its backups with what was written then."""

    name: str
    notes: notes.Notes | None = field(default_factory=dict)
    """None: it was made by a request whose end nobody saw, so nobody knows what it was made of."""
    points: list[tuple[str, notes.Notes]] = field(default_factory=list)


@dataclass
class Ledger:
    """What was acknowledged, and what came of it. Shared by all threads."""

    wanted: int
    acknowledged: dict[str, str] = field(default_factory=dict)
    verbs: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    def count(self, where: dict[str, int], key: str) -> None:
        key = re.sub(r"^restore \S+?(?=$|:)", "restore", key)  # whichever point it was
        with self.lock:
            where[key] = where.get(key, 0) + 1

    @property
    def enough(self) -> bool:
        return len(self.acknowledged) >= self.wanted


class Worker(threading.Thread):
    """One thread of work on its own desks, by its own dice."""

    def __init__(self, center: Center, ledger: Ledger, number: int, seed: int, say: Callable[[str], None]) -> None:
        super().__init__(name=f"work-{number}", daemon=True)
        self.center = center
        self.ledger = ledger
        self.dice = random.Random(f"{seed}.{number}")
        self.say = say
        self.desks = [Desk(f"desk-{number}-{i}") for i in range(2)]
        self.number = number
        self.round = 0

    @property
    def cloud(self) -> Any:
        return self.center.cloud

    def run(self) -> None:
        while not self.ledger.stop.is_set():
            self.round += 1
            try:
                if self.round % 6 == 0:
                    self.bulk()
                else:
                    self.one(self.dice.choice(self.desks))
            except Exception as error:
                self.ledger.errors.append(f"{self.name}: {error!r}")
                time.sleep(1)

    # --- asking

    def ask(self, verb: str, ask: Ask) -> Operation | None:
        """The acknowledged operation, or None where it was refused or nobody answered for long."""
        key = str(uuid.UUID(int=self.dice.getrandbits(128)))
        deadline = time.monotonic() + ACK_S
        while time.monotonic() < deadline and not self.ledger.stop.is_set():
            try:
                operation = ask(key)
            except (Rejected, Conflict) as error:
                self.ledger.count(self.ledger.refused, f"{verb}: {error.code}")
                return None
            except (Unavailable, CeleryError, KombuError, RedisError, OSError) as error:
                self.ledger.count(self.ledger.refused, f"{verb}: asked again ({type(error).__name__})")
                time.sleep(0.5)
                continue
            with self.ledger.lock:
                self.ledger.acknowledged[operation.id] = verb
            self.ledger.count(self.ledger.verbs, verb)
            return operation
        return None

    def by_task(self, task: str, /, **kwargs: Any) -> Ask:
        """The same request as a plain Celery caller makes it: no result is no acknowledgement."""

        def ask(key: str) -> Operation:
            celery = self.cloud.control.celery
            result = celery.send_task(
                task, kwargs=kwargs, queue="control", task_id=key, ignore_result=False, retry=False
            )
            answer = unwrap(result.get(timeout=8))
            return Operation(self.cloud.control, answer["id"])

        return ask

    def settle(self, operation: Operation | None, verb: str) -> dict[str, Any] | None:
        """Wait for its end; what it ended as. None: it was refused, or has not ended in time (the checker tells)."""
        if operation is None:
            return None
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and not self.ledger.stop.is_set():
            with contextlib.suppress(HdcsError):
                seen = operation.show()
                if seen["state"] in ENDED:
                    why = f" ({(seen['error'] or {}).get('code')})" if seen["state"] == "failed" else ""
                    self.ledger.count(self.ledger.ended, f"{verb}: {seen['state']}{why}")
                    if seen["state"] == "failed":
                        self.say(f"  {verb} {seen['subject']} failed: {(seen['error'] or {}).get('message')}")
                    return dict(seen)
            time.sleep(0.3)
        return None

    # --- what is done

    def one(self, desk: Desk) -> None:
        """One thing that can be done to this VM as it is; sometimes called off or overtaken."""
        verb, ask = self.choose(desk)
        if verb == "write":
            self.write(desk)
            return
        began = dict(desk.notes or {})
        if verb.split()[0] in MAKES:
            desk.notes = None  # until its end is seen
        operation = self.ask(verb, ask)
        if operation is not None and self.dice.random() < 0.12:
            self.overtake(desk, operation)
        ended = self.settle(operation, verb)
        if ended is not None and ended["state"] == "done":
            self.remember(desk, verb, ended, began)

    def choose(self, desk: Desk) -> tuple[str, Ask]:
        vm = self.cloud.vms[desk.name]
        try:
            state = vm.show()["state"]
        except NotFound:
            return self.make(desk)
        return self.dice.choice(self.choices(desk, vm, state))

    def make(self, desk: Desk) -> tuple[str, Ask]:
        if desk.points and self.dice.random() < 0.5:
            point = self.dice.choice(desk.points)[0]
            return f"restore {point}", lambda key: self.cloud.backups.restore(
                point, name=desk.name, start=False, idempotency_key=key
            )
        start = self.dice.random() < 0.7
        if self.dice.random() < 0.5:
            return "clone", self.by_task("vm.clone", image="blank", name=desk.name, profile="chip", start=start)
        return "clone", lambda key: self.cloud.vms.clone(
            "blank", name=desk.name, profile="chip", start=start, idempotency_key=key
        )

    def choices(self, desk: Desk, vm: Any, state: str) -> Sequence[tuple[str, Ask]]:
        name = desk.name
        start: list[tuple[str, Ask]] = [
            ("start", lambda key: vm.start(idempotency_key=key)), ("start", self.by_task("vm.start", vm=name)),
        ]  # fmt: skip
        stop: list[tuple[str, Ask]] = [
            ("stop", lambda key: vm.stop(force=True, idempotency_key=key)),
            ("stop", self.by_task("vm.stop", vm=name, force=True)),
        ]
        delete: list[tuple[str, Ask]] = [("delete", lambda key: vm.delete(idempotency_key=key))]
        migrate: list[tuple[str, Ask]] = [("migrate", lambda key: vm.migrate(idempotency_key=key))]
        backup: list[tuple[str, Ask]] = [("backup", lambda key: self.cloud.backups.create(name, idempotency_key=key))]
        write: list[tuple[str, Ask]] = [("write", lambda key: None)]
        suspend: list[tuple[str, Ask]] = [("suspend", lambda key: vm.suspend(idempotency_key=key))]
        resume: list[tuple[str, Ask]] = [("resume", lambda key: vm.resume(idempotency_key=key))]
        save: list[tuple[str, Ask]] = [("save", lambda key: vm.save(idempotency_key=key))]
        return {
            "stopped": [*start * 3, *backup, *write * 2, *delete],
            "running": [*stop, *migrate * 5, *backup * 2, *write * 3, *suspend, *save, *delete],
            "suspended": [*resume * 2, *stop, *backup],
            "saved": [*start * 2, *delete],
            "failed": [*delete, *stop[:1]],
        }.get(state, [*stop[:1], *delete])

    def overtake(self, desk: Desk, operation: Operation) -> None:
        """Called off, stopped by force or deleted while it runs; or asked for twice."""
        time.sleep(self.dice.uniform(0.0, 2.0))
        vm = self.cloud.vms[desk.name]
        way = self.dice.choice(["cancel", "stop", "delete", "start"])
        if way == "cancel":
            with contextlib.suppress(HdcsError):
                operation.cancel()
                self.ledger.count(self.ledger.verbs, "cancel")
            return
        ways: dict[str, Ask] = {
            "stop": lambda key: vm.stop(force=True, idempotency_key=key),
            "delete": lambda key: vm.delete(idempotency_key=key),
            "start": lambda key: vm.start(idempotency_key=key),
        }
        self.settle(self.ask(f"{way} over another", ways[way]), f"{way} over another")

    def write(self, desk: Desk) -> None:
        slot, pattern = self.dice.randrange(notes.SLOTS), self.dice.randrange(1, 250)
        with contextlib.suppress(HdcsError):
            vm = self.cloud.vms[desk.name].show()
            if desk.notes is None or vm["state"] not in ("stopped", "running"):
                return
            if notes.write(self.center, vm, slot, pattern):
                desk.notes[slot] = pattern
                self.ledger.count(self.ledger.verbs, "write (no operation)")

    def remember(self, desk: Desk, verb: str, ended: dict[str, Any], began: notes.Notes) -> None:
        if verb == "clone":
            desk.notes = {}
        elif verb.startswith("restore"):
            desk.notes = dict(next(kept for point, kept in desk.points if point == verb.split()[1]))
        elif verb == "backup" and desk.notes is not None:
            points = [b for b in self.cloud.backups.list(ended["vm_id"]) if b["state"] == "ready"]
            desk.points.append((points[-1]["id"], began))

    def bulk(self) -> None:
        """Several at once: cloned with one request, started with one, deleted one by one."""
        pattern = f"bulk-{self.number}-{self.round}-{{}}"
        names = [pattern.format(i) for i in (1, 2, 3)]
        start = self.dice.random() < 0.5
        clone: Ask = lambda key: self.cloud.vms.clone(  # noqa: E731 - as the others, an Ask
            "blank", name=pattern, count=3, profile="chip", start=start, idempotency_key=key
        )
        made = self.settle(self.ask("clone 3", clone), "clone 3")
        if made is not None and not start:
            self.settle(
                self.ask("start all", lambda key: self.cloud.vms.start_all(names, idempotency_key=key)), "start all"
            )
        asked = [self.ask("delete", lambda key, n=name: self.cloud.vms[n].delete(idempotency_key=key))  # type: ignore[misc]
                 for name in names]  # fmt: skip
        for operation in asked:
            self.settle(operation, "delete")
