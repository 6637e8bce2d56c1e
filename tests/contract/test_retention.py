"""What has ended leaves the record some time later, on real databases; nothing that lives does."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select

from hdcs_tasks.config import KeepSettings
from hdcs_tasks.monitor import control_alarms, control_retention
from hdcs_tasks.monitor.alarm_rules import Signal
from hdcs_tasks.monitor.control_metrics import HdcsCollector
from hdcs_tasks.monitor.control_retention import retention_sweep
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.states import AlarmState, BackupState, StepState, VmState
from hdcs_tasks.store.models import Backup, Event, Operation, Step, Vm, now
from hdcs_tasks.store.models_watch import Alarm, Notice, UsageSpan
from hdcs_tasks.store.transitions import move
from tests.contract.test_samples import pool, running  # noqa: F401 - pool is a fixture
from tests.contract.test_usage import add

pytestmark = pytest.mark.contract


def ago(days: float) -> datetime:
    return now() - timedelta(days=days)


def ended(control: Control, days: float, kind: str = "test.one", parent: str | None = None, **more: Any) -> str:
    with control.transaction() as tx:
        above = tx.session.get_one(Operation, parent) if parent else None
        operation = tx.open(kind, asked=Asked(), parent=above, **more)
        step = tx.step(operation, "test.work", "east", {})
        tx.finish(operation)
        operation.created_at, operation.ended_at = ago(days + 1 / 86_400), ago(days)
        move(step, StepState.PUBLISHED)
        move(step, StepState.DONE)
        tx._to_publish.clear()
        return operation.id


def count(control: Control, model: Any, *where: Any) -> int:
    with control.store.read() as session:
        return session.scalar(select(func.count()).select_from(model).where(*where)) or 0


def operations(control: Control) -> set[str]:
    with control.store.read() as session:
        return set(session.scalars(select(Operation.id)))


def counters(control: Control) -> dict[tuple[str, ...], float]:
    families = {family.name: family for family in HdcsCollector(control).collect()}
    wanted = ("hdcs_operations", "hdcs_operation_duration_seconds")
    return {(s.name, *sorted(s.labels.values())): s.value for name in wanted for s in families[name].samples}


def test_ended_operations_go_with_their_families_and_metrics_count_on(
    pool: Control, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(control_retention, "AT_ONCE", 2)  # several rounds
    old = [ended(pool, 100 + number) for number in range(5)]
    young = ended(pool, 80)
    family = ended(pool, 200)
    children = [ended(pool, 200, parent=family) for _ in range(5)]
    half = ended(pool, 200)
    late = ended(pool, 10, parent=half)
    with pool.transaction() as tx:
        live = tx.open("test.one", asked=Asked())
        live.created_at, live.waits_for = ago(500), old[0]
        lives = live.id
    before = counters(pool)
    assert retention_sweep(pool)["operations"] == len(old) + 1 + len(children)
    assert operations(pool) == {young, half, late, lives}
    assert count(pool, Step) == 3
    assert counters(pool) == pytest.approx(before), "/metrics never counts backwards"
    again = ended(pool, 300)
    assert retention_sweep(pool)["operations"] == 1 and again not in operations(pool)
    assert counters(pool)["hdcs_operations_total", "done", "test.one"] == before[
        "hdcs_operations_total", "done", "test.one"
    ] + 1  # fmt: skip


def test_deleted_vms_go_with_the_last_that_is_told_of_them(pool: Control) -> None:  # noqa: F811
    vm_id, kept = running(pool), add(pool, "desk-2", "alice")
    chain = {"vm_id": vm_id, "vm_name": "desk-1", "domain_node": "east", "chain": "c", "kind": "full"}
    with pool.transaction() as tx:
        vm = tx.session.get_one(Vm, vm_id)
        move(vm, VmState.STOPPING)
        move(vm, VmState.STOPPED)
        move(vm, VmState.DELETING)
        move(vm, VmState.DELETED)
        vm.deleted_at = ago(120)
        for seq, state in enumerate((BackupState.READY, BackupState.DELETED)):
            tx.session.add(Backup(**chain, seq=seq, state=state, created_at=ago(130)))
    assert retention_sweep(pool)["vms"] == 0, "it has a backup"
    assert count(pool, Backup) == 2, "and so is the point before it of a chain that lives"
    with pool.transaction() as tx:
        ready = tx.session.scalars(select(Backup).where(Backup.state == BackupState.READY)).one()
        move(ready, BackupState.DELETING)
        move(ready, BackupState.DELETED)
    counts = retention_sweep(pool) | {"again": retention_sweep(pool)["vms"]}
    assert (counts["backups"], counts["vms"] + counts["again"]) == (2, 1)
    with pool.store.read() as session:
        assert list(session.scalars(select(Vm.id))) == [kept]


def test_events_cleared_alarms_and_old_use_go_and_the_rest_stays(pool: Control) -> None:  # noqa: F811
    for name in ("node8", "node9"):
        control_alarms.settle(pool, ["node_lost"], [Signal("node_lost", name, 1.0, "lost")])
    with pool.transaction() as tx:
        tx.session.add_all(Event(kind="test", subject="x", message="", data={}, at=ago(days)) for days in (91, 89))
        one, other = tx.session.scalars(select(Alarm).order_by(Alarm.subject))
        for alarm in (one, other):
            alarm.since_at = alarm.raised_at = ago(900)
            tx.session.add(Notice(alarm_id=alarm.id, what="raised", target="t", title="", body=""))
        move(one, AlarmState.CLEARED)
        one.live_key, one.cleared_at = None, ago(500)
        for days in (1500, 1000):
            tx.session.add(UsageSpan(kind="vm", vm_id="v", vm_name="v", size_bytes=1, opened_at=ago(days + 1),
                                     closed_at=ago(days)))  # fmt: skip
        tx.session.add(UsageSpan(kind="vm", vm_id="v", vm_name="v", size_bytes=1, open_key="vm:v", opened_at=ago(2000)))
    counts = retention_sweep(pool)
    assert (counts["events"], counts["alarms"], counts["usage"]) == (1, 1, 1)
    assert (count(pool, Event, Event.kind == "test"), count(pool, Alarm), count(pool, Notice)) == (1, 1, 1)
    assert count(pool, UsageSpan, UsageSpan.vm_id == "v") == 2
    assert not any(retention_sweep(pool).values())


def test_for_ever_and_for_no_shorter_than_alarms_look_back(pool: Control) -> None:  # noqa: F811
    days = (7.5, 9, 4000)
    for age in days:
        ended(pool, age)
    kept = operations(pool)
    pool.settings.keep = KeepSettings(operations_days=0)
    retention_sweep(pool)
    assert operations(pool) == kept
    pool.settings.keep = KeepSettings(operations_days=1)
    assert retention_sweep(pool)["operations"] == 2
