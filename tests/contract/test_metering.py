"""Spans of use follow the record without a gap, on real databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import select

from hdcs_tasks.operations.control import Control
from hdcs_tasks.states import ServerNodeState, VmState
from hdcs_tasks.store import metering
from hdcs_tasks.store.models import ServerNode, Vm, now
from hdcs_tasks.store.models_watch import UsageSpan
from hdcs_tasks.store.transitions import move
from tests.contract.test_samples import pool, running  # noqa: F401 - pool is a fixture

pytestmark = pytest.mark.contract


def spans(control: Control, kind: str = "vm") -> list[UsageSpan]:
    with control.store.read() as session:
        return list(session.scalars(select(UsageSpan).where(UsageSpan.kind == kind).order_by(UsageSpan.id)))


def shape(control: Control, kind: str = "vm") -> list[tuple[Any, ...]]:
    return [(s.level, s.server_node, s.observed, s.closed_at is None) for s in spans(control, kind)]


def seamless(control: Control) -> None:
    found = spans(control)
    for one, following in pairwise(found):
        assert one.closed_at == following.opened_at, "no second is lost or counted twice"
    assert [s.open_key is None for s in found] == [s.closed_at is not None for s in found]


def to(control: Control, vm_id: str, *states: VmState, node: str | None = "node1", at: datetime | None = None) -> None:
    for state in states:
        with control.transaction() as tx:
            vm = tx.session.get_one(Vm, vm_id)
            if at is not None:
                metering.happened_at(tx.session, at)
            vm.server_node = node
            move(vm, state)


def test_levels_follow_the_states_and_the_way_there_counts_as_before(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    to(pool, vm_id, VmState.SUSPENDING, VmState.SUSPENDED, VmState.RESUMING, VmState.RUNNING)
    to(pool, vm_id, VmState.MIGRATING)
    to(pool, vm_id, VmState.RUNNING, node="node2")
    to(pool, vm_id, VmState.REBOOTING, VmState.RUNNING, VmState.SAVING, VmState.SAVED, node="node2")
    to(pool, vm_id, VmState.STARTING, VmState.RUNNING, VmState.STOPPING, VmState.STOPPED)
    to(pool, vm_id, VmState.DELETING, VmState.DELETED, node=None)
    assert [(level, node) for level, node, *_ in shape(pool)] == [
        ("off", None), ("on", "node1"), ("paused", "node1"), ("on", "node1"), ("on", "node2"), ("off", None),
        ("on", "node1"), ("off", None),
    ]  # fmt: skip
    seamless(pool)
    assert not any(span.closed_at is None for span in spans(pool))


def test_the_moment_the_server_node_told_counts_but_never_one_before_the_last(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    began = spans(pool)[1].opened_at
    to(pool, vm_id, VmState.STOPPING)
    to(pool, vm_id, VmState.STOPPED, at=began + timedelta(microseconds=7))
    assert spans(pool)[1].closed_at == began + timedelta(microseconds=7)
    to(pool, vm_id, VmState.STARTING)
    to(pool, vm_id, VmState.RUNNING, at=began - timedelta(seconds=5))
    assert spans(pool)[2].closed_at == spans(pool)[2].opened_at, "a clock that is behind takes nothing back"
    to(pool, vm_id, VmState.STOPPING)
    to(pool, vm_id, VmState.STOPPED, at=now() + timedelta(hours=1))
    closed = spans(pool)[3].closed_at
    assert closed is not None and closed <= datetime.now(UTC), "and one that is ahead adds nothing"
    seamless(pool)


def test_a_failed_start_is_not_counted_and_an_unknown_end_goes_on(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    to(pool, vm_id, VmState.STOPPING, VmState.FAILED)
    assert shape(pool)[-1] == ("on", "node1", True, True)
    to(pool, vm_id, VmState.STOPPED)
    before = len(spans(pool))
    to(pool, vm_id, VmState.STARTING, VmState.STOPPED)
    assert len(spans(pool)) == before


def test_out_of_sight_is_marked(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    with pool.transaction() as tx:
        move(tx.session.get_one(ServerNode, "node1"), ServerNodeState.LOST)
    with pool.transaction() as tx:
        move(tx.session.get_one(ServerNode, "node1"), ServerNodeState.UP)
    assert shape(pool)[1:] == [("on", "node1", True, False), ("on", "node1", False, True)]
    with pool.transaction() as tx:
        metering.sampled(tx.session, "node1", {vm_id}, (), now())
    assert shape(pool)[2:] == [("on", "node1", False, False), ("on", "node1", True, True)]
    seamless(pool)


def test_a_crash_between_two_samples(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    seen = now()
    found = now() + timedelta(milliseconds=1)
    with pool.transaction() as tx:
        metering.gone(tx.session, tx.session.get_one(Vm, vm_id), seen, found)
    assert shape(pool)[1:] == [
        ("on", "node1", True, False), ("on", "node1", False, False), ("off", None, True, True),
    ]  # fmt: skip
    to(pool, vm_id, VmState.STOPPING, VmState.STOPPED, node=None)
    assert len(spans(pool)) == 4, "its stop finds nothing to count"
    seamless(pool)


def test_console_clients_are_counted_from_sample_to_sample(pool: Control) -> None:  # noqa: F811
    vm_id = running(pool)
    moments = [now() - timedelta(seconds=s) for s in (30, 20, 10)]
    for at, watched in zip(moments, ({vm_id}, {vm_id}, set()), strict=True):
        with pool.transaction() as tx:
            metering.sampled(tx.session, "node1", {vm_id}, watched, at)
    (span,) = spans(pool, "console")
    assert (span.opened_at, span.closed_at) == (moments[0], moments[2])
    with pool.transaction() as tx:
        metering.sampled(tx.session, "node1", {vm_id}, {vm_id}, now())
    to(pool, vm_id, VmState.STOPPING, VmState.STOPPED)
    assert all(span.closed_at for span in spans(pool, "console")), "no guest, no client"
