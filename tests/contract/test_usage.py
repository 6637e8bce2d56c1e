"""Statements and quotas on real databases; an hour in which everything happens adds up to the hour."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine

from hdcs_tasks.app import make_app
from hdcs_tasks.errors import Invalid, NotFound, QuotaExceeded
from hdcs_tasks.monitor import control_samples
from hdcs_tasks.monitor.control_usage import usage
from hdcs_tasks.operations import recovery
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.views import show
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool.proof import JoinRequest
from hdcs_tasks.states import ServerNodeState, VmState
from hdcs_tasks.store.migrate import upgrade
from hdcs_tasks.store.models import Image, ServerNode, Step, Vm, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control as vms
from hdcs_tasks.vm import control_migrate, control_quota, control_shape
from hdcs_tasks.vm.control_clone import Shape, new_vm
from hdcs_tasks.vm.control_quota import check_quota
from hdcs_tasks.vm.control_take import Wish, take
from hdcs_tasks.vm.quota_rules import Amounts
from tests.contract.conftest import make_settings
from tests.contract.test_samples import pool, running, sample_of, vm_of  # noqa: F401 - pool is a fixture
from tests.contract.test_store import together
from tests.contract.test_tidy import FACTS, TOKEN, join_request, stopped_vm
from tests.services import RedisServer

pytestmark = pytest.mark.contract


def settle(control: Control, result: dict[str, Any], node: str, **more: Any) -> None:
    """The outcome of the one step under way, as a server node tells it."""
    with control.store.read() as session:
        (step,) = session.query(Step).filter(Step.state == "published").all()
        report = {"step": step.id, "attempt": step.attempt, "node": node, "result": result}
    at = now().timestamp()
    recovery.settle(control, report | {"started_at": at, "ended_at": at} | more)


def test_a_metered_hour_with_a_migration_a_dead_worker_and_a_lost_node_is_an_hour(pool: Control) -> None:  # noqa: F811
    with time_machine.travel(now(), tick=False) as clock:
        storage = {"total_bytes": 10**12, "free_bytes": 10**12}
        other = JoinRequest("east", "node2", "10.0.0.2", "instance-node2", FACTS, storage, now().timestamp())
        pool_control.join(pool, join_request())
        pool_control.join(pool, other.signed(TOKEN))
        vm_id, began = stopped_vm(pool), now()
        vms.start(pool, "desk-1", Asked())
        settle(pool, {"node": "node1", "port": 20000, "ip": "10.128.0.2"}, "node1")

        clock.shift(timedelta(minutes=10))
        control_samples.take_sample(pool, sample_of("node1", now().timestamp(), vm_id, console_clients=1))
        clock.shift(timedelta(minutes=5))
        control_samples.take_sample(pool, sample_of("node1", now().timestamp(), vm_id))

        control_migrate.migrate(pool, "desk-1", Asked(), to="node2")
        clock.shift(timedelta(minutes=1))
        settle(pool, {"node": "node2", "address": "10.0.0.2", "ip": "10.128.4.2", "port": 20000}, "node2")
        clock.shift(timedelta(minutes=1))  # its executor died; the next attempt is settled late
        settle(pool, {}, "node1", attempt=0, ended_at=now().timestamp() - 30)
        settle(pool, {"downtime_ms": 5, "total_ms": 900}, "node1")
        for node in ("node2", "node1"):
            settle(pool, {"node": node}, node)
        assert (vm_of(pool, vm_id).state, vm_of(pool, vm_id).server_node) == (VmState.RUNNING, "node2")

        clock.shift(timedelta(minutes=3))
        control_samples.take_sample(pool, sample_of("node2", now().timestamp(), vm_id))
        pool.reservations.leases.drop("node", "node2", "instance-node2")
        clock.shift(timedelta(minutes=2))
        pool.reservations.leases.grant("node", "node1", "instance-node1", 7200)
        assert pool_control.lease_sweep(pool) == ["node2"]
        clock.shift(timedelta(minutes=8))
        back = JoinRequest("east", "node2", "10.0.0.2", "instance-node2", FACTS, storage, now().timestamp())
        pool_control.join(pool, back.signed(TOKEN))
        control_samples.take_sample(pool, sample_of("node2", now().timestamp() + 1e-3, vm_id))

        clock.shift(timedelta(minutes=20))
        crashed = {"node": "node2", "vm_id": vm_id, "kind": "ended", "at": now().timestamp()}
        clock.shift(timedelta(minutes=5))  # nobody was there to hear of it
        control_samples.take_event(pool, crashed)
        settle(pool, {}, "node2")
        clock.shift(timedelta(minutes=5))

        (row,) = usage(pool, start=began, end=began + timedelta(hours=1))["rows"]
        assert row["running_s"] == pytest.approx(50 * 60), "it ran for 50 minutes, then it crashed"
        assert row["vcpu_s"] == row["running_s"] and row["memory_mib_s"] == pytest.approx(50 * 60 * 128)
        assert row["unobserved_s"] == pytest.approx(10 * 60, abs=0.01)
        assert row["console_s"] == 5 * 60
        assert row["disk_byte_s"] == 3600 * 10**9, "its disk was there all the time"
        parts = [usage(pool, start=began + timedelta(minutes=n), end=began + timedelta(minutes=n + 7))["rows"]
                 for n in range(0, 60, 7)]  # fmt: skip
        assert sum(part[0]["running_s"] for part in parts if part) == pytest.approx(50 * 60)


def test_a_server_node_whose_clock_is_wrong_moves_a_span_by_no_more_than_its_step_took(pool: Control) -> None:  # noqa: F811
    for skew_s in (-250, 250):
        with time_machine.travel(now(), tick=False) as clock:
            vm_id = add(pool, f"skewed{skew_s}", "alice")
            name = vm_of(pool, vm_id).name
            began = now()
            vms.start(pool, name, Asked())
            clock.shift(timedelta(seconds=2))
            settle(pool, {"node": "node1", "port": 20000, "ip": "10.128.0.2"}, "node1",
                   ended_at=now().timestamp() + skew_s)  # fmt: skip
            clock.shift(timedelta(minutes=10))
            vms.command(pool, "stop", name, Asked())
            clock.shift(timedelta(seconds=2))
            settle(pool, {"node": "node1"}, "node1", ended_at=now().timestamp() + skew_s)
            clock.shift(timedelta(minutes=10))
            (row,) = usage(pool, start=began, end=now(), vm=name)["rows"]
            assert row["running_s"] == pytest.approx(602, abs=2.01), skew_s


def test_what_changes_while_nothing_moves_is_counted_from_then_on(pool: Control) -> None:  # noqa: F811
    """A ready desktop that is taken, a disk that grows, another name: no start or stop tells of it."""
    with time_machine.travel(now(), tick=False) as clock:
        vm_id, began = running(pool), now()
        with pool.transaction() as tx:
            image = Image(name="mini", version=1)
            tx.session.add(image)
            tx.session.flush()
            vm = tx.session.get_one(Vm, vm_id)
            vm.warm_pool, vm.image_id, vm.ready_at = "morning", image.id, now()
            wish = Wish({vm.home: image}, vm.profile, None, ["office"], ruled=False)
        control_samples.take_sample(pool, sample_of("node1", now().timestamp(), vm_id, console_clients=1))
        clock.shift(timedelta(minutes=10))
        with pool.transaction() as tx:
            assert take(tx, ["anna-1"], wish, owner="anna", rules={})
        clock.shift(timedelta(minutes=5))
        vm = vm_of(pool, vm_id)
        control_shape.grow(pool, "anna-1", 3 * 512 + vm.disk_bytes, Asked())
        settle(pool, {"disk_bytes": 3 * 512 + vm.disk_bytes}, "node1")
        clock.shift(timedelta(minutes=5))
        spent = {row["owner"]: row for row in usage(pool, start=began, by="owner")["rows"] if not row["total"]}
        assert (spent[""]["running_s"], spent["anna"]["running_s"]) == (600, 600)
        assert (spent[""]["console_s"], spent["anna"]["console_s"]) == (600, 600)
        assert spent["anna"]["disk_byte_s"] == 600 * vm.disk_bytes + 300 * 3 * 512
        (tagged,) = [row for row in usage(pool, start=began, by="tag")["rows"] if row["tag"] == "office"]
        assert tagged["running_s"] == 600

        vms.command(pool, "stop", "anna-1", Asked())
        settle(pool, {"node": "node1"}, "node1")
        renamed = now()
        control_shape.rename(pool, "anna-1", "anna-2")
        clock.shift(timedelta(minutes=1))
        (row,) = usage(pool, start=renamed)["rows"]
        assert (row["vm"], row["disk_byte_s"]) == ("anna-2", 60 * (vm.disk_bytes + 3 * 512))


def test_months_add_up_whatever_lies_across_their_ends(pool: Control) -> None:  # noqa: F811
    """An operation at a month's end, and a server node lost over it and back in the next."""
    with time_machine.travel(datetime(2026, 10, 31, 23, 0, tzinfo=UTC), tick=False) as clock:
        storage = {"total_bytes": 10**12, "free_bytes": 10**12}
        vm_id = add(pool, "desk-1", "alice")
        clock.move_to(datetime(2026, 10, 31, 23, 59, 59, 500_000, tzinfo=UTC))
        vms.start(pool, "desk-1", Asked())
        clock.shift(timedelta(seconds=1))  # asked for in October, running from November on
        settle(pool, {"node": "node1", "port": 20000, "ip": "10.128.0.2"}, "node1")
        clock.move_to(datetime(2026, 11, 30, 23, 0, tzinfo=UTC))
        pool_control.join(pool, join_request())
        control_samples.take_sample(pool, sample_of("node1", now().timestamp(), vm_id))
        pool.reservations.leases.drop("node", "node1", "instance-node1")
        clock.shift(timedelta(minutes=30))
        with pool.transaction() as tx:
            move(tx.session.get_one(ServerNode, "node1"), ServerNodeState.LOST)
        clock.shift(timedelta(hours=2))
        back = JoinRequest("east", "node1", "10.0.0.1", "instance-2", FACTS, storage, now().timestamp())
        pool_control.join(pool, back.signed(TOKEN))
        control_samples.take_sample(pool, sample_of("node1", now().timestamp(), vm_id))
        clock.shift(timedelta(minutes=30))
        rows = [usage(pool, month=f"2026-{month}")["rows"] for month in (10, 11, 12)]
        october, november, december = ((found[0] if found else {}) for found in rows)
        assert october["running_s"] == 0 and october["disk_byte_s"] == 3600 * vm_of(pool, vm_id).disk_bytes
        assert november["running_s"] == 30 * 86_400 - 0.5
        assert november["unobserved_s"] == 3600 and december["unobserved_s"] == 1.5 * 3600
        assert december["running_s"] == 2 * 3600


