"""What a moved VM left at its source is cleaned up whenever that can be; nobody who uses the VM waits for it."""

from __future__ import annotations

from typing import Any

import pytest

from hdcs_tasks.errors import Conflict, HypervisorRefused, OutcomeUnknown
from hdcs_tasks.operations.recovery import recovery_sweep, settle
from hdcs_tasks.pool import control as pool_control
from tests.contract.test_moves import Played, center, consistent

__all__ = ["center"]

pytestmark = pytest.mark.contract


def play_all_but(played: Played, *left: str) -> None:
    """Do every published step but those whose server node is away."""
    while steps := [step for step in played.steps("published") if step["name"] not in left]:
        settle(played.control, played._report(steps[0], None))


def moved(played: Played, to: str, **more: Any) -> Any:
    """VM a, running in east, moved as far as that goes while nobody is at work at its source."""
    played.started("a")
    if to == "inside":
        to = "node1" if played.vm("a")["server_node"] == "node2" else "node2"
    operation = played.cloud.vms["a"].migrate(to, **more)
    play_all_but(played, "vm.move_clean_on_node", "vm.migrate_clean_on_node", "vm.discard_on_node")
    assert operation.state == "running" and played.vm("a")["state"] == "running"
    return operation


@pytest.mark.parametrize(("to", "live"), [("inside", True), ("west", True), ("west", False)])
def test_it_is_used_while_its_source_is_away(center: Played, to: str, live: bool) -> None:
    operation, vm = moved(center, to, live=live), center.cloud.vms["a"]
    at = center.vm("a")
    assert at["server_node"] is not None and at["home"] == ("east" if to == "inside" else "west")
    vm.stop(force=True)
    play_all_but(center, "vm.move_clean_on_node", "vm.migrate_clean_on_node", "vm.discard_on_node")
    assert center.vm("a")["state"] == "stopped"
    again = vm.start()
    play_all_but(center, "vm.move_clean_on_node", "vm.migrate_clean_on_node", "vm.discard_on_node")
    assert again.state == "done"
    if to == "inside":
        assert center.vm("a")["server_node"] == at["server_node"], "not where it is still to be cleaned up"
    assert operation.state == "running"
    center.play()
    found = operation.result()
    assert (found["to"], found["ip"]) == (at["server_node"], at["ip"]), "as it was when it had moved"
    assert center.vm("a")["state"] == "running"
    consistent(center)


@pytest.mark.parametrize("to", ["inside", "west"])
def test_it_does_not_come_back_before_the_place_is_clean(center: Played, to: str) -> None:
    operation, vm = moved(center, to), center.cloud.vms["a"]
    back = "node1" if center.vm("a")["server_node"] == "node2" else "node2"
    if to == "west":
        with pytest.raises(Conflict, match="cannot go back to east"):
            vm.migrate("east")
        with pytest.raises(Conflict, match="cannot go back to east"):
            vm.migrate("east", live=False)
    else:
        with pytest.raises(Conflict, match="cannot go back to node"):
            vm.migrate(back)
        vm.stop(force=True)
        play_all_but(center, "vm.migrate_clean_on_node")
        with pytest.raises(Conflict, match=r"not cleaned up yet.*hdcs op watch"):
            vm.start(node=back)
    center.play()
    assert operation.state == "done"
    if to == "west":
        vm.migrate("east")
    else:
        vm.start(node=back)
    center.play()
    assert center.vm("a")["home"] == "east" and center.vm("a")["state"] == "running"
    consistent(center)


def test_what_waits_for_the_move_begins_when_the_vm_has_moved(center: Played) -> None:
    center.started("a")
    operation = center.cloud.vms["a"].migrate("west")
    while center.steps("published")[0]["name"] != "vm.move_finish_on_node":
        center.play_one()
    stop = center.cloud.vms["a"].stop(force=True)
    assert stop.state == "queued"
    play_all_but(center, "vm.move_clean_on_node")
    assert (stop.state, operation.state) == ("done", "running")
    assert (center.vm("a")["state"], center.vm("a")["home"]) == ("stopped", "west")
    center.play()
    assert operation.state == "done", "the cancel came too late"
    consistent(center)


def test_it_is_deleted_before_its_source_is_back(center: Played) -> None:
    operation = moved(center, "west")
    center.cloud.vms["a"].delete()
    play_all_but(center, "vm.move_clean_on_node")
    assert center.cloud.vms.list() == []
    center.play()
    assert operation.state == "done"
    consistent(center)


@pytest.mark.parametrize("to", ["inside", "west"])
def test_a_source_that_is_lost_for_good(center: Played, to: str) -> None:
    operation = moved(center, to)
    (clean,) = center.steps("published")
    center.lose(center.spec(clean)["source"]["name"])
    recovery_sweep(center.control)
    center.play()
    assert operation.state == "done" and center.vm("a")["state"] == "running"
    consistent(center)


def test_where_no_server_node_is_up_it_is_cleaned_when_one_is_back(center: Played) -> None:
    operation, vm = moved(center, "west"), center.cloud.vms["a"]
    for name in ("node1", "node2"):
        center.lose(name)
    recovery_sweep(center.control)
    play_all_but(center, "vm.discard_on_node")
    assert operation.state == "done" and center.vm("a")["state"] == "running"
    (waits,) = center.cloud.operations.list(live=True)
    assert (waits["kind"], waits["state"], waits["subject"]) == ("vm.clean", "running", "a")
    vm.stop(force=True)
    play_all_but(center, "vm.discard_on_node")
    assert center.vm("a")["state"] == "stopped", "it is used meanwhile"
    center.node("east", "node1", 1024)
    with pytest.raises(Conflict, match="cannot go back to east"):
        vm.migrate("east")
    center.play()
    consistent(center)
    vm.migrate("east")
    center.play()
    assert center.vm("a")["home"] == "east"
    consistent(center)


