"""A server node is lost with a step of a move in its hands: the step is given up in its time, and nobody waits on."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import time_machine

from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN, REPUBLISH_AFTER_S
from hdcs_tasks.reservations import PlaceRequest
from hdcs_tasks.store.models import now
from tests.contract.test_moves import Played, center, consistent

__all__ = ["center"]

pytestmark = pytest.mark.contract


def comes_to(center: Played, step: str) -> dict[str, Any]:
    while (found := center.steps("published")[0])["name"] != step:
        center.play_one()
    return found


def lost_with(center: Played, step: str, node: str) -> None:
    """``node`` takes the step, and dies."""
    found = comes_to(center, step)
    center.control.settings.attempts_max = 3
    center.control.reservations.steps.claim(found["id"], found["attempt"], "executor", node, ttl_s=0.001)
    center.lose(node)
    recovery_sweep(center.control)


def sweep_in(center: Played, seconds: float) -> None:
    with time_machine.travel(now() + timedelta(seconds=seconds), tick=False):
        recovery_sweep(center.control)


def is_as_before(center: Played, before: dict[str, Any], operation: Any) -> None:
    shown, after = operation.show(), center.vm("a")
    assert shown["state"] == "failed" and not shown["needs_operator"] and "lost" in shown["error"]["message"]
    assert [after[key] for key in ("state", "home")] == [before[key] for key in ("state", "home")]
    consistent(center)


@pytest.mark.parametrize("to", ["west", "inside"])
def test_a_target_that_is_lost_while_it_prepares(center: Played, to: str) -> None:
    before = center.started("a")
    target = "node3" if to == "west" else {"node1": "node2", "node2": "node1"}[before["server_node"]]
    operation = center.cloud.vms["a"].migrate(target)
    lost_with(center, f"vm.{'move' if to == 'west' else 'migrate'}_prepare_on_node", target)
    center.play()
    is_as_before(center, before, operation)
    assert center.vm("a")["server_node"] == before["server_node"]


@pytest.mark.parametrize("way", ["returns", "stays away", "is called off"])
def test_a_target_that_is_lost_while_files_arrive(center: Played, way: str) -> None:
    """It may come back and go on where it was; not for ever, and not where somebody asks to cancel."""
    before = center.started("a")
    operation = center.cloud.vms["a"].migrate("node3", live=False)
    lost_with(center, "vm.fetch_on_node", "node3")
    sweep_in(center, CAN_BE_ASKED_AGAIN["bears_loss_s"] - 5)
    assert [step["name"] for step in center.steps("published")] == ["vm.fetch_on_node"]
    assert operation.show()["phase"] == "waits for server node node3 (lost)"
    if way == "returns":
        center.node("west", "node3", 1024)
        center.play()
        assert operation.state == "done" and center.vm("a")["server_node"] == "node3"
        consistent(center)
        return
    if way == "is called off":
        operation.cancel()
        recovery_sweep(center.control)
    else:
        sweep_in(center, CAN_BE_ASKED_AGAIN["bears_loss_s"] + 1)
    assert comes_to(center, "vm.discard_on_node")["queue"] == "west", "another server node removes what has arrived"
    center.play()
    is_as_before(center, before, operation)


@pytest.mark.parametrize("live", [True, False])
def test_nobody_is_there_to_take_the_step(center: Played, live: bool) -> None:
    before = center.started("a")
    operation = center.cloud.vms["a"].migrate("west", live=live)
    comes_to(center, "vm.move_prepare_on_node" if live else "vm.fetch_on_node")
    for node in ("node3", "node4"):
        center.lose(node)
    sweep_in(center, REPUBLISH_AFTER_S - 5)
    assert operation.state == "running"
    sweep_in(center, REPUBLISH_AFTER_S + 1)
    while "vm.start_on_node" in [step["name"] for step in center.steps("published")]:
        center.play_one()
    center.node("west", "node3", 1024)
    center.play()  # what may have arrived there is removed when one is back
    is_as_before(center, before, operation)


def test_whoever_removes_what_was_left_is_lost(center: Played) -> None:
    center.clone("a")
    operation = center.cloud.vms["a"].migrate("west")
    lost_with(center, "vm.discard_on_node", "node1")
    assert operation.state == "done" and center.vm("a")["home"] == "west"
    (waits,) = center.cloud.operations.list(live=True)
    assert waits["kind"] == "vm.clean"
    lost_with(center, "vm.discard_on_node", "node2")
    (step,) = center.steps("published")
    assert (step["operation"], step["queue"], step["node"]) == (waits["id"], "east", None), "for the next that is up"
    center.play()
    consistent(center)


def test_a_clone_goes_on_elsewhere_though_its_first_disk_cannot_be_removed(center: Played) -> None:
    operation = center.cloud.vms.clone("mini", name="a", profile="tiny", start=True)
    for node in ("node1", "node2"):
        center.pool.place(PlaceRequest("east", f"other-{node}", "s", 16, 1024, pin=node))
    lost_with(center, "vm.discard_on_node", "node1")
    assert "vm.clean" in [op["kind"] for op in center.cloud.operations.list(live=True)]
    center.play()
    assert operation.state == "done" and center.vm("a")["home"] == "west"
    assert set(center.control.reservations.dump().pools["east"].disks) == set()


@pytest.mark.parametrize("when", ["while it waits", "before it waits"])
@pytest.mark.parametrize("verb", ["delete", "stop"])
def test_a_vm_that_waits_to_be_started_again_can_be_deleted(center: Played, verb: str, when: str) -> None:
    """Its move has failed, and where it was is no room any more: nobody waits an hour for that."""
    center.started("a")
    operation = center.cloud.vms["a"].migrate("west", live=False)
    comes_to(center, "vm.offer_on_node")
    operation.cancel()
    recovery_sweep(center.control)
    comes_to(center, "vm.start_on_node")
    for node in ("node1", "node2"):
        center.pool.place(PlaceRequest("east", f"other-{node}", "s", 15, 900, pin=node))
    if when == "while it waits":
        center.play_one()
        operation.cancel()
        assert operation.state == "running", "a cancel alone leaves the VM its place in the line"
    asked = center.cloud.vms["a"].delete() if verb == "delete" else center.cloud.vms["a"].stop(force=True)
    center.play()
    assert operation.state == "cancelled" and asked.state == "done"
    assert [vm["state"] for vm in center.cloud.vms.list()] == ([] if verb == "delete" else ["saved"])
