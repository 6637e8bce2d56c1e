"""The record on a real SQLite and PostgreSQL: schema, compare-and-set, uniqueness, what concurrency may not do."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import DateTime, inspect, select, text
from sqlalchemy.exc import IntegrityError

from hdcs_tasks.errors import Conflict, Invalid, Unreachable, WrongState
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.states import OperationState, VmState
from hdcs_tasks.store.engine import Store, make_engine
from hdcs_tasks.store.migrate import upgrade
from hdcs_tasks.store.models import Base, DomainNode, Event, Operation, UtcDateTime, Vm, now
from hdcs_tasks.store.transitions import move
from tests.services import free_port

pytestmark = pytest.mark.contract


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls in threads that begin at the same moment; each answer, or the exception it raised."""
    gate = threading.Barrier(len(calls))
    answers: list[Any] = [None] * len(calls)

    def run(at: int, call: Callable[[], Any]) -> None:
        gate.wait(10)
        try:
            answers[at] = call()
        except Exception as error:
            answers[at] = error

    threads = [threading.Thread(target=run, args=(at, call)) for at, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a deadlock"
    return answers


def vm_row(name: str = "desk-01", *, mac: str = "52:54:00:00:00:01", **more: Any) -> Vm:
    facts: dict[str, Any] = {
        "name": name, "state": VmState.STOPPED, "home": "east", "profile": "small", "vcpus": 2, "memory_mib": 2048,
        "disk_bytes": 40 * 1024**3, "mac": mac, "tags": [],
    }  # fmt: skip
    return Vm(**(facts | more))


def with_vm(store: Store, **more: Any) -> str:
    """A data center with the domain node east and one VM; the VM's id."""
    with store.session() as session:
        if session.get(DomainNode, "east") is None:
            session.add(DomainNode(name="east", token_key="k", port_first=20000, port_last=20999))
            session.flush()
        vm = vm_row(**more)
        session.add(vm)
        session.flush()
        return vm.id


@pytest.fixture
def store(control: Control) -> Store:
    return control.store


# ---- schema


def test_migrations_make_the_models(database: str) -> None:
    engine = make_engine(database)
    kinds = {"postgresql": {"compare_type": _compare_type}, "sqlite": {"compare_type": _compare_type}}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=kinds[engine.dialect.name])
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def _compare_type(_c: Any, _i: Any, _m: Any, inspected: Any, model: Any) -> bool | None:
    return not isinstance(inspected, DateTime) if isinstance(model, UtcDateTime) else None


def test_upgrades_at_once_queue(empty_database: str) -> None:
    code = f"from hdcs_tasks.store.migrate import upgrade; upgrade({empty_database!r})"
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], errors
    upgrade(empty_database)
    engine = make_engine(empty_database)
    assert {"vm", "operation", "step"} <= set(inspect(engine).get_table_names())
    engine.dispose()


def test_a_newer_database_is_refused_with_a_reason(database: str) -> None:
    engine = make_engine(database)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(WrongState, match="revision 9999"):
        upgrade(database)


def test_a_database_that_is_away_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="does not answer"):
        upgrade(f"postgresql://hdcs@127.0.0.1:{free_port()}/hdcs")


# ---- values


