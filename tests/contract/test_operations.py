"""Operations on a real Redis and record: claim, fence, settle, retry, cancel, supersede, recovery.

The executor is ``operations.node.execute``; only a step's work is the test's. Messages go through Redis and are taken
out by the test, which so decides who gets what and when.
"""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kombu.exceptions import OperationalError

from hdcs_tasks.errors import HypervisorRefused, NoCapacity, Unreachable, WrongState
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.node import HandOver, Run, resend_spooled
from hdcs_tasks.operations.recovery import recovery_sweep, settle, wake
from hdcs_tasks.operations.spool import Spool
from hdcs_tasks.operations.views import cancel, list_operations, show
from hdcs_tasks.routing import direct_queue
from hdcs_tasks.states import OperationState, StepState
from hdcs_tasks.store.models import Operation, Vm, now
from tests.contract.desk import Desk, Handler, ago, desk, failing, good, never  # noqa: F401 - desk is a fixture
from tests.contract.test_store import together

pytestmark = pytest.mark.contract


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


def test_progress_never_goes_back(desk: Desk) -> None:
    """Neither inside an attempt, whose work may grow, nor with the next one."""
    operation = desk.ask()
    seen: list[float] = []

    def tell(run: Run, *percents: float) -> None:
        for percent in percents:
            run.progress(percent, f"at {percent}")
            seen.append(show(desk.control, operation)["percent"])

    def broken(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        tell(run, 20, 60, 30)
        raise Unreachable("libvirtd went away")

    def again(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        tell(run, 10, 70)
        return {}

    desk.run(broken)
    seen.append(show(desk.control, operation)["percent"])
    desk.due(operation, not_before=ago(1))
    recovery_sweep(desk.control)
    desk.run(again, queue=direct_queue("east", "node1"))
    assert seen == [20, 60, 60, 60, 60, 70]


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


# ---- one VM


def test_a_part_that_is_refused_leaves_nothing_and_the_rest_stays(desk: Desk) -> None:
    vm, given_back = desk.vm(), []
    with desk.control.transaction() as tx:
        parent = tx.open("test.many", asked=Asked())
        with pytest.raises(WrongState), tx.part():
            tx.undo(lambda: given_back.append("a reservation"))
            tx.step(tx.open("test.one", asked=Asked(), parent=parent), "test.work", "east", {"shown": {}})
            tx.open("test.on_vm", asked=Asked(), vm=tx.session.get_one(Vm, vm), parent=parent, request={"refuse": True})
        assert given_back == ["a reservation"]
        child = tx.open("test.on_vm", asked=Asked(), vm=tx.session.get_one(Vm, vm), parent=parent).id
    assert [found["id"] for found in show(desk.control, parent.id)["children"]] == [child]
    assert [message["step"] for message in desk.messages()] == [desk.step(child).id]


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
    assert show(desk.control, second)["steps"] == [] and desk.messages() == [], "what it had begun is undone"


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
