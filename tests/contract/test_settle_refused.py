"""Where what comes after a step is refused (nobody is up to read an image from any more), the step's outcome is settled
all the same: an outcome that is refused comes again for ever, and the VM is locked as long."""

from __future__ import annotations

import pytest

from hdcs_tasks.operations.recovery import settle
from hdcs_tasks.reservations import PlaceRequest
from tests.contract.test_moves import Played, center, consistent

__all__ = ["center"]

pytestmark = pytest.mark.contract


def settle_with_nobody_up(played: Played, step: str) -> None:
    """The step ends, and before its outcome arrives the last server node of east is lost; it comes back at once."""
    while (found := played.steps("published")[0])["name"] != step:
        played.play_one()
    result = {"sha256": "1" * 64, "virtual_size_bytes": 9, "file_bytes": 9, "shape": None}
    report = played._report(found, result if step.startswith("image.import") else None)
    for node in ("node1", "node2"):
        played.lose(node)
    settle(played.control, report)
    for node in ("node1", "node2"):
        played.node("east", node, 1024)


@pytest.mark.parametrize("step", ["vm.save_on_node", "vm.offer_on_node"])
def test_a_carried_vm_goes_on_where_it_was(center: Played, step: str) -> None:
    center.started("a")
    operation = center.cloud.vms["a"].migrate("west", live=False)
    settle_with_nobody_up(center, step)
    center.play()
    assert (center.vm("a")["state"], center.vm("a")["home"]) == ("running", "east")
    shown = operation.show()
    assert shown["state"] == "failed" and "no server node of domain node east is up" in shown["error"]["message"]
    consistent(center)


def test_a_clone_that_is_planned_again_is_given_up(center: Played) -> None:
    operation = center.cloud.vms.clone("mini", name="a", profile="tiny", start=True)
    for node in ("node1", "node2"):
        center.pool.place(PlaceRequest("east", f"other-{node}", "s", 16, 1024, pin=node))
    settle_with_nobody_up(center, "vm.discard_on_node")
    center.play()
    assert operation.state == "failed" and center.cloud.vms.list() == []
    assert center.control.reservations.disks.used("west") == 0


def test_an_import_that_cannot_be_copied_on_is_there(center: Played) -> None:
    operation = center.cloud.images.import_("other", "o.qcow2", domain_nodes=["east", "west"])
    settle_with_nobody_up(center, "image.import_on_node")
    assert operation.state == "failed"
    (image,) = [image for image in center.cloud.images.list() if image["name"] == "other"]
    assert image["copies"] == {"east": "ready"}
