"""Operations through real Celery workers on a Redis of their own: killed, duplicated, cut off, wiped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hdcs_tasks.app import make_app
from hdcs_tasks.operations.cancelling import ask_cancel
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.lookups import get_operation
from hdcs_tasks.operations.publishing import Publisher
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.operations.sending import send
from hdcs_tasks.operations.views import show
from hdcs_tasks.routing import direct_queue
from hdcs_tasks.states import ServerNodeState
from hdcs_tasks.store.migrate import upgrade
from hdcs_tasks.store.models import DomainNode, ServerNode, Step
from tests.contract.conftest import make_settings
from tests.services import RedisServer

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]


class Center:
    """A control worker and a server node's worker on one Redis; the test drives the sweep."""

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        self.redis, self.folder = redis, folder
        self.log = folder / "work.log"
        self.go = folder / "go"
        self.settings = make_settings(redis.url, f"sqlite:///{folder}/hdcs.sqlite", folder / "state")
        upgrade(self.settings.database_url)
        self.control = Control.from_settings(self.settings, make_app(self.settings))
        self.control.reservations.epoch.open()
        with self.control.store.session() as session:
            session.add(DomainNode(name="east", token_key="k", port_first=20000, port_last=20999))
            session.flush()
            session.add(ServerNode(
                name="node1", domain_node="east", state=ServerNodeState.UP, ip="127.0.0.1", subnet="10.0.0.0/24",
                instance="i", facts={}, vcpus=8, memory_mib=8192,
            ))  # fmt: skip

    @contextmanager
    def worker(self, role: str, name: str, queue: str, pool: str) -> Iterator[subprocess.Popen[bytes]]:
        environment = os.environ | {
            "ROLE": role, "HDCS_REDIS_URL": self.redis.url, "HDCS_DATABASE_URL": self.settings.database_url,
            "HDCS_STATE_DIR": str(self.settings.state_dir), "HDCS_LEASE_TTL_S": "2", "HDCS_DOMAIN_NODE": "east",
            "PYTHONPATH": str(ROOT),
        } | ({"HDCS_SERVER_NODE": "node1"} if role == "node" else {})  # fmt: skip
        command = [
            sys.executable, "-m", "celery", "-A", "tests.contract.step_workers", "worker", "-Q", queue, "-P", pool,
            "-c", "2", "-n", name, "--without-mingle", "--without-gossip", "--loglevel", "INFO",
        ]  # fmt: skip
        output = self.folder / f"{role}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)
        try:
            eventually(lambda: b" ready." in output.read_bytes(), 60, f"{role}: {output}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)

    def ask(self, *, wait: bool, fence: bool = True) -> str:
        """Open an operation of one step; with ``wait`` its work lasts until ``go`` exists."""
        with self.control.transaction() as tx:
            operation = tx.open("test.one", asked=Asked())
            until = str(self.go) if wait else None
            tx.step(operation, "test.work", "east", {"log": str(self.log), "until": until, "fence": fence})
            return operation.id

    def step_of(self, operation: str) -> Step:
        with self.control.store.read() as session:
            return session.query(Step).filter_by(operation_id=operation).one()

    def state(self, operation: str) -> str:
        return str(show(self.control, operation)["state"])

    def done(self, operation: str) -> bool:
        return self.state(operation) == "done"

    def notes(self, what: str, operation: str | None = None) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        step = self.step_of(operation).id if operation else None
        found = [json.loads(line) for line in lines]
        return [n for n in found if n["what"] == what and (step is None or n["step"] == step)]

    def sweep_until(self, done: Callable[[], bool], timeout_s: float, why: str) -> None:
        def sweep_and_look() -> bool:
            recovery_sweep(self.control)
            return done()

        eventually(sweep_and_look, timeout_s, why, every_s=0.3)


def eventually(found: Callable[[], bool], timeout_s: float, why: str, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {why}"
        time.sleep(every_s)


@pytest.fixture
def center(own_redis: RedisServer, tmp_path: Path) -> Iterator[Center]:
    made = Center(own_redis, tmp_path)
    with (
        made.worker("control", "control@test", "control", "threads"),
        made.worker("node", "east@node1", "east", "prefork"),
    ):
        yield made
    made.control.store.dispose()


def test_duplicates_of_a_message_run_once(center: Center) -> None:
    operation = center.ask(wait=True)
    eventually(lambda: len(center.notes("begin")) == 1, 20, "begun")
    step = center.step_of(operation)
    publisher = Publisher(center.control.celery, center.control.reservations)
    publisher.publish([step] * 3)  # while it runs
    time.sleep(0.5)
    center.go.touch()
    eventually(lambda: center.done(operation), 20, "done")
    publisher.publish([step] * 3)  # after its end
    last = center.ask(wait=False)  # behind the duplicates in the same queue
    eventually(lambda: center.done(last), 20, "the queue is worked off")
    assert len(center.notes("begin", operation)) == 1
    assert len(center.notes("effect", operation)) == 1


def test_a_killed_executor_is_replaced_on_the_same_node(center: Center) -> None:
    operation = center.ask(wait=True)
    eventually(lambda: len(center.notes("begin")) == 1, 20, "begun")
    began = time.monotonic()
    os.kill(center.notes("begin")[0]["pid"], signal.SIGKILL)
    center.sweep_until(lambda: len(center.notes("begin")) == 2, 30, "a second attempt")
    recovered_s = time.monotonic() - began
    center.go.touch()
    eventually(lambda: center.done(operation), 20, "done")
    step = center.step_of(operation)
    assert (step.attempt, step.node, step.sent_to) == (2, "node1", direct_queue("east", "node1"))
    assert step.queue == "east"
    assert [entry["attempt"] for entry in step.history] == [1, 2]
    assert [n["attempt"] for n in center.notes("effect")] == [2]
    assert recovered_s < 15  # lease 2 s, and the pool starts a new child


def test_an_outcome_waits_out_a_dead_redis(center: Center) -> None:
    operation = center.ask(wait=True, fence=False)
    eventually(lambda: len(center.notes("begin")) == 1, 20, "begun")
    center.redis.stop()
    center.go.touch()
    spool = center.settings.state_dir / "spool"
    eventually(lambda: len(list(spool.glob("*.json"))) == 1, 60, "spooled")
    center.redis.start()
    eventually(lambda: center.done(operation), 60, "settled from the spool")
    eventually(lambda: not list(spool.glob("*.json")), 20, "acknowledged and dropped")
    assert len(center.notes("effect")) == 1
    assert center.step_of(operation).attempt == 1


def test_a_wiped_redis_runs_nothing_twice(center: Center) -> None:
    operations = [center.ask(wait=True) for _ in range(5)]  # two at work, three queued
    eventually(lambda: len(center.notes("begin")) == 2, 20, "both slots taken")
    old = center.control.reservations.epoch.run_id()
    center.redis.wipe()
    center.redis.start()
    assert center.control.reservations.epoch.run_id() != old
    assert recovery_sweep(center.control)["new_attempt"] == 0, "closed until the rebuild"
    eventually(lambda: len(center.notes("end")) == 2, 30, "who lost its claim stops")
    assert center.notes("effect") == []
    center.control.reservations.epoch.open()  # stands for the rebuild, which has its own tests
    center.go.touch()
    center.sweep_until(lambda: all(center.done(found) for found in operations), 90, "all done")
    assert [len(center.notes("effect", found)) for found in operations] == [1] * 5


def test_a_cancel_reaches_the_executor(center: Center) -> None:
    operation = center.ask(wait=True)
    eventually(lambda: len(center.notes("begin")) == 1, 20, "begun")
    with center.control.transaction() as tx:
        ask_cancel(tx, get_operation(tx.session, operation))
    eventually(lambda: center.state(operation) == "cancelled", 20, "cancelled")
    assert center.notes("effect") == []
    assert len(center.notes("end")) == 1


def test_a_message_from_before_the_wipe_does_nothing(center: Center) -> None:
    message = {"step": "unknown-step", "attempt": 1, "operation": "o", "spec": {"log": str(center.log)}}
    send(center.control.celery, "test.work", message, "east")
    operation = center.ask(wait=False)
    eventually(lambda: center.done(operation), 20, "done")
    assert [n["step"] for n in center.notes("begin")] == [center.step_of(operation).id]


def test_a_worker_that_stops_hands_its_work_back(center: Center) -> None:
    """What does not end in its time is undone and goes to whoever comes next, as the same attempt."""
    operation = center.ask(wait=True)
    eventually(lambda: len(center.notes("begin")) == 1, 20, "begun")
    with center.worker("node", "east@node2", "east2", "prefork") as leaving:
        with center.control.transaction() as tx:
            other = tx.open("test.one", asked=Asked())
            tx.step(other, "test.work", "east2", {"log": str(center.log), "until": str(center.go)})
        eventually(lambda: len(center.notes("begin", other.id)) == 1, 20, "begun on the second worker")
        leaving.terminate()
        time.sleep(1.0)
        assert leaving.poll() is None, "running work may go on for its time"
        center.settings.state_dir.mkdir(parents=True, exist_ok=True)
        center.settings.stopping_file.touch()
        leaving.wait(20)
    center.settings.stopping_file.unlink()
    assert len(center.notes("end", other.id)) == 1
    assert center.notes("effect", other.id) == []
    center.go.touch()
    with center.worker("node", "east@node2", "east2", "prefork"):
        eventually(lambda: center.done(other.id), 30, "done by whoever came next")
    assert center.step_of(other.id).attempt == 1
    assert len(center.notes("effect", other.id)) == 1
    center.sweep_until(lambda: center.done(operation), 60, "the other worker's is done, too")


def test_every_line_about_an_operation_tells_it_and_its_vm_and_server_node(center: Center) -> None:
    """Over the JSON logs of real workers, Celery's own lines among them."""
    with center.control.transaction() as tx:
        operation = tx.open("test.one", asked=Asked(), subject="desk-001")
        spec = {"log": str(center.log), "until": str(center.go), "shown": {"vm": "desk-001", "why": "x" * 300}}
        step = tx.step(operation, "test.work", "east", spec)
        wanted, step_id = operation.id, step.id
    eventually(lambda: len(center.notes("begin")) == 1, 20, "begun")
    os.kill(center.notes("begin")[0]["pid"], signal.SIGKILL)
    center.sweep_until(lambda: len(center.notes("begin")) == 2, 30, "a second attempt")
    center.go.touch()
    eventually(lambda: center.done(wanted), 20, "done")

    def events(role: str, name: str) -> set[str]:
        said = (center.folder / f"{role}.log").read_text().splitlines()
        whole = [text for text in said if text.startswith("{") and text.endswith("}")]
        lines = [line for line in map(json.loads, whole)
                 if name in line["event"] or line.get("task") == name or step_id in json.dumps(line)]  # fmt: skip
        for line in lines:
            about = {key: line.get(key) for key in ("operation", "vm", "server_node")}
            assert about == {"operation": wanted, "vm": "desk-001", "server_node": "node1"}, line
        return {line["event"].split()[-1 if line["event"].endswith("received") else 0] for line in lines}

    # A worker tells of a task's end after control may have heard of it.
    eventually(lambda: {"received", "Task", "step"} <= events("node", "test.work"), 20, "said by the server node")
    eventually(lambda: {"received", "Task", "operation"} <= events("control", "operations.outcome"), 20, "by control")