@pytest.mark.parametrize("returns", [True, False])
@pytest.mark.parametrize("to", ["inside", "west"])
def test_a_lost_source_whose_hand_over_nobody_saw_is_waited_for(center: Played, to: str, returns: bool) -> None:
    """Its guest may have gone on there, when nobody could ask: it is ended when the server node is back."""
    before = center.started("a")
    source = before["server_node"]
    if to == "inside":
        to = "node1" if source == "node2" else "node2"
    center.fails["vm.move_on_node" if to == "west" else "vm.migrate_on_node"] = OutcomeUnknown("the network failed")
    center.held_by = "target"
    operation = center.cloud.vms["a"].migrate(to)
    play_all_but(center, "vm.move_clean_on_node", "vm.migrate_clean_on_node")
    center.lose(source)
    recovery_sweep(center.control)
    (clean,) = center.steps("published")
    assert clean["name"].endswith("clean_on_node"), "though its server node is lost"
    assert (operation.state, center.vm("a")["state"]) == ("running", "running")
    if returns:
        center.node("east", source, 1024)
    else:
        pool_control.remove(center.control, source)
        recovery_sweep(center.control)
        assert all(not step["name"].endswith("clean_on_node") for step in center.steps("published")), "given up"
    center.play()
    assert operation.state == "done"
    consistent(center)


def test_a_stopped_one_is_usable_as_soon_as_its_files_have_come(center: Played) -> None:
    center.clone("a")
    operation = center.cloud.vms["a"].migrate("west")
    play_all_but(center, "vm.discard_on_node")
    assert (center.vm("a")["state"], center.vm("a")["home"], operation.state) == ("stopped", "west", "running")
    with pytest.raises(Conflict, match="cannot go back to east"):
        center.cloud.vms["a"].migrate("east")
    center.cloud.vms["a"].start()
    play_all_but(center, "vm.discard_on_node")
    assert center.vm("a")["state"] == "running"
    center.play()
    assert operation.result()["to"] == "west"
    consistent(center)


@pytest.mark.parametrize("error", [HypervisorRefused("no"), OutcomeUnknown("libvirtd went away")])
def test_a_carried_one_that_cannot_start_leaves_nothing_at_its_source(center: Played, error: Any) -> None:
    """Its files are whole where they came to: that it does not run there is another matter."""
    center.started("a")
    operation = center.cloud.vms["a"].migrate("west", live=False)
    for _ in range(2 if isinstance(error, HypervisorRefused) else 1):
        while center.steps("published")[0]["name"] != "vm.start_on_node":
            center.play_one()
        center.fails["vm.start_on_node"] = error
        center.play_one()
    assert center.steps("published")[0]["name"] == "vm.discard_on_node"
    center.play()
    shown = operation.show()
    assert shown["state"] == "failed" and shown["needs_operator"] is isinstance(error, OutcomeUnknown)
    assert (center.vm("a")["state"], center.vm("a")["home"]) == (
        "failed" if isinstance(error, OutcomeUnknown) else "saved", "west",
    )  # fmt: skip
    assert set(center.control.reservations.dump().pools["east"].disks) == set()


@pytest.mark.parametrize("to", ["inside", "west"])
def test_a_target_lost_when_the_guest_has_come(center: Played, to: str) -> None:
    """Whether its power or its network failed: the record has the VM there, and nothing is left at its source."""
    before = center.started("a")
    if to == "inside":
        to = "node1" if before["server_node"] == "node2" else "node2"
    operation = center.cloud.vms["a"].migrate(to)
    while not center.steps("published")[0]["name"].endswith("finish_on_node"):
        center.play_one()
    target = center.vm("a")["server_node"]
    assert target not in (None, before["server_node"])
    center.lose(target)
    recovery_sweep(center.control)
    assert center.vm("a")["state"] == "running", "nobody waits for the source"
    center.play()
    shown = operation.show()
    assert shown["needs_operator"] and f"{target} was lost" in shown["error"]["message"]
    assert (center.vm("a")["state"], center.vm("a")["server_node"]) == ("running", target)
    assert center.cloud.operations.list(live=True) == []
    claims = [(claim.vm, claim.node) for pool in center.control.reservations.dump().pools.values()
              for claim in pool.claims]  # fmt: skip
    assert claims in ([], [(before["id"], target)])


@pytest.mark.parametrize("to", ["inside", "west"])
@pytest.mark.parametrize("fails", ["", "vm.start_on_node"])
def test_a_suspended_one_stays_suspended_by_way_of_the_storage(center: Played, to: str, fails: str) -> None:
    center.started("a")
    center.cloud.vms["a"].suspend()
    center.play()
    if fails:
        center.fails[fails] = HypervisorRefused("no")
    operation = center.cloud.vms["a"].migrate(None if to == "inside" else to, live=False)
    asked = []
    while steps := center.steps("published"):
        if steps[0]["name"] == "vm.start_on_node":
            asked.append(center.spec(steps[0])["paused"])
        center.play_one()
    assert asked == [True] * (2 if fails else 1), "so it is restored, at the first try and elsewhere"
    assert center.vm("a")["state"] == "suspended" and center.vm("a")["observed_state"] == "paused"
    assert operation.state == ("failed" if fails else "done")
    consistent(center)
