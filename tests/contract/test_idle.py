"""Idle policies on a real record and a real Redis: what a look or an outcome makes of a desktop."""

from __future__ import annotations

import base64
import json
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import redis
import time_machine
from sqlalchemy import select

from hdcs_tasks.errors import Cancelled, Conflict, HdcsError, Invalid, NotFound, Unavailable
from hdcs_tasks.monitor import control_idle, control_idle_policy, node_idle
from hdcs_tasks.monitor.control_samples import take_sample
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.recovery import settle
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Event, Operation, Step, Vm, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control as vms
from tests.contract.test_samples import events, pool, running, sample_of, vm_of  # noqa: F401 - pool is a fixture

pytestmark = pytest.mark.contract
FOUND = {"at": "2026-11-28T12:00:00+00:00", "late_s": 0.5}
QUIET: dict[str, Any] = {"console_clients": 0, "agent": True, "users": [], "processes": [], "says": ""}


def idle_for(control: Control, vm_id: str, seconds: float) -> None:
    with control.transaction() as tx:
        vm = tx.session.get_one(Vm, vm_id)
        vm.active_at, vm.observed_at = now() - timedelta(seconds=seconds), now()


def looked(control: Control, vm_id: str, **more: Any) -> None:
    looks = [QUIET | {"vm_id": vm_id, "found": FOUND} | more]
    control_idle.take_looks(control, {"node": "node1", "looks": looks})


def sweep(control: Control) -> list[str]:
    """Whose rung is found due: on the server node by its sample, at rest by the sweep."""
    return [*control_idle.look_at(control, "node1", now()), *control_idle.idle_sweep(control)]


def operations(control: Control) -> list[Operation]:
    with control.store.read() as session:
        return list(session.scalars(select(Operation).order_by(Operation.created_at)))


def end(control: Control, error: HdcsError | None = None) -> None:
    """Settle the newest step as its server node would."""
    with control.store.read() as session:
        step = session.scalars(select(Step).order_by(Step.created_at.desc())).first()
        assert step is not None
        report = {"step": step.id, "attempt": step.attempt, "node": "node1", "started_at": 1.0, "ended_at": 2.0}
    settle(control, report | ({"error": error.to_dict()} if error else {"result": {"node": "node1", "ran": True}}))