def test_bad_questions_are_refused(control: Control) -> None:
    with pytest.raises(Invalid, match="not both"):
        usage(control, month="2026-11", end=now())
    with pytest.raises(Invalid, match="not after"):
        usage(control, start=now() - timedelta(hours=1), end=now() - timedelta(hours=2))
    with pytest.raises(Invalid, match="not begun"):
        usage(control, month="2999-01")
    with pytest.raises(Invalid, match="by 'host'"):
        usage(control, by="host")  # type: ignore[arg-type]
    assert usage(control, month="2020-01")["rows"] == []


# --- quotas


def add(control: Control, name: str, owner: str) -> str:
    with control.transaction() as tx:
        vm = new_vm(tx, name, Shape("tiny", 1, 128, 10**9, "off"), "east", image_id=None, owner=owner)
        move(vm, VmState.STOPPED)
        return vm.id


def test_a_start_past_the_quota_is_refused_and_a_bulk_start_fails_for_those(pool: Control) -> None:  # noqa: F811
    for number in range(4):
        add(pool, f"a{number}", "alice")
    add(pool, "b", "bob")
    control_quota.set_quota(pool, "alice", running_vms=2, memory_mib=1000)
    vms.start(pool, "a0", Asked())
    parent = vms.start_many(pool, ["a1", "a2", "b"], Asked())
    children = {child["subject"]: child for child in show(pool, parent.id)["children"]}
    assert children["a2"]["error"]["code"] == "quota_exceeded"
    assert {name: children[name]["state"] for name in ("a1", "b")} == {"a1": "running", "b": "running"}
    with pytest.raises(QuotaExceeded, match="1 more running VMs with 2 in use, 2 allowed") as refused:
        vms.start(pool, "a3", Asked())
    assert "hdcs quota set alice" in refused.value.next and refused.value.exit_code == 5
    (seen,) = control_quota.list_quotas(pool)
    assert (seen["used_vms"], seen["used_running_vms"], seen["used_memory_mib"]) == (4, 2, 256)
    control_quota.set_quota(pool, "alice", running_vms=None)
    vms.start(pool, "a3", Asked())


