"""What a stern reader found: interleavings, by hand, that no ordinary test comes to."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup import control_copy, control_prune, control_restore, node_restore
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.errors import Conflict, HdcsError, HypervisorRefused, Unreachable
from hdcs_tasks.hypervisor import disks, merging
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.node import Run
from hdcs_tasks.operations.recovery import recovery_sweep, settle, wake
from hdcs_tasks.operations.views import cancel, list_operations, show
from hdcs_tasks.pool import rebuild
from hdcs_tasks.reservations import PlaceRequest
from hdcs_tasks.states import BackupState
from hdcs_tasks.store.models import Backup, DomainNode
from hdcs_tasks.vm.node import remove_folder
from tests.contract.backup_place import Place
from tests.contract.desk import Desk, ago, desk, failing  # noqa: F401 - a fixture
from tests.contract.test_backup_control import place  # noqa: F401 - a fixture
from tests.contract.test_backup_kills import attempt, spec_of
from tests.contract.test_scheduling import Center, center  # noqa: F401 - a fixture

pytestmark = pytest.mark.contract

Monkey = pytest.MonkeyPatch


@pytest.fixture
def empty_database(tmp_path: Path) -> str:
    """One database will do: these are about order, not about SQL."""
    return f"sqlite:///{tmp_path}/hdcs.sqlite"


def new_disk(place: Place, backup: Backup, **more: Any) -> tuple[str, dict[str, Any]]:  # noqa: F811
    """A VM that is to be restored, and the spec of the step."""
    vm_id = place.vm("back")
    remove_folder(place.layout.vm_dir(vm_id))
    image = {"name": "mini", "version": 1}
    return vm_id, spec_of(place, backup.id) | {"vm_id": vm_id, "image": image} | more


def flip(place: Place, backup: Backup) -> None:  # noqa: F811
    file = place.repository.file(place.repository.get(backup.vm_id, backup.id))
    good = file.read_bytes()
    file.write_bytes(bytes([*good[:-1], good[-1] ^ 1]))
    backups.verify(place.control, backup.id, Asked())
    place.work()
    assert place.row(backup.id).state is BackupState.BROKEN


def west(place: Place) -> None:  # noqa: F811
    with place.control.store.session() as session:
        session.add(DomainNode(name="west", token_key="k", port_first=22000, port_last=22999))


def test_a_restore_that_was_away_leaves_the_newer_ones_disk(place: Place, monkeypatch: Monkey) -> None:  # noqa: F811
    vm = place.vm()
    place.write(vm, 10, 7)
    new, spec = new_disk(place, place.take("desk-01"))
    real = node_restore._write

    def write(run: Run, *rest: Any, **more: Any) -> None:
        if run.attempt == 1:  # stands still past its lease here; the next attempt comes, and ends
            attempt(place, node_restore.restore, spec, "s1", 2)
            assert place.layout.disk(new).exists()
        real(run, *rest, **more)

    monkeypatch.setattr(node_restore, "_write", write)
    with pytest.raises(HdcsError):
        attempt(place, node_restore.restore, spec, "s1", 1)
    assert place.layout.disk(new).exists()


def test_a_restore_killed_while_it_compared_is_compared_again(place: Place, monkeypatch: Monkey) -> None:  # noqa: F811
    vm = place.vm()
    place.write(vm, 10, 7)
    _, spec = new_disk(place, place.take("desk-01"), compare=True)
    compared: list[int] = []

    def check(*_: Any) -> None:
        compared.append(1)
        if len(compared) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(node_restore, "_check_same", check)
    with pytest.raises(KeyboardInterrupt):
        attempt(place, node_restore.restore, spec, "s", 1)
    attempt(place, node_restore.restore, spec, "s", 2)
    assert len(compared) == 2


def test_a_point_the_record_does_not_count_is_not_in_the_way_for_ever(place: Place, monkeypatch: Monkey) -> None:  # noqa: F811
    """Published, and then its outcome was a failure: the next backup begins a new chain."""
    place.vm()
    place.take("desk-01")
    real = Place._backup

    def once(self: Place, spec: Any) -> Any:
        real(self, spec)
        monkeypatch.setattr(Place, "_backup", real)
        raise HypervisorRefused("keeping the checkpoint failed: No space left on device")

    monkeypatch.setattr(Place, "_backup", once)
    states = []
    for _ in range(3):
        operation = backups.create(place.control, "desk-01", Asked())
        place.work()
        states.append(show(place.control, operation.id)["state"])
    assert states == ["failed", "done", "done"]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_chain_with_a_broken_point_is_not_gone_on_with(place: Place, broken: int) -> None:  # noqa: F811
    place.vm()
    points = [place.take("desk-01"), place.take("desk-01")]
    flip(place, points[broken])
    assert place.take("desk-01").kind == "full"


def test_a_cancelled_prune_leaves_broken_what_was(place: Place) -> None:  # noqa: F811
    place.vm()
    place.take("desk-01")
    second = place.take("desk-01")
    flip(place, second)
    operation = control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1))
    cancel(place.control, operation.id)
    place.work()
    recovery_sweep(place.control)
    assert place.row(second.id).state is BackupState.BROKEN


def test_a_prune_that_failed_in_one_domain_node_has_failed(place: Place) -> None:  # noqa: F811
    place.vm()
    points = [place.take("desk-01", full=True) for _ in range(3)]
    west(place)
    with place.control.store.session() as session:
        session.get_one(Backup, points[0].id).domain_node = "west"
    operation = control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1))
    place.desk.run(failing(HypervisorRefused("west's storage is read-only")), queue="west")
    place.work("east")
    seen = show(place.control, operation.id)
    assert seen["state"] == "failed" and "read-only" in seen["error"]["message"]


def test_a_point_is_not_deleted_under_its_reader(place: Place) -> None:  # noqa: F811
    place.vm()
    points = [place.take("desk-01", full=True) for _ in range(2)]
    operation = control_restore.restore(place.control, points[1].id, Asked(), name="back", start=False)
    with pytest.raises(Conflict, match="being read"):
        backups.delete(place.control, points[1].id, Asked())
    place.work()
    assert show(place.control, operation.id)["state"] == "done"
    backups.delete(place.control, points[1].id, Asked())


def test_a_second_copy_that_cannot_begin_leaves_no_operation(place: Place) -> None:  # noqa: F811
    place.vm()
    first = place.take("desk-01")
    west(place)
    second = place.take("desk-01")
    flip(place, first)
    with pytest.raises(HdcsError), place.control.transaction() as tx:
        try:
            control_copy.open_copy(tx, tx.session.get_one(Backup, second.id), "west", Asked())
        finally:  # as a policy does, which goes on without it
            tx.session.commit()
    assert list_operations(place.control, live=True) == []


def test_a_merge_beside_another_readers_settling_ends_whole(place: Place, monkeypatch: Monkey) -> None:  # noqa: F811
    """``settle`` comes between a merge's intent and its end, as an adopting scan may."""
    vm = place.vm()
    points = []
    for number in range(3):
        place.write(vm, 10 + number, 50 + number)
        points.append(place.take("desk-01"))
    real = merging.write_durably
    beside: list[threading.Thread] = []

    def write(path: Path, content: bytes) -> None:
        real(path, content)
        beside.append(threading.Thread(target=merging.settle, args=(place.repository, vm)))
        beside[0].start()
        beside[0].join(0.5)

    monkeypatch.setattr(merging, "write_durably", write)
    get = place.repository.get
    merging.merge(place.repository, get(vm, points[2].id), get(vm, points[0].id), attempt="1")
    beside[0].join(10)
    place.repository.verify(get(vm, points[2].id))
    assert disks.probe(place.repository.file(get(vm, points[2].id))).backing is not None


