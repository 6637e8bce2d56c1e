"""Drills on the control plane over real files: what proves a point, and that nothing is left of one that does not."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup import control_drill, control_policy
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.errors import HypervisorRefused
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.operations.views import cancel, show
from hdcs_tasks.store.models import BackupPolicy, Operation
from hdcs_tasks.vm.control_list import list_vms
from tests.contract.backup_place import Place
from tests.contract.desk import desk  # noqa: F401 - a fixture
from tests.contract.test_backup_control import place  # noqa: F401 - a fixture

pytestmark = pytest.mark.contract

DRILL = ["backup.restore_on_node", "vm.start_on_node", "backup.prove_on_node", "vm.stop_on_node", "vm.delete_on_node"]


def test_a_drill_proves_a_point_and_leaves_nothing(place: Place) -> None:
    place.vm()
    backup = place.take("desk-01")
    assert [b["id"] for b in backups.list_backups(place.control, unproven=True)] == [backup.id]
    operation = control_drill.drill(place.control, backup.id, Asked())
    assert place.work() == DRILL
    assert show(place.control, operation.id)["state"] == "done"
    assert place.row(backup.id).proven_at is not None
    assert backups.list_backups(place.control, unproven=True) == []
    assert [v["name"] for v in list_vms(place.control)] == ["desk-01"]
    assert not place.layout.vm_dir(str(operation.vm_id)).exists()
    with place.control.store.read() as session:
        steps = {s.name: s for s in session.get_one(Operation, operation.id).steps}
    assert steps["vm.start_on_node"].spec["isolated"] is True
    assert steps["backup.restore_on_node"].spec["compare"] is True


@pytest.mark.parametrize("step", DRILL[:3])
def test_a_drill_that_fails_proves_nothing_and_leaves_nothing(place: Place, step: str) -> None:
    place.vm()
    backup = place.take("desk-01")
    place.fails[step] = HypervisorRefused("not today")
    operation = control_drill.drill(place.control, backup.id, Asked())
    place.work()
    found = show(place.control, operation.id)
    assert (found["state"], found["error"]["message"]) == ("failed", "not today")
    assert place.row(backup.id).proven_at is None
    assert [v["name"] for v in list_vms(place.control)] == ["desk-01"]


@pytest.mark.parametrize("step", DRILL)
def test_a_drill_that_is_cancelled_leaves_nothing(place: Place, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its throwaway goes, though the sweep comes before the steps that remove it are taken."""
    place.vm()
    backup = place.take("desk-01")
    operation = control_drill.drill(place.control, backup.id, Asked())
    settle_all = place._control

    def look() -> None:
        settle_all()
        if show(place.control, operation.id)["steps"][-1]["name"] == step:
            cancel(place.control, operation.id)
        recovery_sweep(place.control)

    monkeypatch.setattr(place, "_control", look)
    place._control()
    place.work()
    assert show(place.control, operation.id)["state"] == ("cancelled" if step in DRILL[:3] else "done")
    assert [v["name"] for v in list_vms(place.control)] == ["desk-01"]
    assert not place.layout.vm_dir(str(operation.vm_id)).exists()


def test_scheduled_drills_go_round(place: Place) -> None:
    for name in ("desk-01", "desk-02"):
        place.vm(name)
        place.take(name)
    control_policy.create(
        place.control, "p", schedule="monthly 1 00:00", selector={}, keep=Keep(), drill_schedule="weekly sun 04:00"
    )
    for _ in range(2):
        with place.control.store.session() as session:
            session.get_one(BackupPolicy, "p").drill_slot_at = datetime.now(UTC) - timedelta(days=8)
        control_policy.policy_sweep(place.control)
        control_policy.policy_sweep(place.control)
        place.work()
    assert backups.list_backups(place.control, unproven=True) == []
