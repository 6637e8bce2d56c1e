"""Backups on the control plane over real files: chains, restores, adoption, pruning, policies and drills."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select

from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup import control_adopt, control_policy, control_prune, control_restore
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.errors import BackupBroken, Conflict, HypervisorRefused, Invalid, NoCapacity, NotFound, WrongState
from hdcs_tasks.hypervisor import disks
from hdcs_tasks.image import control as images
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.views import show
from hdcs_tasks.reservations import PoolNode
from hdcs_tasks.states import BackupState, ImageState, ServerNodeState, VmState
from hdcs_tasks.store.models import (
    Backup,
    BackupCopy,
    BackupPolicy,
    DomainNode,
    Event,
    Image,
    ImageCopy,
    Operation,
    ServerNode,
    Step,
    Vm,
)  # fmt: skip
from hdcs_tasks.vm import control as vms
from hdcs_tasks.vm import control_delete
from tests.contract.backup_place import Place
from tests.contract.desk import Desk, desk  # noqa: F401 - desk is a fixture

pytestmark = pytest.mark.contract

MISSING = not shutil.which("qemu-img")


@pytest.fixture
def place(desk: Desk, tmp_path: Path) -> Place:  # noqa: F811
    if MISSING:
        pytest.skip("needs qemu-img")
    return Place(desk, tmp_path / "srv")


def test_a_broken_chain_starts_over_with_a_full_one(place: Place) -> None:
    vm = place.vm()
    first = place.take("desk-01")
    second = place.take("desk-01")
    assert [(b.kind, b.seq, b.parent_id) for b in (first, second)] == [("full", 1, None), ("increment", 2, first.id)]
    operation = backups.create(place.control, "desk-01", Asked())
    with place.control.store.read() as session:
        spec = session.get_one(Operation, operation.id).steps[0].spec
        assert (spec["parent"], spec["parent_checkpoint"]) == (second.id, second.checkpoint)
    place.fails["backup.create_on_node"] = BackupBroken("no bitmap")
    place.desk.run(lambda run, spec: (_ for _ in ()).throw(BackupBroken("no bitmap")))
    place.fails.clear()
    place.work()
    assert show(place.control, operation.id)["state"] == "done"
    third = place.row(place.request(operation.id)["backup"])
    assert (third.kind, third.seq) == ("full", 1)
    assert third.chain != second.chain
    assert len(backups.list_backups(place.control, vm)) == 3


def test_two_backups_of_one_vm_at_once(place: Place) -> None:
    place.vm()
    backups.create(place.control, "desk-01", Asked())
    with pytest.raises(Conflict, match="is busy"):
        backups.create(place.control, "desk-01", Asked())


def test_a_vm_deleted_during_its_backup(place: Place) -> None:
    """The delete cancels the backup and waits for its end; what was backed up before stays."""
    vm = place.vm()
    kept = place.take("desk-01")
    backup = backups.create(place.control, "desk-01", Asked())
    gone = control_delete.delete(place.control, "desk-01", Asked())
    assert show(place.control, gone.id)["waits_for"] == backup.id
    assert "vm.delete_on_node" in place.work()
    assert show(place.control, backup.id)["state"] == "cancelled"
    assert show(place.control, gone.id)["state"] == "done"
    assert [b["id"] for b in backups.list_backups(place.control, vm)] == [kept.id]
    restored = control_restore.restore(place.control, kept.id, Asked(), name="back")
    place.work()
    assert show(place.control, restored.id)["state"] == "done"


# --- restore


def test_a_new_vm_from_any_point(place: Place, tmp_path: Path) -> None:
    vm = place.vm()
    moments = []
    for number in range(3):
        place.write(vm, 10 + number, 100 + number)
        moments.append((place.take("desk-01"), place.copy(vm, tmp_path / f"{number}.raw")))
    for number, (backup, then) in enumerate(moments):
        operation = control_restore.restore(place.control, backup.id, Asked(), name=f"back-{number}", start=False)
        place.work()
        assert show(place.control, operation.id)["state"] == "done"
        made = place.show(str(operation.vm_id))
        assert (made.state, made.image_id, made.profile) == (VmState.STOPPED, place.image_id, "small")
        assert disks.compare(place.layout.disk(made.id), then, formats=("qcow2", "raw"))
        assert disks.probe(place.layout.disk(made.id)).backing == place.image


@pytest.mark.parametrize("copied", [True, False])
def test_layer_one_restores_where_it_fits(place: Place, copied: bool) -> None:
    """At its home while there is room; else where a second copy lies, else where it is copied to."""
    place.vm()
    backup = place.take("desk-01")
    west(place, backup if copied else None)

    def ask(name: str) -> tuple[str, str, dict[str, Any] | None]:
        operation = control_restore.restore(place.control, backup.id, Asked(), name=name, start=False)
        found = show(place.control, operation.id)
        return place.request(operation.id)["at"], found["steps"][0]["name"], found["decision"]

    assert ask("at-home")[:2] == ("east", "backup.restore_on_node")
    place.control.reservations.pool.put_node("east", PoolNode("node1", 1, 64, "10.128.0.0/22"))
    at, step, decision = ask("elsewhere")
    assert (at, step) == ("west", "backup.restore_on_node" if copied else "backup.fetch_on_node")
    assert decision is not None and "west" in str(decision)
    place.control.reservations.pool.put_node("west", PoolNode("node9", 1, 64, "10.128.4.0/22"))
    with pytest.raises(NoCapacity, match="east: node1"):
        ask("nowhere")


def west(place: Place, backup: Backup | None) -> None:
    """A second domain node with room; ``backup``: it has a good copy of that."""
    reservations = place.control.reservations
    reservations.pool.put_node("west", PoolNode("node9", 64, 65536, "10.128.4.0/22"))
    reservations.ports.set_range("west", 21000, 21999)
    with place.control.store.session() as session:
        room = {"storage_total_bytes": 1 << 40, "storage_free_bytes": 1 << 40}
        session.add(DomainNode(name="west", token_key="w", port_first=21000, port_last=21999, **room))
        session.flush()
        session.add(ServerNode(
            name="node9", domain_node="west", state=ServerNodeState.UP, ip="127.0.0.9", subnet="10.128.4.0/22",
            instance="i9", facts={}, vcpus=64, memory_mib=65536,
        ))  # fmt: skip
        if backup is not None:
            session.add(BackupCopy(backup_id=backup.id, domain_node="west", state=BackupState.READY))


def test_when_the_image_is_gone_the_repository_brings_it_back(place: Place, tmp_path: Path) -> None:
    vm = place.vm()
    place.write(vm, 12, 7)
    backup, then = place.take("desk-01"), place.copy(vm, tmp_path / "then.raw")
    with place.control.store.session() as session:  # the VM, the image and its file are gone
        session.get_one(Vm, vm).deleted_at = datetime.now(UTC)
        session.execute(delete(ImageCopy))
        session.get_one(Image, place.image_id).deleted_at = datetime.now(UTC)
    shutil.rmtree(place.image.parent)
    operation = control_restore.restore(place.control, backup.id, Asked(), name="back", start=False)
    place.work()
    assert show(place.control, operation.id)["state"] == "done"
    made = place.show(str(operation.vm_id))
    assert disks.compare(place.layout.disk(made.id), then, formats=("qcow2", "raw"))
    with place.control.store.read() as session:
        image = session.get_one(Image, made.image_id)
        assert (image.name, image.version, image.virtual_size_bytes) == ("mini", 1, 32 << 20)
        assert [(c.domain_node, c.state) for c in image.copies] == [("east", ImageState.READY)]
    assert place.image.exists()


def test_another_image_took_the_name(place: Place) -> None:
    """The base comes back as the next version: a disk on another image would be garbage."""
    place.vm()
    backup = place.take("desk-01")
    with place.control.store.session() as session:
        session.get_one(Image, place.image_id).sha256 = "0" * 64
    operation = control_restore.restore(place.control, backup.id, Asked(), name="back", start=False)
    place.work()
    assert show(place.control, operation.id)["state"] == "done"
    assert (place.image.parent / "2.qcow2").exists()
    assert disks.probe(place.layout.disk(str(operation.vm_id))).backing == place.image.parent / "2.qcow2"


def test_a_flipped_bit_is_found_and_refused(place: Place) -> None:
    place.vm()
    first, second = place.take("desk-01"), place.take("desk-01")
    file = place.repository.file(place.repository.get(first.vm_id, first.id))
    good = file.read_bytes()
    file.write_bytes(bytes([*good[:-1], good[-1] ^ 1]))
    restored = control_restore.restore(place.control, second.id, Asked(), name="back")
    place.work()
    found = show(place.control, restored.id)
    assert (found["state"], found["error"]["code"]) == ("failed", "backup_broken")
    assert place.row(second.id).state is BackupState.BROKEN, "refused once, it shows"
    assert place.show(str(restored.vm_id)).deleted_at is not None
    assert not place.layout.vm_dir(str(restored.vm_id)).exists()
    verified = backups.verify(place.control, first.id, Asked())
    place.work()
    assert show(place.control, verified.id)["state"] == "failed"
    assert place.row(first.id).state is BackupState.BROKEN
    with pytest.raises(WrongState, match="is broken"):
        control_restore.restore(place.control, first.id, Asked(), name="back")
    assert place.take("desk-01").kind == "full", "a broken chain is not continued"
    file.write_bytes(good)  # the storage was mended
    for backup in (first, second):
        backups.verify(place.control, backup.id, Asked())
    place.work()
    assert [place.row(b.id).state for b in (first, second)] == [BackupState.READY] * 2


def test_a_missing_link_and_an_edited_manifest(place: Place) -> None:
    place.vm()
    points = [place.take("desk-01") for _ in range(3)]
    file = place.repository.file(place.repository.get(points[1].vm_id, points[1].id)).with_suffix(".json")
    body = json.loads(file.read_text())
    file.write_text(json.dumps(body | {"definition": {"name": "other", "vcpus": 64}}))
    operations = [backups.verify(place.control, b.id, Asked()) for b in points]
    place.work()
    states = [show(place.control, o.id)["state"] for o in operations]
    assert states == ["done", "failed", "failed"]
    assert "changed after it was written" in show(place.control, operations[1].id)["error"]["message"]


def test_in_place_asks_for_a_stopped_vm_of_that_home(place: Place) -> None:
    vm = place.vm()
    backup = place.take("desk-01")
    with pytest.raises(Invalid, match="a new VM or sets one back"):
        control_restore.restore(place.control, backup.id, Asked())
    with pytest.raises(Invalid):
        control_restore.restore(place.control, backup.id, Asked(), name="x", in_place=True)
    with place.control.store.session() as session:
        session.get_one(Vm, vm).state = VmState.RUNNING
    with pytest.raises(WrongState, match="is running"):
        control_restore.restore(place.control, backup.id, Asked(), in_place=True)
    with place.control.store.session() as session:
        session.get_one(Vm, vm).state = VmState.STOPPED
    operation = control_restore.restore(place.control, backup.id, Asked(), in_place=True, start=False)
    with pytest.raises(Conflict, match="is busy"):
        vms.start(place.control, "desk-01", Asked())
    place.desk.run(lambda run, spec: {"disk_bytes": 32 << 20, "image": None})
    assert show(place.control, operation.id)["state"] == "done"
    assert place.row(backup.id).checkpoint is None
    assert place.take("desk-01").kind == "full", "the disk that was set back has no bitmap of the old chain"


def test_in_place_a_refreshed_vm_stands_on_its_old_image_again(place: Place) -> None:
    """Were the newer one recorded, the old one could be deleted under it, and a move would bring the wrong one."""
    vm = place.vm()
    backup = place.take("desk-01")
    with place.control.store.session() as session:
        session.add(Image(id="image-2", name="mini", version=2, sha256="2" * 64, virtual_size_bytes=32 << 20))
        session.flush()
        session.add(ImageCopy(image_id="image-2", domain_node="east", state=ImageState.READY))
        session.get_one(Vm, vm).image_id = "image-2"  # as a refresh leaves it
    operation = control_restore.restore(place.control, backup.id, Asked(), in_place=True, start=False)
    with pytest.raises(WrongState, match=f"operation {operation.id[:8]}"):
        images.delete(place.control, "mini:1", Asked(), force=True)
    place.desk.run(lambda run, spec: {"disk_bytes": 32 << 20, "image": None})
    assert place.show(vm).image_id == place.image_id
    with pytest.raises(WrongState, match="used by VM desk-01"):
        images.delete(place.control, "mini:1", Asked(), force=True)


# --- adopt


def test_a_lost_record_is_read_back(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdcs_tasks.backup.node_chains.SCAN_POINTS", 1)  # so that it takes several steps
    ids = [place.vm(name) for name in ("desk-01", "desk-02", "desk-03")]
    points = [place.take(name) for name in ("desk-01", "desk-01", "desk-02", "desk-03")]
    before = {b["id"]: b for b in backups.list_backups(place.control)}
    damaged = place.repository.file(place.repository.get(ids[2], points[3].id)).with_suffix(".json")
    damaged.write_text("{}")
    with place.control.store.session() as session:
        session.execute(delete(Backup).where(Backup.id != points[3].id))
    operation = control_adopt.adopt(place.control, "east", Asked())
    with pytest.raises(Conflict, match="reads it already"):
        control_adopt.adopt(place.control, "east", Asked())
    assert place.work() == ["backup.scan_on_node"] * 3
    result = show(place.control, operation.id)["result"]
    assert (result["adopted"], result["known"], result["missing"]) == (3, 0, [points[3].id])
    assert len(result["damaged"]) == 1
    after = {b["id"]: b for b in backups.list_backups(place.control)}
    for backup_id, shown in before.items():
        same = ("vm_id", "vm_name", "domain_node", "chain", "seq", "kind", "parent_id", "file_bytes", "state")
        assert {k: after[backup_id][k] for k in same} == {k: shown[k] for k in same}
    again = control_adopt.adopt(place.control, "east", Asked())
    place.work()
    assert show(place.control, again.id)["result"]["known"] == 3
    assert place.take("desk-01").kind == "increment", "the chain goes on"


# --- prune


def test_pruning_drops_and_merges_but_keeps_every_kept_point_whole(place: Place, tmp_path: Path) -> None:
    vm = place.vm()
    moments = []
    for number in range(4):
        place.write(vm, 10 + number, 100 + number)
        moments.append((place.take("desk-01"), place.copy(vm, tmp_path / f"{number}.raw")))
    plan = control_prune.plan(place.control, "desk-01", Keep(last=2), merge=True)
    assert plan["drop"] == [moments[1][0].id, moments[0][0].id]
    assert control_prune.plan(place.control, "desk-01", Keep(last=2))["drop"] == []
    operation = control_prune.prune(place.control, "desk-01", Asked(), Keep(last=2), merge=True)
    with pytest.raises(Conflict, match="being pruned"):
        control_restore.restore(place.control, moments[3][0].id, Asked(), name="back")
    place.work()
    assert show(place.control, operation.id)["state"] == "done"
    assert [place.row(b.id).state for b, _ in moments] == [BackupState.DELETED] * 2 + [BackupState.READY] * 2
    third = place.row(moments[2][0].id)
    assert (third.kind, third.parent_id) == ("full", None)
    for backup, then in moments[2:]:
        point = place.repository.get(vm, backup.id)
        place.repository.verify(point)
        assert disks.compare(place.repository.file(point), then, formats=("qcow2", "raw"))
    assert len(list(place.repository.chain_folder(vm, third.chain).iterdir())) == 4
    following = place.take("desk-01")
    assert (following.kind, following.parent_id) == ("increment", moments[3][0].id)


def test_a_prune_that_fails_loses_nothing(place: Place) -> None:
    place.vm()
    points = [place.take("desk-01") for _ in range(3)]
    place.fails["backup.prune_on_node"] = HypervisorRefused("no space")
    operation = control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1), merge=True)
    place.work()
    assert show(place.control, operation.id)["state"] == "failed"
    assert [place.row(b.id).state for b in points] == [BackupState.READY] * 3
    place.fails.clear()
    control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1), merge=True)
    place.work()
    assert [place.row(b.id).state for b in points] == [BackupState.DELETED] * 2 + [BackupState.READY]


def test_nothing_is_pruned_under_a_reader(place: Place) -> None:
    place.vm()
    points = [place.take("desk-01", full=True) for _ in range(2)]
    backups.verify(place.control, points[0].id, Asked())
    with pytest.raises(Conflict, match="being read"):
        control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1))
    with pytest.raises(NotFound):
        control_prune.prune(place.control, "nobody", Asked(), Keep())


# --- policies


def ran_long_ago(place: Place, name: str) -> None:
    with place.control.store.session() as session:
        policy = session.get_one(BackupPolicy, name)
        policy.slot_at = policy.drill_slot_at = datetime.now(UTC) - timedelta(days=40)


def live(place: Place, kind: str) -> list[str]:
    with place.control.store.read() as session:
        query = select(Operation.subject).where(Operation.kind == kind, Operation.ended_at.is_(None))
        return sorted(session.scalars(query))


def test_a_policy_runs_once_per_moment_and_no_more_at_once_than_allowed(place: Place) -> None:
    for number in range(1, 5):
        place.vm(f"desk-0{number}", tags=["office"])
    place.vm("other-01")
    control_policy.create(
        place.control, "nightly", schedule="daily 02:00", selector={"tag": "office"}, keep=Keep(last=2), concurrency=2,
        bandwidth_mib_s=100,
    )  # fmt: skip
    control_policy.policy_sweep(place.control)
    assert live(place, "backup.create") == [], "its first run is at the next moment, not at once"
    ran_long_ago(place, "nightly")
    for _ in range(3):  # forty missed runs are caught up by one
        control_policy.policy_sweep(place.control)
    assert live(place, "backup.create") == ["desk-01", "desk-02"]
    assert control_policy.show(place.control, "nightly")["pending"] == 2
    with place.control.store.read() as session:
        specs = [s.spec for s in session.scalars(select(Step).where(Step.name == "backup.create_on_node"))]
    assert [spec["bandwidth_mib_s"] for spec in specs] == [50, 50], "the storage's bandwidth is shared"
    assert place.work("east") == ["backup.create_on_node"] * 4, "each that ends wakes the next"
    control_policy.policy_sweep(place.control)
    assert live(place, "backup.create") == []
    assert len(backups.list_backups(place.control)) == 4


def test_a_busy_vm_stays_in_line_and_one_that_never_rests_is_told(place: Place) -> None:
    place.vm("desk-01")
    vm = place.vm("desk-02", state=VmState.SAVED)
    control_policy.create(place.control, "p", schedule="hourly", selector={}, keep=Keep())
    control_policy.run(place.control, "p")
    place.work()
    assert control_policy.show(place.control, "p")["pending"] == 1
    control_policy.run(place.control, "p")
    place.work()
    with place.control.store.read() as session:
        assert session.scalars(select(Event).where(Event.kind == "backup.missed")).one().data["vms"] == [vm]
    control_delete.delete(place.control, "desk-02", Asked())
    place.work()
    control_policy.open_pending(place.control)
    assert control_policy.show(place.control, "p")["pending"] == 0


def test_a_policy_prunes_and_begins_new_chains(place: Place) -> None:
    vm = place.vm()
    control_policy.create(place.control, "p", schedule="hourly", selector={}, keep=Keep(last=2), full_every=2)
    for _ in range(5):
        control_policy.run(place.control, "p")
        place.work()
    found = backups.list_backups(place.control, vm)
    assert [b["kind"] for b in found] == ["full", "increment", "full"], "the increment is kept, so its full one is, too"
    assert len(place.repository.points(vm)) == 3


def test_policies_are_checked(place: Place) -> None:
    def create(name: str = "p", **more: object) -> None:
        control_policy.create(
            place.control, name, **({"schedule": "hourly", "selector": {}, "keep": Keep()} | more)  # type: ignore[arg-type]
        )  # fmt: skip

    for wrong in ({"schedule": "often"}, {"selector": {"colour": "red"}}, {"full_every": 0}, {"concurrency": 0},
                  {"drill_schedule": "never"}, {"bandwidth_mib_s": 0}, {"name": "A b"}):  # fmt: skip
        with pytest.raises(Invalid):
            create(**wrong)  # type: ignore[arg-type]
    create()
    with pytest.raises(Conflict):
        create()
    control_policy.enable(place.control, "p", False)
    ran_long_ago(place, "p")
    place.vm()
    control_policy.policy_sweep(place.control)
    assert live(place, "backup.create") == []
    control_policy.delete(place.control, "p")
    with pytest.raises(NotFound):
        control_policy.show(place.control, "p")