def test_the_sweep_believes_no_status_it_read_before_other_steps(desk: Desk, monkeypatch: Monkey) -> None:  # noqa: F811
    """Refused, parked, woken and at work again between what the sweep read and its coming to the step."""
    operation = desk.ask()
    steps = desk.control.reservations.steps
    real, begun, end = steps.statuses, threading.Event(), threading.Event()
    ended: list[str] = []
    workers: list[threading.Thread] = []

    def executing(run: Run, spec: Any) -> dict[str, Any]:
        desk.due(operation, published_at=ago(3))
        begun.set()
        end.wait(10)
        run.check()
        return {}

    def statuses(ids: Any) -> Any:
        found = real(ids)
        monkeypatch.setattr(steps, "statuses", real)
        desk.run(failing(Unreachable("later")))
        wake(desk.control, [desk.step(operation).id])
        (message,) = desk.messages(desk.step(operation).sent_to or "east")
        workers.append(threading.Thread(target=lambda: ended.append(desk.work(message, executing))))
        workers[0].start()
        begun.wait(10)
        return found

    monkeypatch.setattr(steps, "statuses", statuses)
    counts = recovery_sweep(desk.control)
    end.set()
    workers[0].join()
    assert ended == ["done"] and counts["new_attempt"] == 0


def test_a_clone_cancelled_while_it_is_planned_again_leaves_nothing(center: Center) -> None:  # noqa: F811
    center.node("east", "node1", 256)
    center.node("west", "node9", 128)
    center.image()
    operation = center.cloud.vms.clone("mini", name="a", profile="tiny", start=True)
    for number in range(2):
        center.pool.place(PlaceRequest("east", f"other{number}", f"s{number}", 1, 128))
    while (step := center.steps("published")[0])["name"] != "vm.discard_on_node":
        settle(center.control, center._report(step, None))
    cancel(center.control, operation.id)
    center.play()
    assert operation.state == "cancelled" and center.cloud.vms.list() == []
    used = center.control.reservations.disks.used
    assert (used("east"), used("west")) == (0, 0)


def test_a_rebuild_keeps_the_storage_promised_where_a_vm_goes(center: Center, monkeypatch: Monkey) -> None:  # noqa: F811
    center.node("east", "node1", 1024)
    center.node("west", "node9", 1024)
    center.image()
    center.clone("a", domain_node="east")
    used = center.control.reservations.disks.used
    center.cloud.vms["a"].migrate(to="west", live=False)
    before = (used("east"), used("west"))
    monkeypatch.setattr(rebuild, "WAIT_FOR_REPORTS_S", 0)
    center.control.reservations.epoch.close()
    assert rebuild.reservation_sweep(center.control) == "rebuilt"
    assert (used("east"), used("west")) == before and min(before) > 0