def test_of_many_at_once_only_as_many_pass_as_the_quota_allows(pool: Control) -> None:  # noqa: F811
    """The quota's row is locked until the request's transaction ends: without that all would see the last unit free."""
    names = [f"a{n}" for n in range(6)]
    for name in names:
        add(pool, name, "alice")
    control_quota.set_quota(pool, "alice", running_vms=2)

    def ask(name: str) -> str:
        try:
            vms.start(pool, name, Asked())
        except QuotaExceeded:
            return "refused"
        return "accepted"

    answers = together(*[lambda name=name: ask(name) for name in names])  # type: ignore[misc]
    assert sorted(answers) == ["accepted"] * 2 + ["refused"] * 4
    assert control_quota.list_quotas(pool)[0]["used_running_vms"] == 2


def test_whoever_has_no_quota_has_that_of_everybody(pool: Control) -> None:  # noqa: F811
    add(pool, "c", "carol")
    control_quota.set_quota(pool, "*", vms=1)
    with pool.transaction() as tx, pytest.raises(QuotaExceeded, match="the quota of carol"):
        check_quota(tx, "carol", Amounts(vms=1))
    control_quota.set_quota(pool, "carol", vms=5)
    with pool.transaction() as tx:
        check_quota(tx, "carol", Amounts(vms=4))
    control_quota.drop_quota(pool, "carol")
    with pytest.raises(NotFound):
        control_quota.drop_quota(pool, "carol")
    for wrong in ({"vms": -1}, {"vms": "many"}, {"chairs": 3}):
        with pytest.raises(Invalid):
            control_quota.set_quota(pool, "x", **wrong)  # type: ignore[arg-type]


