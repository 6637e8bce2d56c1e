"""Operations on a real Redis and record: claim, fence, settle, retry, cancel, supersede, recovery.

The executor is ``operations.node.execute``; only a step's work is the test's. Messages go through Redis and are taken
out by the test, which so decides who gets what and when.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import redis
from kombu.exceptions import OperationalError
from sqlalchemy import select

from hdcs_tasks.app import make_app
from hdcs_tasks.errors import HypervisorRefused, NoCapacity, OutcomeUnknown, Unreachable, WrongState
from hdcs_tasks.hypervisor.connection import HostPool
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_start
from hdcs_tasks.operations.node import HandOver, NodeContext, Run, execute, resend_spooled
from hdcs_tasks.operations.recovery import recovery_sweep, settle, sweep_once, wake
from hdcs_tasks.operations.spool import Spool
from hdcs_tasks.operations.views import cancel, list_operations, show
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.reservations.steps import Steps
from hdcs_tasks.routing import direct_queue, queue_for
from hdcs_tasks.states import OperationState, ServerNodeState, StepState
from hdcs_tasks.store.models import DomainNode, Operation, ServerNode, Step, Vm, now
from tests.contract.test_store import together, vm_row

pytestmark = pytest.mark.contract

Handler = Callable[[Run, dict[str, Any]], dict[str, Any]]


@on_start("test.on_vm")
def _begin_on_vm(tx: Tx, operation: Operation) -> None:
    if operation.request.get("refuse"):
        raise WrongState("it cannot begin")
    tx.step(operation, "test.work", "east", {"shown": {"vm": operation.subject}})


class Desk:
    """The control plane, two server nodes and the test as the broker's hand."""

    def __init__(self, control: Control, folder: Path) -> None:
        self.control = control
        self.nodes = {name: self._node(name, folder) for name in ("node1", "node2")}
        with control.store.session() as session:
            session.add(DomainNode(name="east", token_key="k", port_first=20000, port_last=20999))
            session.flush()
            session.add_all(self._row(name) for name in self.nodes)

    def _node(self, name: str, folder: Path) -> NodeContext:
        config = self.control.settings.model_copy(update={"server_node": name, "state_dir": folder / name})
        reservations = Reservations.from_settings(config)
        return NodeContext(config, make_app(config), reservations, HostPool(), Spool(folder / name / "spool"))

    @staticmethod
    def _row(name: str) -> ServerNode:
        return ServerNode(
            name=name, domain_node="east", state=ServerNodeState.UP, ip="127.0.0.1", subnet="10.0.0.0/24",
            instance="i", facts={}, vcpus=8, memory_mib=8192,
        )  # fmt: skip

    # ---- asking

    def ask(self) -> str:
        with self.control.transaction() as tx:
            operation = tx.open("test.one", asked=Asked())
            tx.step(operation, "test.work", "east", {"shown": {}})
            return operation.id

    def vm(self) -> str:
        with self.control.store.session() as session:
            vm = vm_row()
            session.add(vm)
            session.flush()
            return vm.id

    def ask_on(self, vm_id: str, *, supersede: bool = False, **request: Any) -> str:
        with self.control.transaction() as tx:
            vm = tx.session.get_one(Vm, vm_id)
            return tx.open("test.on_vm", asked=Asked(), vm=vm, request=request, supersede=supersede).id

    def lose(self, operation: str) -> None:
        """Its step, as if Redis had never heard of it."""
        key = f"{self.control.settings.key_prefix}step:{self.step(operation).id}"
        assert redis.Redis.from_url(self.control.settings.redis_url).delete(key)

    # ---- messages

    def messages(self, queue: str = "east") -> list[dict[str, Any]]:
        """Take every message out of a queue; their keyword arguments."""
        with self.control.celery.connection_for_write() as connection:
            simple = connection.SimpleQueue(queue_for(queue))
            found: list[dict[str, Any]] = []
            try:
                while True:
                    message = simple.get(block=False)
                    message.ack()
                    body = message.payload
                    found.append(body[1])
            except Empty:
                return found
            finally:
                simple.close()

    def work(
        self, message: dict[str, Any], handler: Handler, node: str = "node1",
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> str:  # fmt: skip
        return execute(self.nodes[node], "test.work", handler, on_progress, queue="east", **message)

    def settle_all(self) -> int:
        reports = [message["report"] for message in self.messages("control")]
        for report in reports:
            settle(self.control, report)
        return len(reports)

    def run(self, handler: Handler, node: str = "node1", queue: str = "east") -> list[str]:
        """Deliver, execute and settle everything that waits in a queue."""
        answers = [self.work(message, handler, node) for message in self.messages(queue)]
        self.settle_all()
        return answers

    # ---- looking

    def state(self, operation: str) -> str:
        return str(show(self.control, operation)["state"])

    def step(self, operation: str) -> Step:
        with self.control.store.read() as session:
            return session.scalars(select(Step).where(Step.operation_id == operation)).one()

    def due(self, operation: str, **fields: Any) -> None:
        """Let a step's moments lie in the past, as if time had gone by."""
        with self.control.store.session() as session:
            step = session.scalars(select(Step).where(Step.operation_id == operation)).one()
            for name, value in fields.items():
                setattr(step, name, value)


def good(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    run.check()
    return {"by": run.ctx.server_node}


def failing(error: Exception) -> Handler:
    def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        raise error

    return handler


def never(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("must not run")


def ago(seconds: float) -> Any:
    return now() - timedelta(seconds=seconds)


@pytest.fixture
def desk(control: Control, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(control, tmp_path)
    yield made
    for node in made.nodes.values():
        node.celery.close()


# ---- one attempt


def test_progress_that_reaches_nobody_ends_no_work(desk: Desk) -> None:
    """Restarted Redis: the lease is renewed in time, but the event for Flower finds no broker."""

    def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        run.progress(50, "half way")
        return {}

    def away(text: str) -> None:
        raise OperationalError("Connection refused")

    operation = desk.ask()
    (message,) = desk.messages()
    assert desk.work(message, handler, on_progress=away) == "done"
    desk.settle_all()
    assert desk.state(operation) == "done"


def test_a_step_is_published_executed_and_settled(desk: Desk) -> None:
    operation = desk.ask()
    assert desk.state(operation) == "running"
    assert desk.run(good) == ["done"]
    found = show(desk.control, operation)
    assert (found["state"], found["percent"], found["result"]) == ("done", 100.0, {"by": "node1"})
    assert found["steps"][0]["node"] == "node1"
    assert resend_spooled(desk.nodes["node1"]) == 0
    assert list_operations(desk.control, live=True) == []


def test_two_executors_of_one_message_run_once(desk: Desk) -> None:
    desk.ask()
    message = desk.messages()[0]
    ran: list[str] = []

    def counted(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        ran.append(run.holder)
        return good(run, spec)

    answers = together(
        lambda: desk.work(message, counted, "node1"), lambda: desk.work(message, counted, "node2"),
        lambda: desk.work(message, counted, "node1"),
    )  # fmt: skip
    assert len(ran) == 1 == answers.count("done"), answers
    assert set(answers) <= {"done", "taken", "done before"}


def test_an_outcome_reported_again_changes_nothing(desk: Desk) -> None:
    operation = desk.ask()
    desk.work(desk.messages()[0], good)
    report = desk.messages("control")[0]["report"]
    answers = together(*[lambda: settle(desk.control, report)] * 4)
    assert answers == [None] * 4
    settle(desk.control, report)
    assert desk.state(operation) == "done"
    assert len(desk.step(operation).history) == 1


def test_a_failure_is_visible_and_final(desk: Desk) -> None:
    operation = desk.ask()
    assert desk.run(failing(HypervisorRefused("qemu said no", next="look"))) == ["failed"]
    found = show(desk.control, operation)
    assert found["state"] == "failed"
    assert found["error"] == {"code": "hypervisor_refused", "message": "qemu said no", "next": "look", "details": {}}
    assert not found["needs_operator"]


@pytest.mark.parametrize("handler", [failing(ZeroDivisionError("x")), lambda run, spec: {"a": object()}])
def test_an_unforeseen_error_ends_the_step_too(desk: Desk, handler: Handler) -> None:
    operation = desk.ask()
    assert desk.run(handler) == ["failed"]
    assert "failed unexpectedly" in show(desk.control, operation)["error"]["message"]


def test_a_lost_claim_stops_the_executor(desk: Desk) -> None:
    operation = desk.ask()
    effects: list[int] = []

    def slow(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        desk.control.reservations.steps.issue(run.step, run.attempt + 1)  # control gave it to somebody else
        run.check()
        effects.append(run.attempt)
        return {}

    assert desk.run(slow) == ["lost"]
    assert effects == []
    assert desk.state(operation) == "running"


def test_progress_is_seen_while_it_runs(desk: Desk) -> None:
    operation = desk.ask()
    seen: list[dict[str, Any]] = []

    def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        run.progress(40, "disk 4/10 GiB", eta_s=12)
        seen.append(show(desk.control, operation))
        recovery_sweep(desk.control)
        return {}

    desk.run(handler)
    assert (seen[0]["percent"], seen[0]["phase"], seen[0]["eta_s"]) == (40.0, "disk 4/10 GiB", 12.0)


def test_hand_over(desk: Desk) -> None:
    operation = desk.ask()

    def elsewhere(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        raise HandOver("node2", spec | {"placed": "node2"})

    assert desk.run(elsewhere) == ["handed to node2"]
    message = desk.messages(direct_queue("east", "node2"))[0]
    assert message["spec"]["placed"] == "node2"
    assert desk.work(message, good, "node2") == "done"
    desk.settle_all()
    assert show(desk.control, operation)["result"] == {"by": "node2"}
    assert desk.step(operation).attempt == 1


# ---- retries


def test_a_retryable_error_parks_and_retries_on_the_node_it_touched(desk: Desk) -> None:
    operation = desk.ask()
    desk.run(failing(Unreachable("libvirtd is away")))
    step = desk.step(operation)
    assert step.state is StepState.PARKED
    assert 1 < (step.not_before - now()).total_seconds() <= 2  # type: ignore[operator]
    assert recovery_sweep(desk.control)["woken"] == 0
    desk.due(operation, not_before=ago(1))
    assert recovery_sweep(desk.control)["woken"] == 1
    assert desk.messages() == []
    assert desk.run(good, queue=direct_queue("east", "node1")) == ["done"]
    assert desk.state(operation) == "done"
    assert [entry["error"] is None for entry in desk.step(operation).history] == [False, True]


def test_attempts_are_capped(desk: Desk) -> None:
    operation = desk.ask()
    queue = "east"
    for attempt in range(desk.control.settings.attempts_max):
        assert desk.step(operation).attempt == attempt + 1
        assert desk.run(failing(Unreachable("away")), queue=queue) == ["failed"]
        queue = direct_queue("east", "node1")
        if desk.step(operation).state is StepState.PARKED:
            desk.due(operation, not_before=ago(1))
            recovery_sweep(desk.control)
    found = show(desk.control, operation)
    assert (found["state"], found["needs_operator"]) == ("failed", True)
    assert desk.step(operation).attempt == desk.control.settings.attempts_max


def test_waiting_for_room_costs_no_attempt_and_frees_the_choice_of_node(desk: Desk) -> None:
    operation = desk.ask()
    for _ in range(desk.control.settings.attempts_max + 2):
        assert desk.run(failing(NoCapacity("full"))) == ["failed"]
        step = desk.step(operation)
        assert (step.state, step.node) == (StepState.PARKED, None)
        wake(desk.control, [desk.step(operation).id])
    assert len(desk.step(operation).history) == 1
    # A lost executor and an error now are the first attempts that count.
    desk.messages()
    step = desk.step(operation)
    desk.control.reservations.steps.claim(step.id, step.attempt, "dead", "node1", 0.05)
    time.sleep(0.06)
    assert recovery_sweep(desk.control)["new_attempt"] == 1
    desk.run(failing(Unreachable("away")), queue=direct_queue("east", "node1"))
    assert desk.step(operation).state is StepState.PARKED
    desk.due(operation, not_before=ago(1))
    recovery_sweep(desk.control)
    desk.run(failing(NoCapacity("full after all")), queue=direct_queue("east", "node1"))
    wake(desk.control, [desk.step(operation).id])
    assert desk.run(good, node="node2") == ["done"], "any node of the pool may take it again"
    assert desk.state(operation) == "done"


def test_waiting_for_room_ends_at_the_deadline(desk: Desk) -> None:
    operation = desk.ask()
    desk.due(operation, deadline_at=ago(1))
    desk.run(failing(NoCapacity("full")))
    found = show(desk.control, operation)
    assert (found["state"], found["error"]["code"], found["needs_operator"]) == ("failed", "no_capacity", False)


# ---- recovery


def lose(steps: Steps, step: str, attempt: int) -> None:
    """The lease of the executor named ``dead`` ends now."""
    assert steps.renew(step, attempt, "dead", 0.001)
    deadline = time.monotonic() + 30
    while (seen := steps.status(step)) is not None and seen.leased:
        assert time.monotonic() < deadline, "its lease goes on"
        time.sleep(0.002)


def test_a_dead_executor_is_noticed_by_its_lease_and_never_before(desk: Desk) -> None:
    operation = desk.ask()
    message = desk.messages()[0]
    steps = desk.control.reservations.steps
    steps.claim(message["step"], 1, "dead", "node1", 600)
    assert recovery_sweep(desk.control)["new_attempt"] == 0
    lose(steps, message["step"], 1)
    assert recovery_sweep(desk.control)["new_attempt"] == 1
    assert desk.work(message, never) == "stale"
    assert desk.run(good, queue=direct_queue("east", "node1")) == ["done"]
    assert desk.state(operation) == "done"
    assert [entry["attempt"] for entry in desk.step(operation).history] == [1, 2]


def test_executors_lost_again_and_again_need_an_operator(desk: Desk) -> None:
    operation = desk.ask()
    steps = desk.control.reservations.steps
    for attempt in range(1, desk.control.settings.attempts_max + 1):
        assert steps.claim(desk.step(operation).id, attempt, "dead", "node1", 600) == "claimed"
        lose(steps, desk.step(operation).id, attempt)
        recovery_sweep(desk.control)
    found = show(desk.control, operation)
    assert (found["state"], found["needs_operator"]) == ("failed", True)
    assert found["error"]["code"] == "outcome_unknown"


def test_a_long_step_whose_outcome_is_on_its_way_is_left_alone(desk: Desk) -> None:
    operation = desk.ask()
    desk.due(operation, published_at=ago(7000))
    desk.work(desk.messages()[0], good)
    assert recovery_sweep(desk.control)["new_attempt"] == 0
    desk.settle_all()
    assert desk.state(operation) == "done"


def test_an_outcome_that_never_comes_is_observed_anew(desk: Desk) -> None:
    operation = desk.ask()
    desk.work(desk.messages()[0], good)
    desk.messages("control")  # lost, and the node's disk with it
    recovery_sweep(desk.control)
    desk.due(operation, finished_seen_at=ago(11 * desk.control.settings.lease_ttl_s))
    assert recovery_sweep(desk.control)["new_attempt"] == 1
    assert desk.run(good, queue=direct_queue("east", "node1")) == ["done"]
    assert desk.state(operation) == "done"


def test_a_lost_message_is_sent_again_as_the_same_attempt(desk: Desk) -> None:
    operation = desk.ask()
    desk.messages()
    assert recovery_sweep(desk.control)["send_again"] == 0
    desk.due(operation, published_at=ago(61))
    assert recovery_sweep(desk.control)["send_again"] == 1
    assert desk.run(good) == ["done"]
    assert desk.step(operation).attempt == 1


def test_a_lease_that_ran_out_by_its_own_clock_is_lost_whatever_redis_says(desk: Desk) -> None:
    operation = desk.ask()

    def stopped_for_long(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        run.renewed -= 2 * run.ctx.settings.lease_ttl_s
        run.check()
        return {}

    assert desk.run(stopped_for_long) == ["lost"]
    assert desk.state(operation) == "running"


def test_nothing_is_spent_while_reservations_are_closed(desk: Desk) -> None:
    operation = desk.ask()
    desk.lose(operation)
    desk.due(operation, published_at=ago(60))
    desk.control.reservations.epoch.close()
    assert recovery_sweep(desk.control)["new_attempt"] == 0
    desk.control.reservations.epoch.open()
    assert recovery_sweep(desk.control)["new_attempt"] == 1
    assert [m["attempt"] for m in desk.messages()] == [1, 2]


def test_a_late_outcome_of_an_older_attempt_only_enters_the_history(desk: Desk) -> None:
    operation = desk.ask()
    desk.work(desk.messages()[0], good)
    late = desk.messages("control")[0]["report"]
    with desk.control.transaction() as tx:
        step = tx.lock_step(late["step"])
        assert step is not None
        tx.publish(step)
    settle(desk.control, late)
    assert desk.state(operation) == "running"
    assert len(desk.step(operation).history) == 1


def test_a_step_that_cannot_be_recovered_does_not_keep_the_others(desk: Desk) -> None:
    bad, fine = desk.ask(), desk.ask()
    for operation in (bad, fine):
        desk.run(failing(Unreachable("away")))
        desk.due(operation, not_before=ago(1)) if operation == bad else None
    desk.due(fine, not_before=ago(1))
    with desk.control.store.session() as session:
        session.scalars(select(Step).where(Step.operation_id == bad)).one().history = "not a list"  # type: ignore[assignment]
        session.scalars(select(Step).where(Step.operation_id == bad)).one().state = StepState.PUBLISHED
    desk.lose(bad)
    desk.due(bad, published_at=ago(60))
    recovery_sweep(desk.control)
    assert desk.step(fine).state is StepState.PUBLISHED


def test_a_sweep_that_runs_when_asked_for_is_never_late(desk: Desk) -> None:
    known = desk.control.reservations.samples.sweeps
    assert sweep_once(desk.control, "asked", 1.0, lambda _: "ran", periodic=False) == "ran"
    assert "asked" not in known()
    assert sweep_once(desk.control, "beaten", 1.0, lambda _: "ran") == "ran"
    assert "beaten" in known()


def test_two_beats_run_a_sweep_once_in_a_period_and_one_that_is_early_misses_none(desk: Desk) -> None:
    def run(period_s: float) -> Any:
        return sweep_once(desk.control, "beaten", period_s, lambda _: "ran")

    assert (run(600), run(600)) == ("ran", None)
    redis.Redis.from_url(desk.control.settings.redis_url).delete(
        desk.control.settings.key_prefix + "lease:sweep:beaten"
    )
    assert run(1.0) == "ran"
    time.sleep(0.7)
    assert run(1.0) == "ran", "a message that waited made its turn late, and this one seem early"


# ---- cancelling


def test_cancel_before_the_claim(desk: Desk) -> None:
    operation = desk.ask()
    cancel(desk.control, operation)
    assert desk.run(never) == ["cancelled"]
    assert desk.state(operation) == "cancelled"


def test_cancel_of_a_lost_message_is_settled_by_the_sweep(desk: Desk) -> None:
    operation = desk.ask()
    desk.messages()
    cancel(desk.control, operation)
    recovery_sweep(desk.control)
    assert desk.state(operation) == "cancelled"


def test_cancel_while_it_runs_keeps_the_reason(desk: Desk) -> None:
    operation = desk.ask()

    def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        cancel(desk.control, operation)
        run.check()
        return {}

    assert desk.run(handler) == ["failed"]
    assert desk.state(operation) == "cancelled"


def test_a_cancel_lost_with_redis_is_asked_again(desk: Desk) -> None:
    operation = desk.ask()
    step = desk.step(operation).id
    desk.messages()
    steps = desk.control.reservations.steps
    steps.claim(step, 1, "executor", "node1", 30)
    with desk.control.store.session() as session:
        session.get_one(Operation, operation).cancel_asked = True  # the flag in Redis was never written
    recovery_sweep(desk.control)
    assert steps.check(step, 1, "executor") == "cancel"


def test_cancel_does_not_guess_an_unknown_outcome(desk: Desk) -> None:
    operation = desk.ask()
    desk.run(failing(OutcomeUnknown("the link was cut in the middle")))
    cancel(desk.control, operation)
    assert desk.state(operation) == "running", "its outcome is not known yet"
    recovery_sweep(desk.control)  # the next attempt is due at once …
    recovery_sweep(desk.control)  # … and is not cancelled before it observed
    assert desk.run(good, queue=direct_queue("east", "node1")) == ["done"]
    assert desk.state(operation) == "done"


def test_a_cancelled_step_that_fails_with_an_unknown_outcome_says_so(desk: Desk) -> None:
    operation = desk.ask()

    def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        cancel(desk.control, operation)
        while not run.cancelled():
            time.sleep(0.01)
        raise OutcomeUnknown("aborted, and nobody answers")

    desk.run(handler)
    assert desk.step(operation).state is StepState.PARKED


# ---- one VM


def test_supersede_waits_for_the_cancelled_one(desk: Desk) -> None:
    vm = desk.vm()
    first = desk.ask_on(vm)
    running, go_on = threading.Event(), threading.Event()

    def long(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        running.set()
        assert go_on.wait(20)
        run.check()
        return {}

    worker = threading.Thread(target=lambda: desk.run(long))
    worker.start()
    assert running.wait(20)
    second = desk.ask_on(vm, supersede=True)
    third = desk.ask_on(vm, supersede=True)
    assert [desk.state(found) for found in (first, second, third)] == ["running", "queued", "queued"]
    assert desk.messages() == []
    go_on.set()
    worker.join(30)
    assert [desk.state(found) for found in (first, second, third)] == ["cancelled", "running", "queued"]
    assert desk.run(good) == ["done"]
    assert [desk.state(found) for found in (second, third)] == ["done", "running"]
    assert desk.run(good) == ["done"]
    assert desk.state(third) == "done"


def test_a_waiting_operation_can_be_cancelled(desk: Desk) -> None:
    vm = desk.vm()
    first, second = desk.ask_on(vm), desk.ask_on(vm, supersede=True)
    cancel(desk.control, second)
    assert desk.state(second) == "cancelled"
    desk.run(never)
    assert desk.state(first) == "cancelled"
    assert desk.messages() == []


def test_one_that_cannot_begin_does_not_keep_the_other_from_ending(desk: Desk) -> None:
    vm = desk.vm()
    first, second = desk.ask_on(vm), desk.ask_on(vm, supersede=True, refuse=True)
    desk.run(never)
    assert desk.state(first) == "cancelled"
    assert (desk.state(second), show(desk.control, second)["error"]["code"]) == ("failed", "wrong_state")


def test_nobody_waits_for_one_that_ends_at_the_same_moment(desk: Desk) -> None:
    for _ in range(5):
        vm = desk.vm()
        first = desk.ask_on(vm)
        desk.work(desk.messages()[0], good)
        report = desk.messages("control")[0]["report"]
        answers = together(lambda: settle(desk.control, report), lambda: desk.ask_on(vm, supersede=True))  # noqa: B023
        second = str(answers[1])
        assert desk.state(first) == "done", answers
        assert desk.run(good) == ["done"], answers
        assert desk.state(second) == "done"
        with desk.control.store.session() as session:
            session.get_one(Vm, vm).deleted_at = now()


def test_what_was_stranded_is_begun_by_the_sweep(desk: Desk) -> None:
    vm = desk.vm()
    ended = desk.ask_on(vm)
    desk.run(good)
    with desk.control.store.session() as session:
        session.add(Operation(kind="test.on_vm", state=OperationState.QUEUED, vm_id=vm, waits_for=ended, request={}))
    recovery_sweep(desk.control)
    assert desk.run(good) == ["done"]
    assert list_operations(desk.control, live=True) == []


# ---- the spool


def test_outcomes_are_kept_until_acknowledged(desk: Desk, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    report = {"step": "s", "attempt": 1, "node": "n", "started_at": 0.0, "ended_at": time.time()}
    spool.write(report)
    assert Spool(tmp_path / "s").pending() == [report]
    assert not spool.is_due(report), "it was just sent"
    old = report | {"ended_at": time.time() - 4}
    assert spool.is_due(old)
    assert not spool.is_due(old), "not again at once"
    (tmp_path / "s" / "broken.1.json").write_text("{")
    assert spool.pending() == [report]
    spool.drop(report)
    assert spool.pending() == []


def test_a_spool_that_takes_no_writes_does_not_hide_the_outcome(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    desk.nodes["node1"].spool = Spool(tmp_path / "file" / "spool")
    operation = desk.ask()
    assert desk.run(good) == ["done"]
    assert desk.state(operation) == "done"


def test_spooled_outcomes_are_sent_again(desk: Desk) -> None:
    operation = desk.ask()
    desk.work(desk.messages()[0], good)
    assert len(desk.messages("control")) == 1  # lost
    node = desk.nodes["node1"]
    path = next(node.spool.folder.glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended_at": time.time() - 5}))
    assert resend_spooled(node) == 1
    desk.settle_all()
    assert desk.state(operation) == "done"
    assert resend_spooled(node) == 0
    assert list(node.spool.folder.glob("*.json")) == []
