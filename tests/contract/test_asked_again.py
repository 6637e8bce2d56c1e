"""A server node is lost with a step that can be asked for anew: nobody is locked out until it is back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from tests.contract.test_moves import Played, center, consistent
from tests.contract.test_moves_lost import lost_with, sweep_in
from tests.contract.test_scheduling import GIB

__all__ = ["center"]

pytestmark = pytest.mark.contract

Ask = Callable[[Played], Any]


ASKED: dict[str, Ask] = {
    "vm.clone_on_node": lambda c: c.cloud.vms.clone("mini", name="a", profile="tiny"),
    "vm.export_on_node": lambda c: c.cloud.vms["a"].export("a.qcow2"),
    "vm.delete_on_node": lambda c: c.cloud.vms["a"].delete(),
    "vm.grow_on_node": lambda c: c.cloud.vms["a"].grow(2 * GIB),
    "backup.create_on_node": lambda c: c.cloud.backups.create("a"),
    "image.add_on_node": lambda c: c.cloud.images.add("other", "/srv/o.qcow2", domain_nodes=["east"]),
    "image.import_on_node": lambda c: c.cloud.images.import_("other", "o.qcow2", domain_nodes=["east"]),
    "image.export_on_node": lambda c: c.cloud.images.export("mini", "o.qcow2"),
    "image.copy_on_node": lambda c: c.cloud.images.copy("mini", "west"),
    "image.delete_on_node": lambda c: c.cloud.images.delete("mini"),
}
OF_A_VM = {"vm.export_on_node", "vm.delete_on_node", "vm.grow_on_node", "backup.create_on_node"}


def asked(played: Played, step: str) -> Any:
    if step in OF_A_VM:
        played.clone("a", domain_node="east")
    return ASKED[step](played)


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("step", ASKED)
def test_it_is_off_after_a_minute_or_when_cancelled(center: Played, step: str, cancelled: bool) -> None:
    operation = asked(center, step)
    lost_with(center, step, "node3" if step == "image.copy_on_node" else "node1")
    if cancelled:
        operation.cancel()
        recovery_sweep(center.control)
    else:
        sweep_in(center, CAN_BE_ASKED_AGAIN["bears_loss_s"] - 5)
        assert operation.state == "running", "it may be back in a moment, and go on"
        sweep_in(center, CAN_BE_ASKED_AGAIN["bears_loss_s"] + 1)
    shown = operation.show()
    assert shown["state"] == "failed" and "was lost before" in shown["error"]["message"]
    center.play()  # where something may have been left, another server node removes it
    assert center.cloud.operations.list(live=True) == []
    assert ASKED[step](center).state == "running", "and it can be asked for again"


def test_one_whose_server_node_is_back_goes_on(center: Played) -> None:
    operation = asked(center, "vm.export_on_node")
    lost_with(center, "vm.export_on_node", "node1")
    center.node("east", "node1", 1024)
    sweep_in(center, CAN_BE_ASKED_AGAIN["bears_loss_s"] + 1)
    center.play()
    assert operation.state == "done"
    consistent(center)