def test_datetimes_come_back_aware_in_utc(store: Store) -> None:
    at = datetime(2024, 7, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    with store.session() as session:
        session.add(Event(kind="k", subject="s", message="m", data={}, at=at))
    with store.read() as session:
        found = session.scalars(select(Event)).one()
        assert found.at == at
        assert found.at.tzinfo is UTC
        assert session.scalar(select(Event.id).where(Event.at <= at)) == found.id
        assert session.scalar(select(Event.id).where(Event.at < at)) is None


def test_sizes_beyond_2_gib_are_kept(store: Store) -> None:
    vm_id = with_vm(store, disk_bytes=3 * 1024**4)
    with store.read() as session:
        assert session.get_one(Vm, vm_id).disk_bytes == 3 * 1024**4


def test_a_value_too_long_is_invalid_not_a_driver_error(store: Store) -> None:
    if store.engine.dialect.name == "sqlite":
        with_vm(store, owner="x" * 300)  # SQLite has no lengths
        return
    with pytest.raises(Invalid, match="does not fit"):
        with_vm(store, owner="x" * 300)


def test_names_and_macs_are_unique_among_the_living_only(store: Store) -> None:
    first = with_vm(store)
    with pytest.raises(IntegrityError):
        with_vm(store, mac="52:54:00:00:00:02")
    with pytest.raises(IntegrityError):
        with_vm(store, name="desk-02")
    with store.session() as session:
        session.get_one(Vm, first).deleted_at = now()
    assert with_vm(store) != first


# ---- compare-and-set


def test_an_illegal_move_is_refused(store: Store) -> None:
    vm_id = with_vm(store)
    with pytest.raises(WrongState, match="VM desk-01 is stopped and cannot"), store.session() as session:
        move(session.get_one(Vm, vm_id), VmState.SUSPENDING)


def test_move_sees_that_the_row_changed_underneath(store: Store) -> None:
    vm_id = with_vm(store)
    with store.read() as session:
        stale = session.get_one(Vm, vm_id)
    with store.session() as session:
        move(session.get_one(Vm, vm_id), VmState.STARTING)
    with pytest.raises(Conflict, match="changed while it was moved"), store.session() as session:
        session.add(stale)
        move(stale, VmState.DELETING)


def test_of_two_moves_at_once_one_wins(store: Store) -> None:
    vm_id = with_vm(store)
    ready = threading.Barrier(2)

    def go(to: VmState) -> VmState:
        with store.read() as session:
            vm = session.get_one(Vm, vm_id)
        ready.wait(10)  # both have read STOPPED
        with store.session() as session:
            session.add(vm)
            move(vm, to)
        return to

    answers = together(lambda: go(VmState.STARTING), lambda: go(VmState.DELETING))
    won = [answer for answer in answers if isinstance(answer, VmState)]
    assert len(won) == 1, answers
    assert [type(answer) for answer in answers if not isinstance(answer, VmState)] == [Conflict]
    with store.read() as session:
        vm = session.get_one(Vm, vm_id)
        assert vm.state is won[0]
        assert vm.state_at > vm.created_at


# ---- operations under concurrency


def test_one_live_operation_per_vm(control: Control) -> None:
    vm_id = with_vm(control.store)

    def ask() -> str:
        with control.transaction() as tx:
            return tx.open("test.nothing", asked=Asked(), vm=tx.session.get_one(Vm, vm_id)).id

    answers = together(*[ask] * 6)
    assert len([answer for answer in answers if isinstance(answer, str)]) == 1, answers
    assert {type(answer) for answer in answers} == {str, Conflict}
    with control.store.read() as session:
        live = session.scalars(select(Operation).where(Operation.live_vm == vm_id)).all()
    assert [operation.state for operation in live] == [OperationState.QUEUED]


def test_the_database_itself_forbids_a_second_live_operation(store: Store) -> None:
    vm_id = with_vm(store)
    facts: dict[str, Any] = {"kind": "k", "state": OperationState.QUEUED, "live_vm": vm_id, "request": {}}
    with pytest.raises(IntegrityError), store.session() as session:
        session.add_all([Operation(**facts), Operation(**facts)])


def test_the_same_key_asked_at_once_is_one_operation(control: Control) -> None:
    asked = Asked(by="anna", idempotency_key="order-7")

    def ask() -> str:
        with control.transaction() as tx:
            same = tx.same_request(asked, "test.nothing", "")
            return (same or tx.open("test.nothing", asked=asked)).id

    answers = together(*[ask] * 6)
    assert len(set(answers)) == 1, answers
    assert isinstance(answers[0], str)


def test_a_parent_ends_once_when_its_children_end_at_once(control: Control) -> None:
    for _ in range(5):
        with control.transaction() as tx:
            parent = tx.open("test.many", asked=Asked())
            children = [tx.open("test.one", asked=Asked(), parent=parent, subject=f"c{at}").id for at in range(4)]

        def end(child: str) -> None:
            with control.transaction() as tx:
                tx.finish(tx.session.get_one(Operation, child))

        answers = together(*[lambda child=child: end(child) for child in children])  # type: ignore[misc]
        assert answers == [None] * 4
        with control.store.read() as session:
            found = session.get_one(Operation, parent.id)
            assert (found.state, found.percent) == (OperationState.DONE, 100.0)
            assert found.result is not None
            assert sorted(found.result["children"]) == ["c0", "c1", "c2", "c3"]


def test_a_parent_with_a_failed_child_fails_and_lists_both(control: Control) -> None:
    with control.transaction() as tx:
        parent = tx.open("test.many", asked=Asked())
        good = tx.open("test.one", asked=Asked(), parent=parent, subject="good")
        bad = tx.open("test.one", asked=Asked(), parent=parent, subject="bad")
        tx.fail(bad, WrongState("it is off"))
        assert parent.state is OperationState.RUNNING
        tx.finish(good)
    assert parent.state is OperationState.FAILED
    assert parent.error == {
        "code": "wrong_state", "message": "1 of 2 failed: bad: it is off", "next": "",
        "details": {"failed": ["bad"], "done": ["good"]},
    }  # fmt: skip


# ---- what a failed transaction leaves behind


def test_a_failed_transaction_gives_back_what_it_reserved(control: Control) -> None:
    given = []
    with pytest.raises(ZeroDivisionError), control.transaction() as tx:
        control.reservations.macs.take("vm-1")
        tx.undo(lambda: given.append(control.reservations.macs.release("vm-1")))
        tx.undo(lambda: 1 / 0)  # an undo that fails hides neither the others nor the first error
        tx.event("k", "s", "m")
        raise ZeroDivisionError("the first error")
    assert given == [True]
    assert control.reservations.macs.all() == {}
    with control.store.read() as session:
        assert session.scalars(select(Event)).all() == []


def test_what_follows_a_commit_cannot_stop_the_rest(control: Control) -> None:
    ran: list[str] = []
    with control.transaction() as tx:
        tx.after(lambda: control.reservations.ports.take("nowhere", "vm"))
        tx.after(lambda: ran.append("second"))
        operation = tx.open("test.one", asked=Asked())
        step = tx.step(operation, "test.work", "east", {})
    assert ran == ["second"]
    assert control.reservations.steps.status(step.id) is not None
