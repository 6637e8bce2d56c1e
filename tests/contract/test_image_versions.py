"""Versions of an image on the control plane: published, followed by a refresh, deleted."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

from typing import Any

import pytest

from hdcs_tasks.errors import Conflict, HypervisorRefused, Invalid, NotFound, WrongState
from hdcs_tasks.handles.vms import Vm, Vms
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.states import BackupState, VmState
from hdcs_tasks.store.models import Backup, ImagePublished, WarmPool
from hdcs_tasks.store.models import Vm as VmRow
from hdcs_tasks.vm import control_clone, control_refresh
from tests.contract.desk import Desk, ago, desk  # noqa: F401 - desk is a fixture
from tests.contract.image_place import MIB, ImagePlace
from tests.contract.test_images import BOTH, empty_database, ended, place  # noqa: F401 - fixtures

pytestmark = pytest.mark.contract


def clone(place: ImagePlace, name: str, image: str = "mini", **more: Any) -> dict[str, Any]:
    request = control_clone.CloneRequest(image, name, profile="tiny", **more)
    control_clone.clone(place.control, request, Asked())
    place.work()
    return Vm(place.control, "tester", name).show()


def version_of(place: ImagePlace, vm: dict[str, Any]) -> int:
    return next(int(i["version"]) for i in place.images.list() if i["id"] == vm["image_id"])


@BOTH
def test_clones_take_the_published_version(place: ImagePlace) -> None:
    place.add()
    place.add(pattern=2, mib=16)
    assert version_of(place, clone(place, "a")) == 2, "the newest, where none is published"
    plan = place.images.publish("mini", 1, dry_run=True).explain()
    assert plan == {"image": "mini:1", "domain_nodes": [{"domain_node": "east", "was": 2, "copied": False, "vms": 1}]}
    assert place.images.publish("mini", 1).state == "done"
    assert place.row(version=1)["published"] == ["east"]
    vm = clone(place, "b")
    assert (version_of(place, vm), vm["disk_bytes"]) == (1, 8 * MIB)
    assert version_of(place, clone(place, "c", "mini:2")) == 2, "a version that is named"
    place.add(pattern=3)
    assert version_of(place, clone(place, "d")) == 1, "a new version is not taken before it is published"
    assert place.images.publish("mini", 3).state == "done"
    assert version_of(place, clone(place, "e")) == 3


@BOTH
def test_publishing_brings_copies_and_each_pool_has_its_own(place: ImagePlace) -> None:
    place.add(domain_nodes=("east", "west"))
    place.add()
    operation = place.images.publish("mini", 2)
    assert place.work() == ["image.copy_on_node"], "west had version 1, so it gets version 2"
    assert operation.state == "done"
    assert place.row(version=2)["published"] == ["east", "west"]
    place.images.publish("mini", 1, domain_nodes=["west"])
    assert place.row(version=1)["published"] == ["west"]
    assert version_of(place, clone(place, "a", domain_node="west")) == 1
    assert version_of(place, clone(place, "b", domain_node="east")) == 2


def test_a_pool_whose_copy_fails_keeps_what_it_had(place: ImagePlace) -> None:
    place.add(domain_nodes=("east", "west"))
    place.images.publish("mini", 1)
    place.add()
    place.fails["image.copy_on_node"] = HypervisorRefused("no link")
    shown = ended(place, place.images.publish("mini", 2))
    assert shown["state"] == "failed"
    assert shown["error"]["details"] == {"failed": ["mini:2 on west"], "done": ["mini:2 on east"]}
    assert (place.row(version=1)["published"], place.row(version=2)["published"]) == (["west"], ["east"])


def test_bad_publishing(place: ImagePlace) -> None:
    place.add()
    with pytest.raises(NotFound):
        place.images.publish("mini", 7)
    with pytest.raises(NotFound):
        place.images.publish("mini", 1, domain_nodes=["north"])
    with pytest.raises(Invalid, match="names a version itself"):
        place.images.publish("mini:1", 1)


# -- refresh


@BOTH
def test_a_refresh_follows_to_the_published_version(place: ImagePlace) -> None:
    place.add()
    clone(place, "a", tags=("disposable",))
    clone(place, "b")
    clone(place, "c", rules={"disposable": True})
    place.add(mib=64)
    vms = Vms(place.control, "tester")
    with place.control.store.session() as session:
        vm_id = vms["a"].show()["id"]
        session.add(Backup(vm_id=vm_id, vm_name="a", domain_node="east", chain="c", seq=1, kind="full",
                           state=BackupState.READY, checkpoint="hdcs-x"))  # fmt: skip
    assert vms["a"].refresh(dry_run=True).explain() == {
        "name": "a", "domain_node": "east", "was": "mini:1", "image": "mini:2", "disposable": True, "needs_yes": False
    }  # fmt: skip
    with pytest.raises(WrongState, match="discards the changes") as caught:
        vms["b"].refresh()
    assert "--yes" in caught.value.next
    for operation in (vms["a"].refresh(), vms["b"].refresh(discard=True), vms["c"].refresh()):
        assert ended(place, operation)["state"] == "done"
    shown = vms["a"].show()
    assert (version_of(place, shown), shown["disk_bytes"], shown["state"]) == (2, 64 * MIB, "stopped")
    assert place.control.reservations.disks.used("east") == 3 * 64 * MIB
    with place.control.store.read() as session:
        assert session.query(Backup).one().checkpoint is None, "the next backup is a full one"


def test_a_failed_refresh_changes_nothing(place: ImagePlace) -> None:
    place.add()
    clone(place, "a")
    place.add(mib=64)
    place.fails["vm.refresh_on_node"] = HypervisorRefused("no")
    vm = Vm(place.control, "tester", "a")
    assert ended(place, vm.refresh(discard=True))["state"] == "failed"
    assert version_of(place, vm.show()) == 1
    assert place.control.reservations.disks.used("east") == 8 * MIB


def test_only_a_stopped_vm_is_refreshed_and_nothing_else_meanwhile(place: ImagePlace) -> None:
    place.add()
    clone(place, "a")
    vm = Vm(place.control, "tester", "a")
    vm.refresh(discard=True)
    with pytest.raises(Conflict, match=r"busy.*vm\.refresh"):
        vm.start()
    place.work()
    with place.control.store.session() as session:
        session.query(VmRow).one().state = VmState.RUNNING  # as if it had been started
    with pytest.raises(WrongState, match="is running: it cannot be refreshed"):
        control_refresh.refresh(place.control, "a", Asked(), discard=True)


# -- delete


@BOTH
def test_an_image_in_use_is_not_deleted_and_says_by_whom(place: ImagePlace) -> None:
    place.add()
    clone(place, "desk-1")
    with pytest.raises(WrongState, match="used by VM desk-1"):
        place.images.delete("mini", force=True)
    place.add(pattern=2)
    with place.control.store.session() as session:
        session.add(WarmPool(name="morning", image="mini", profile="tiny", size=1))
    with pytest.raises(WrongState, match="used by warm pool morning"):
        place.images.delete("mini:2", force=True)
    with place.control.store.session() as session:
        session.query(WarmPool).delete()
    operation = place.images.export("mini:2", "x.raw")
    with pytest.raises(WrongState, match=f"operation {operation.id[:8]}"):
        place.images.delete("mini:2")
    place.work()
    place.images.publish("mini", 2)
    sha256 = place.row(version=2)["sha256"]
    with place.control.store.session() as session:
        session.add(Backup(id="1234567890", vm_id="v", vm_name="gone", domain_node="east", chain="c", seq=1,
                           kind="full", state=BackupState.READY, manifest={"base": {"sha256": sha256}}))  # fmt: skip
    with pytest.raises(WrongState) as caught:
        place.images.delete("mini:2")
    assert "clones on east (it is published there)" in caught.value.message
    assert "backup 12345678 of gone" in caught.value.message
    assert "--force" in caught.value.next
    place.images.delete("mini:2", force=True)
    place.work()
    assert [i["version"] for i in place.images.list()] == [1]
    assert place.everything() == ["east/export/x.raw", "east/export/x.raw.json", "east/images/mini",
                                  "east/images/mini/1.qcow2"]  # fmt: skip
    with place.control.store.read() as session:
        assert session.query(ImagePublished).count() == 0
    assert version_of(place, clone(place, "desk-2")) == 1


def test_backups_keep_no_image_of_which_another_has_the_content(place: ImagePlace) -> None:
    """They know their base by its hash: only the last image of that content is theirs."""
    place.add()
    place.add("office")
    assert place.row()["sha256"] == place.row("office")["sha256"]
    with place.control.store.session() as session:
        session.add(Backup(id="1234567890", vm_id="v", vm_name="gone", domain_node="east", chain="c", seq=1,
                           kind="full", state=BackupState.READY, manifest={
                               "base": {"name": "mini", "version": 1, "sha256": place.row()["sha256"]}}))  # fmt: skip
    place.images.delete("office:1")
    with pytest.raises(WrongState, match="backup 12345678 of gone"):
        place.images.delete("mini:1")
    place.work()
    assert [i["name"] for i in place.images.list()] == ["mini"]


def test_a_vm_tells_its_image_by_name(place: ImagePlace) -> None:
    place.add()
    assert clone(place, "desk-1")["image"] == "mini:1"


def test_a_deletion_that_does_not_come_through_can_be_asked_for_again(place: ImagePlace) -> None:
    """Else the file would lie there for ever, and nobody could name it."""
    place.add(domain_nodes=("east", "west"))
    operation = place.images.delete("mini")
    operation.cancel()
    recovery_sweep(place.control)
    place.work()
    assert operation.state == "cancelled" and place.row()["copies"] == {"east": "ready", "west": "ready"}
    place.fails["image.delete_on_node"] = HypervisorRefused("read-only file system")
    assert ended(place, place.images.delete("mini"))["state"] == "failed"
    assert place.row()["copies"] == {"east": "failed", "west": "failed"}
    place.fails.clear()
    assert ended(place, place.images.delete("mini"))["state"] == "done"
    assert place.images.list() == [] and place.everything() == []


@pytest.mark.parametrize("first", ["add", "copy"])
@pytest.mark.parametrize("fails", ["", "image.copy_on_node", "image.add_on_node"])
def test_an_image_that_comes_by_two_ways_at_once(
    place: ImagePlace, fails: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both operations end, and it is ready if one of them brought it."""
    place.add()
    if first == "copy":
        taken = place.desk.messages
        monkeypatch.setattr(place.desk, "messages", lambda queue: taken(queue)[:: -1 if queue == "control" else 1])
    added = place.images.add("mini", str(place.image()), domain_nodes=["west"])
    copied = place.images.copy("mini", "west")
    if fails:
        place.fails[fails] = HypervisorRefused("no")
    place.work()
    assert added.state == ("failed" if fails == "image.add_on_node" else "done")
    assert copied.state == ("failed" if fails == "image.copy_on_node" else "done")
    assert place.row()["copies"] == {"east": "ready", "west": "ready"}


# -- a worker that dies