def test_a_desktop_goes_down_the_ladder_and_its_place_is_free_again(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    control_idle_policy.create(pool, "office", selector={}, warn=100, stop=200, delete=5000)
    idle_for(pool, vm_id, 50)
    assert sweep(pool) == []
    idle_for(pool, vm_id, 4000)
    assert sweep(pool) == [vm_of(pool, vm_id).name]
    assert operations(pool) == [], "it is looked at first"
    looked(pool, vm_id)
    assert operations(pool) == [], "not told, not warned: the next sweep tries again"
    looked(pool, vm_id, told=True)
    assert "was warned in the guest" in events(pool, "vm.warned")[0]
    looked(pool, vm_id)
    assert operations(pool) == [], "it has the time between warn and stop"
    (row,) = control_idle.preview(pool)
    assert (row["did"], row["next"], row["used"]) == ("warn", "stop", "")
    assert 90 < row["in_s"] <= 100 and row["signals"]["users"] == []
    with pool.transaction() as tx:
        vm = tx.session.get_one(Vm, vm_id)
        vm.idle = vm.idle | {"at": (now() - timedelta(seconds=101)).isoformat()}
    looked(pool, vm_id)
    (stop,) = operations(pool)
    assert (stop.kind, stop.requested_by, stop.request["guard"]["rung"]) == ("vm.stop", "idle policy office", "stop")
    end(pool)
    vm = vm_of(pool, vm_id)
    assert (vm.state, vm.server_node, vm.port, vm.ip) == (VmState.STOPPED, None, None, None)
    assert "was stopped: nobody used it for" in events(pool, "vm.reclaimed")[0]
    assert pool.reservations.ports.usage("east")[:2] == (0, 1), "its port cools"
    assert sweep(pool) == []
    idle_for(pool, vm_id, 10_000)
    with pool.transaction() as tx:
        row_ = tx.session.get_one(Vm, vm_id)
        row_.idle = row_.idle | {"at": (now() - timedelta(seconds=5001)).isoformat()}
    sweep(pool)
    assert [op.kind for op in operations(pool)] == ["vm.stop", "vm.delete"]


def test_who_is_used_begins_anew_also_in_the_last_second(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    control_idle_policy.create(pool, "office", selector={}, stop=100)
    for more in ({"users": ["anna"]}, {"processes": ["firefox"]}, {"console_clients": 1}):
        idle_for(pool, vm_id, 500)
        looked(pool, vm_id, **more)
        assert operations(pool) == []
        assert vm_of(pool, vm_id).active_at >= now() - timedelta(seconds=30)  # type: ignore[operator]
    idle_for(pool, vm_id, 500)
    looked(pool, vm_id)
    assert vm_of(pool, vm_id).state is VmState.STOPPING
    end(pool, Cancelled("left alone: logged in: anna", details={"used": "logged in: anna"}))
    vm = vm_of(pool, vm_id)
    assert vm.state is VmState.RUNNING and vm.active_at >= now() - timedelta(seconds=30)  # type: ignore[operator]
    assert operations(pool)[0].state == "cancelled"
    assert "left alone: logged in: anna" in events(pool, "vm.in_use")[0]
    assert sweep(pool) == []


def test_a_rung_is_found_due_by_the_first_sample_after_its_time(pool: Control) -> None:  # noqa: F811
    """And the server node is asked at once: neither a second sample nor another sweep is waited for."""
    vm_id = running(pool)
    control_idle_policy.create(pool, "office", selector={}, warn=100, stop=130)
    began = now()

    def sampled(after_s: float, cpu_percent: float = 1.0) -> list[Any]:
        clock.move_to(began + timedelta(seconds=after_s))
        take_sample(pool, sample_of("node1", now().timestamp(), vm_id, cpu_percent=cpu_percent))
        return [message["wanted"][0]["found"] for message in looks_asked(pool)]

    with time_machine.travel(began, tick=False) as clock:
        assert sampled(10, cpu_percent=50.0) == []
        assert sampled(109.9) == []
        (found,) = sampled(110.2)
        assert found == {"at": now().isoformat(), "late_s": pytest.approx(0.2, abs=0.001)}
        clock.shift(timedelta(seconds=0.5))
        look = QUIET | {"vm_id": vm_id, "found": found, "told": True}
        control_idle.take_looks(pool, {"node": "node1", "looks": [look]})
        assert len(sampled(140.6)) == 1, "30 s after the warning"
        assert sampled(140.9)[1]["late_s"] == pytest.approx(0.2, abs=0.001)


def looks_asked(control: Control) -> list[dict[str, Any]]:
    """The messages that wait for node1's quick worker and ask it to look, oldest first."""
    waiting = redis.Redis.from_url(control.settings.redis_url).lrange(
        control.settings.key_prefix + quick_queue("east", "node1"), 0, -1)  # fmt: skip
    bodies = [json.loads(text) for text in waiting]  # type: ignore[union-attr]
    return [json.loads(base64.b64decode(body["body"]))[1] for body in reversed(bodies)
            if body["headers"]["task"] == control_idle.LOOK_TASK]  # fmt: skip


def test_a_desktop_at_rest_is_found_due_by_the_first_sweep_after_its_time(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    control_idle_policy.create(pool, "kiosks", selector={}, stop=100, delete=300)
    idle_for(pool, vm_id, 101)
    looked(pool, vm_id)
    end(pool)
    for idle_s, found in ((299.5, []), (300.5, [vm_of(pool, vm_id).name])):
        with pool.transaction() as tx:
            vm = tx.session.get_one(Vm, vm_id)
            vm.active_at = now() - timedelta(seconds=idle_s)
            vm.idle = vm.idle | {"at": (vm.active_at + timedelta(seconds=100)).isoformat()}
        assert control_idle.idle_sweep(pool) == found
    assert operations(pool)[-1].kind == "vm.delete"
    with pool.store.read() as session:
        told = session.scalars(select(Event).where(Event.kind == "vm.reclaimed").order_by(Event.id.desc())).first()
    assert told is not None and 0.5 <= told.data["found"]["late_s"] < 60


def test_a_silent_guest_keeps_no_other_from_being_looked_into() -> None:
    looker, begun, go_on = node_idle.Looker(), threading.Semaphore(0), threading.Event()
    seen: list[str] = []

    def silent() -> None:
        begun.release()
        go_on.wait(60)

    def answers() -> None:
        seen.append("answers")
        begun.release()

    assert looker.ask("silent", silent) and begun.acquire(timeout=60)
    assert looker.ask("answers", answers) and begun.acquire(timeout=60), "while the other is waited for"
    assert not looker.ask("silent", silent), "one look at a guest at a time"
    for number in range(node_idle.AT_ONCE - 1):
        assert looker.ask(f"silent {number}", silent) and begun.acquire(timeout=60)
    assert looker.ask("late", lambda: seen.append("late"))
    looker.stop()
    assert not looker.ask("later", lambda: seen.append("later"))
    go_on.set()
    looker._pool.shutdown(wait=True)
    assert seen == ["answers"], "nobody whose look had not begun is looked into by a worker that ends"


def test_the_clock_of_a_server_node_that_is_wrong_takes_nobody_too_early(pool: Control) -> None:  # noqa: F811
    vm_id, at = running(pool), time.time() + 5
    host = {"clock_skew_s": -120.0}
    take_sample(pool, sample_of("node1", at - 120, vm_id, cpu_percent=90.0) | {"host": host})
    assert vm_of(pool, vm_id).active_at.timestamp() == pytest.approx(at)  # type: ignore[union-attr]


def test_a_silent_agent_is_judged_by_the_rest_and_says_so(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    control_idle_policy.create(pool, "office", selector={}, stop=100)
    idle_for(pool, vm_id, 500)
    looked(pool, vm_id, agent=False, users=None, processes=None, says="the guest agent is silent; the rest decides")
    assert [op.kind for op in operations(pool)] == ["vm.stop"]
    with pool.store.read() as session:
        assert "guard" in session.scalars(select(Step)).one().spec
    pool_signals = pool.reservations.samples.looks([vm_id])[vm_id]
    assert pool_signals["says"].startswith("the guest agent is silent")


def test_samples_by_the_limits_of_the_vms_own_policy_say_who_is_used(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    for number, (percent, used) in enumerate([(50.0, True), (5.0, False)]):
        idle_for(pool, vm_id, 500)
        take_sample(pool, sample_of("node1", time.time() + 60 + number, vm_id, cpu_percent=percent))
        assert (vm_of(pool, vm_id).active_at > now()) is used  # type: ignore[operator]
    control_idle_policy.create(pool, "renderers", selector={}, stop=100, cpu_percent=60)
    idle_for(pool, vm_id, 500)
    take_sample(pool, sample_of("node1", time.time() + 70, vm_id, cpu_percent=50.0))
    assert vm_of(pool, vm_id).active_at < now()  # type: ignore[operator]


def test_idle_policies_supersede_nothing_and_a_failed_stop_is_tried_again(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    control_idle_policy.create(pool, "office", selector={}, stop=100, delete=200, force=True)
    name = vm_of(pool, vm_id).name
    idle_for(pool, vm_id, 500)
    vms.command(pool, "reboot", name, Asked())
    looked(pool, vm_id)
    assert [op.kind for op in operations(pool)] == ["vm.reboot"]
    end(pool)
    idle_for(pool, vm_id, 500)
    looked(pool, vm_id)
    for _ in range(pool.settings.attempts_max):
        with pool.store.read() as session:
            if session.scalars(select(Step).order_by(Step.created_at.desc())).first().state == "failed":  # type: ignore[union-attr]
                break
        end(pool, Unavailable("did not shut down"))
        with pool.transaction() as tx:
            step = tx.session.scalars(select(Step).order_by(Step.created_at.desc())).first()
            if step is not None and step.state == "parked":
                tx.publish(step)
    assert vm_of(pool, vm_id).state is VmState.RUNNING
    assert sweep(pool) == [name], "it is due still"
    with pool.transaction() as tx:
        vm = tx.session.get_one(Vm, vm_id)
        move(vm, VmState.STOPPED)
        vm.server_node = None
    vms.start(pool, name, Asked())
    sweep(pool)
    assert operations(pool)[-1].kind == "vm.start", "somebody starts it: it is not deleted"


def test_policies_are_records(pool: Control) -> None:  # noqa: F811
    made = control_idle_policy.create(pool, "office", selector={"tag": "office"}, warn=60, save=120)
    assert (made["warn"], made["suspend"], made["save"], made["enabled"]) == (60.0, None, 120.0, True)
    with pytest.raises(Conflict):
        control_idle_policy.create(pool, "office", selector={}, stop=1)
    for wrong in ({"selector": {"colour": 1}, "stop": 5}, {"selector": {}}, {"selector": {}, "nap": 5},
                  {"selector": {}, "stop": 5, "cpu_percent": -1}):  # fmt: skip
        with pytest.raises(Invalid):
            control_idle_policy.create(pool, "other", **wrong)  # type: ignore[arg-type]
    assert control_idle_policy.enable(pool, "office", False)["enabled"] is False
    vm_id = running(pool)
    idle_for(pool, vm_id, 5000)
    assert sweep(pool) == [] and control_idle.preview(pool) == []
    control_idle_policy.delete(pool, "office")
    with pytest.raises(NotFound):
        control_idle_policy.show(pool, "office")
