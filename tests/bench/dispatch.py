"""Dispatch: how long from enqueueing a step until its code runs on a server node, against a bare Celery no-op.

Both go through the same Redis to a prefork worker of two with the same settings, one at a time, by turns. HDCS does
all it does in production: record and commit, issue the attempt, publish, claim, lease, fence, spool, outcome, settle.

``fan_out``: how fast the messages of a bulk request leave, per VM, against as many calls of Celery's ``send_task``.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from celery import Celery

from hdcs_tasks.app import celery_config, make_app
from hdcs_tasks.config import Settings
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.publishing import Publisher
from hdcs_tasks.states import OperationState, ServerNodeState
from hdcs_tasks.store.migrate import upgrade
from hdcs_tasks.store.models import DomainNode, Operation, ServerNode, Step
from tests.bench.report import Figure, judged, say
from tests.services import redis_server

ROOT = Path(__file__).parents[2]
NOBODY = "west"  # a domain node without server nodes: its queue is filled and never read
GUEST = {
    "vm_id": "8e5f2d7a-33a5-4f0c-9d0e-1b1f6b1e0001", "name": "desk-001", "vcpus": 2, "memory_mib": 4096,
    "mac": "52:54:00:12:34:56", "usb": "off",
}  # fmt: skip


class Timed(Publisher):
    """The publisher, with a note of when it was called and how long it took (s)."""

    began_ns = 0
    took_s = 0.0

    def publish(self, steps: Sequence[Step]) -> None:
        self.began_ns = time.monotonic_ns()
        super().publish(steps)
        self.took_s = (time.monotonic_ns() - self.began_ns) / 1e9


class Dispatch:
    """One control plane in this process, three workers beside it."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(
            redis_url=redis_url, database_url=f"sqlite:///{folder}/hdcs.sqlite", state_dir=folder / "state",
            domain_node="east", server_node="node1",
        )  # fmt: skip
        upgrade(self.settings.database_url)
        self.control = Control.from_settings(self.settings, make_app(self.settings))
        self.publisher = self.control.publisher = Timed(self.control.celery, self.control.reservations)
        self.bare = Celery("bare")
        self.bare.conf.update(celery_config(self.settings))
        self.control.reservations.epoch.open()
        with self.control.store.session() as session:
            for name in ("east", NOBODY):
                session.add(DomainNode(name=name, token_key="k", port_first=20000, port_last=20999))
            session.flush()
            session.add(ServerNode(
                name="node1", domain_node="east", state=ServerNodeState.UP, ip="127.0.0.1", subnet="10.0.0.0/24",
                instance="i", facts={}, vcpus=8, memory_mib=8192,
            ))  # fmt: skip
        self.ears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ears.bind(str(folder / "told"))
        self.ears.settimeout(60)
        self.number = 0

    @contextmanager
    def worker(self, role: str, queue: str, pool: str) -> Iterator[None]:
        config = self.settings
        environment = os.environ | {
            "ROLE": role, "HDCS_REDIS_URL": config.redis_url, "HDCS_DATABASE_URL": config.database_url,
            "HDCS_STATE_DIR": str(config.state_dir), "HDCS_DOMAIN_NODE": "east", "HDCS_SERVER_NODE": "node1",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "celery", "-A", "tests.bench.dispatch_app", "worker", "-Q", queue, "-P", pool, "-c",
            "2", "-n", f"{role}@bench", "--without-mingle", "--without-gossip", "--loglevel", "INFO",
        ]  # fmt: skip
        output = self.folder / f"{role}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 90
            while b" ready." not in output.read_bytes():
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit(f"the {role} worker did not start: {output.read_text()[-800:]}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)

    def spec(self) -> dict[str, Any]:
        self.number += 1
        shown = {"vm": "desk-001", "pool": "east"}
        return {"shown": shown, "guest": GUEST, "number": self.number, "socket": str(self.folder / "told")}

    def told_ns(self) -> int:
        """When the code of the last spec ran."""
        while True:
            number, at = self.ears.recv(100).decode().split()
            if int(number) == self.number:
                return int(at)

    def once(self) -> tuple[float, float]:
        """One operation: seconds from asking, and from enqueueing, until the step's code ran. Waits for its end."""
        asked = time.monotonic_ns()
        with self.control.transaction() as tx:
            operation = tx.open("bench.one", asked=Asked())
            tx.step(operation, "bench.step", "east", self.spec())
        ran = self.told_ns()
        deadline = time.monotonic() + 30
        while self._state(operation.id) is not OperationState.DONE and time.monotonic() < deadline:
            time.sleep(0.01)
        return (ran - asked) / 1e9, (ran - self.publisher.began_ns) / 1e9

    def _state(self, operation_id: str) -> OperationState:
        with self.control.store.read() as session:
            found = session.get(Operation, operation_id)
            assert found is not None
            return found.state

    def bare_once(self) -> float:
        began = time.monotonic_ns()
        self.bare.send_task("bench.bare", kwargs=self._message(), queue="bare", ignore_result=True)
        return (self.told_ns() - began) / 1e9

    def _message(self) -> dict[str, Any]:
        return {"step": str(uuid.uuid4()), "attempt": 1, "operation": str(uuid.uuid4()), "spec": self.spec()}

    def bare_many(self, count: int) -> float:
        """Seconds for ``count`` plain messages to a queue nobody reads."""
        began = time.perf_counter()
        for _ in range(count):
            self.bare.send_task("bench.bare", kwargs=self._message(), queue=NOBODY, ignore_result=True)
        return time.perf_counter() - began

    def many(self, count: int) -> tuple[float, float]:
        """One bulk request: seconds to publish its ``count`` steps, and in all with the record."""
        began = time.perf_counter()
        with self.control.transaction() as tx:
            parent = tx.open("bench.many", asked=Asked())
            for _ in range(count):
                child = tx.open("bench.one", asked=Asked(), parent=parent)
                tx.step(child, "bench.step", NOBODY, self.spec())
        return self.publisher.took_s, time.perf_counter() - began


def latency(bench: Dispatch, samples: int) -> list[Figure]:
    asked, enqueued, bare = [], [], []
    for _ in range(samples):
        bare.append(bench.bare_once())
        both = bench.once()
        asked.append(both[0])
        enqueued.append(both[1])
    base = p50_ms(bare)
    return [
        judged("enqueue_to_run_p50", p50_ms(enqueued), "ms", base, 1.5, "<="),
        Figure("request_to_run_p50", p50_ms(asked), "ms", base, round(p50_ms(asked) / base, 4)),
        Figure("enqueue_to_run_p95", p95_ms(enqueued), "ms", p95_ms(bare), round(p95_ms(enqueued) / p95_ms(bare), 4)),
    ]


def fan_out(bench: Dispatch, rounds: int, count: int) -> list[Figure]:
    ratios, rates, bases, whole = [], [], [], []
    for _ in range(rounds):
        bare_s = bench.bare_many(count)
        published_s, all_s = bench.many(count)
        ratios.append(bare_s / published_s)
        bases.append(count / bare_s)
        rates.append(count / published_s)
        whole.append(count / all_s)
    ratio = round(statistics.median(ratios), 4)
    base = round(statistics.median(bases), 1)
    recorded = round(statistics.median(whole), 1)
    return [
        Figure("fan_out", round(statistics.median(rates), 1), "VMs per s", base, ratio, "ratio >= 3", ratio >= 3),
        Figure("fan_out_with_record", recorded, "VMs per s", base, round(recorded / base, 4)),
    ]


def p50_ms(seconds: Sequence[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


def p95_ms(seconds: Sequence[float]) -> float:
    return round(1000 * sorted(seconds)[int(0.95 * (len(seconds) - 1))], 3)


def run(options: argparse.Namespace) -> list[Figure]:
    samples, rounds, count = (25, 3, 60) if options.quick else (150, 9, 200)
    with redis_server() as server, tempfile.TemporaryDirectory(prefix="hdcs-dispatch-") as folder:
        bench = Dispatch(server.url, Path(folder))
        with ExitStack() as workers:
            for role, queue, pool in (("control", "control", "threads"), ("node", "east", "prefork"),
                                      ("bare", "bare", "prefork")):  # fmt: skip
                workers.enter_context(bench.worker(role, queue, pool))
            say("workers are up")
            latency(bench, 5)  # every process opens its connections
            figures = latency(bench, samples)
        say("latency done")
        bench.many(5)
        figures += fan_out(bench, rounds, count)
        bench.control.store.dispose()
        return figures