def test_two_requests_at_once_cannot_both_take_the_last_of_it(pool: Control) -> None:  # noqa: F811
    for name in ("one", "two"):
        add(pool, name, "alice")
    control_quota.set_quota(pool, "alice", running_vms=1)
    answers = together(*(lambda name=name: vms.start(pool, name, Asked()) for name in ("one", "two")))
    assert sum(isinstance(answer, QuotaExceeded) for answer in answers) == 1, answers
    with pool.store.read() as session:
        assert session.query(Vm).filter(Vm.state == VmState.STARTING).count() == 1
        assert session.get_one(ServerNode, "node1")


def test_a_celery_caller_without_a_database_sets_reads_and_drops_quotas(own_redis: RedisServer, tmp_path: Path) -> None:
    settings = make_settings(own_redis.url, f"sqlite:///{tmp_path}/hdcs.sqlite", tmp_path / "state")
    upgrade(settings.database_url)
    caller = make_app(settings.model_copy(update={"database_url": "none://"}))

    def ask(task: str, **arguments: Any) -> dict[str, Any]:
        answer = caller.send_task(task, kwargs=arguments, queue="control", ignore_result=False).get(timeout=90)
        assert isinstance(answer, dict)
        return answer

    environment = os.environ | {
        "HDCS_REDIS_URL": settings.redis_url, "HDCS_DATABASE_URL": settings.database_url,
        "HDCS_STATE_DIR": str(settings.state_dir),
    }  # fmt: skip
    command = [sys.executable, "-m", "workers.control", "--name", "quotas"]
    with (tmp_path / "control.log").open("wb") as log:
        worker = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], stdout=log, stderr=log)
    try:
        assert ask("quota.set", owner="alice", limits={"vms": 3})["vms"] == 3
        (seen,) = ask("quota.list")["quotas"]
        assert (seen["owner"], seen["vms"], seen["used_vms"]) == ("alice", 3, 0)
        assert ask("quota.set", owner="alice", limits={"chairs": 3})["error"]["code"] == "invalid"
        assert ask("quota.set", owner="alice", limits={"vms": "many"})["error"]["code"] == "invalid"
        assert ask("quota.drop", owner="alice") == {"owner": "alice"}
        assert ask("quota.drop", owner="alice")["error"]["code"] == "not_found"
    finally:
        worker.terminate()
        worker.wait(60)
