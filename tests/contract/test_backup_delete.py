"""Points of a chain deleted together, and backups nobody could take now."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select

from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup import control_policy
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.cli.main import run
from hdcs_tasks.cloud import Cloud
from hdcs_tasks.errors import HypervisorRefused, Invalid, Unreachable, WrongState
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.views import cancel, list_operations, show
from hdcs_tasks.states import ServerNodeState, VmState
from hdcs_tasks.store.models import ServerNode, Vm
from tests.contract.backup_place import Place
from tests.contract.test_backup_control import place  # noqa: F401 - a fixture
from tests.contract.test_operations import desk  # noqa: F401 - a fixture

pytestmark = pytest.mark.contract


@pytest.fixture
def empty_database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/hdcs.sqlite"


def chain(place: Place, count: int = 3) -> list[str]:  # noqa: F811
    vm = place.vm()
    found = []
    for number in range(count):
        place.write(vm, 10 + number, 50 + number)
        found.append(place.take("desk-01").id)
    return found


def states(place: Place, points: list[str]) -> list[str]:  # noqa: F811
    return [place.row(each).state.value for each in points]


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (1, 2, 1)])
def test_the_order_in_which_points_are_named_does_not_matter(place: Place, order: tuple[int, ...]) -> None:  # noqa: F811
    points = chain(place)
    operation = backups.delete(place.control, [points[each] for each in order], Asked())
    assert states(place, points) == ["ready", "deleting", "deleting"]
    assert place.work().count("backup.delete_on_node") == 2
    assert show(place.control, operation.id)["state"] == "done"
    assert states(place, points) == ["ready", "deleted", "deleted"]
    first = place.repository.points()
    assert [p.id for p in first] == points[:1]
    place.repository.verify(first[0])


def test_all_of_them_or_none(place: Place) -> None:  # noqa: F811
    points = chain(place)
    with pytest.raises(WrongState, match=f"{points[1]} is the base of {points[2]}"):
        backups.delete(place.control, [points[0], points[1]], Asked())
    place.vm("desk-02")
    other = place.take("desk-02").id
    with pytest.raises(Invalid, match="several VMs"):
        backups.delete(place.control, [points[2], other], Asked())

    def hdcs(*ids: str) -> int:
        return run(["backup", "delete", *ids, "-y", "--no-wait"], lambda: Cloud(place.control))

    assert hdcs(points[0], points[1]) == 4
    assert hdcs(points[2], "0123456789") == 3, "and nothing of what there is"
    assert states(place, [*points, other]) == ["ready"] * 4
    assert list_operations(place.control, live=True) == []
    assert hdcs(points[1][:8], points[2][:8], other[:8]) == 0
    place.work()
    assert states(place, [*points, other]) == ["ready", "deleted", "deleted", "deleted"]


def test_what_a_deletion_did_not_come_to_is_as_it_was(place: Place) -> None:  # noqa: F811
    points = chain(place)
    operation = backups.delete(place.control, points, Asked())
    cancel(place.control, operation.id)
    place.work()
    assert states(place, points) == ["ready"] * 3
    place.fails["backup.delete_on_node"] = HypervisorRefused("the storage is read-only")
    backups.delete(place.control, points, Asked())
    place.work()
    assert states(place, points) == ["ready", "ready", "broken"]
    place.fails.clear()
    backups.delete(place.control, points, Asked())
    place.work()
    assert states(place, points) == ["deleted"] * 3
    assert place.repository.points() == []


def test_a_backup_nobody_could_take_now_is_refused(place: Place) -> None:  # noqa: F811
    vm_id = place.vm()
    with place.control.store.session() as session:
        for node in session.scalars(select(ServerNode)):
            node.state = ServerNodeState.LOST
    with pytest.raises(Unreachable, match="no server node of domain node east is up"):
        backups.create(place.control, "desk-01", Asked())
    with place.control.store.session() as session:
        vm = session.get_one(Vm, vm_id)
        vm.state, vm.server_node = VmState.RUNNING, "node1"
    with pytest.raises(Unreachable, match="on server node node1, which is lost"):
        backups.create(place.control, "desk-01", Asked())
    control_policy.create(place.control, "p", schedule="daily 02:00", selector={}, keep=Keep(1))
    control_policy.run(place.control, "p")
    assert control_policy.show(place.control, "p")["pending"] == 1, "a policy's run waits for it"


def test_a_policy_s_last_run_is_none_before_the_first(place: Place) -> None:  # noqa: F811
    made = control_policy.create(place.control, "p", schedule="daily 02:00", selector={}, keep=Keep(1))
    assert made["last_run_at"] is None
    assert Cloud(place.control).policies.list()[0]["last_run_at"] is None
    ran = control_policy.run(place.control, "p")
    assert ran["last_run_at"] == ran["slot_at"] > made["created_at"]
