"""Rebalancing on real Redis and SQLite: the plan, and its run with so many at once. The test plays the nodes."""

from __future__ import annotations

from typing import Any

import pytest

from hdcs_tasks.cloud import Operation
from hdcs_tasks.errors import Invalid, NotFound
from hdcs_tasks.operations.recovery import settle
from tests.contract.test_scheduling import Center, center  # noqa: F401 - center is a fixture

pytestmark = pytest.mark.contract


def crowded(center: Center, count: int = 6) -> None:  # noqa: F811
    """``count`` VMs on node1, none on node2."""
    center.node("east", "node1", 1024)
    center.image()
    center.clone("d-{:02d}", count=count)
    center.cloud.vms.start_all(home="east")
    center.play()
    center.node("east", "node2", 1024)


def migrated(center: Center, step: dict[str, Any]) -> None:  # noqa: F811
    """Do one step of a live migration as the server nodes would."""
    spec = center.spec(step)
    if step["name"] == "vm.migrate_prepare_on_node":
        report = center._report(step, None)
        placed = next(c for c in center.pool.claim_of(spec["vm_id"]) if c.node == report["node"])
        report["result"] = {"node": placed.node, "ip": placed.ip, "port": placed.port, "address": "10.0.0.2"}
    else:
        report = center._report(step, {"checkpoints": [], "downtime_ms": 10, "total_ms": 50})
        if step["name"] == "vm.migrate_clean_on_node":
            center.pool.release("east", spec["vm_id"], spec["source"]["name"], 0)
    settle(center.control, report)


def run(center: Center, operation: Operation) -> int:  # noqa: F811
    """Play the migrations to their end; how many were under way at once at most."""
    most = 0
    while operation.state == "running":
        live = [op for op in center.cloud.operations.list(live=True) if op["kind"] == "vm.migrate"]
        most = max(most, len(live))
        step = center.steps("published")[0]
        migrated(center, step)
    return most


def where(center: Center) -> dict[str, int]:  # noqa: F811
    counts: dict[str, int] = {}
    for vm in center.cloud.vms.list(state="running"):
        counts[vm["server_node"]] = counts.get(vm["server_node"], 0) + 1
    return counts


def test_a_pool_is_evened_two_at_a_time(center: Center) -> None:  # noqa: F811
    crowded(center)
    plan = center.cloud.rebalance("east", dry_run=True).explain()
    assert [(m["from"], m["to"]) for m in plan["moves"]] == [("node1", "node2")] * 3
    assert plan["after"]["score"] < plan["before"]["score"]
    assert where(center) == {"node1": 6}
    operation = center.cloud.rebalance("east", concurrency=2, idempotency_key="k")
    assert run(center, operation) == 2
    assert where(center) == {"node1": 3, "node2": 3}
    shown = operation.show()
    assert (shown["state"], len(shown["children"])) == ("done", 3)
    assert center.cloud.rebalance("east", concurrency=2, idempotency_key="k").id == operation.id
    again = center.cloud.rebalance("east")
    assert again.state == "done" and again.show()["children"] == []


def test_who_left_meanwhile_is_passed_over(center: Center) -> None:  # noqa: F811
    crowded(center)
    operation = center.cloud.rebalance("east", concurrency=1)
    moving = operation.show()["children"][0]["subject"]
    stopped = next(
        m["vm"] for m in center.cloud.operations[operation.id].show()["decision"]["moves"] if m["vm"] != moving
    )
    center.cloud.vms[stopped].stop()
    for step in center.steps("published"):
        if step["name"] == "vm.stop_on_node":
            settle(center.control, center._report(step, None))
    assert run(center, operation) == 1
    assert len(operation.show()["children"]) == 2
    assert next(e for e in center.cloud.events() if e["kind"] == "pool.not_moved")["subject"] == stopped


def test_a_cancelled_one_begins_no_more(center: Center) -> None:  # noqa: F811
    crowded(center)
    operation = center.cloud.rebalance("east", concurrency=1)
    operation.cancel()
    for step in center.steps("published"):
        settle(center.control, center._report(step, None) | {"error": {"code": "cancelled", "message": "stopped"}})
    assert operation.state == "cancelled"
    assert len(operation.show()["children"]) == 1
    assert where(center) == {"node1": 6}


def test_pinned_ones_and_busy_ones_stay(center: Center) -> None:  # noqa: F811
    center.node("east", "node1", 1024)
    center.image()
    center.clone("d-{:02d}", count=4, rules={"pin": "node1"})
    center.clone("busy")
    center.cloud.vms.start_all(home="east")
    center.play()
    center.node("east", "node2", 1024)
    center.cloud.vms["busy"].suspend()
    assert center.cloud.rebalance("east", dry_run=True).explain()["moves"] == []


def test_bad_numbers(center: Center) -> None:  # noqa: F811
    center.node("east", "node1", 1024)
    with pytest.raises(Invalid):
        center.cloud.rebalance("east", max_moves=0)
    with pytest.raises(Invalid):
        center.cloud.rebalance("east", concurrency=0)
    with pytest.raises(NotFound):
        center.cloud.rebalance("nowhere", dry_run=True)
