"""Renaming a VM and growing its disk, and what becomes of its backup chain."""

from __future__ import annotations

import pytest

from hdcs_tasks.backup import control as backups
from hdcs_tasks.errors import Conflict, HypervisorRefused, Invalid, NoCapacity, NotFound, WrongState
from hdcs_tasks.hypervisor import disks
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.views import show
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import DomainNode, Vm
from hdcs_tasks.vm import control_shape
from hdcs_tasks.vm.control_clone import promise_disk
from tests.contract.backup_place import MIB, Place
from tests.contract.desk import desk  # noqa: F401 - a fixture
from tests.contract.test_backup_control import place  # noqa: F401 - a fixture

pytestmark = pytest.mark.contract


def test_a_grow_that_is_not_recorded_keeps_the_vms_promise(place: Place) -> None:  # noqa: F811
    vm, used = place.vm("desk-01"), place.control.reservations.disks.used
    place.control.reservations.disks.claim("east", vm, 32 * MIB, 1 << 40)
    with pytest.raises(ZeroDivisionError), place.control.transaction() as tx:
        promise_disk(tx, "east", vm, 64 * MIB, before=32 * MIB)
        assert used("east") == 64 * MIB
        raise ZeroDivisionError
    assert used("east") == 32 * MIB


def test_a_renamed_vm_keeps_its_chain(place: Place) -> None:  # noqa: F811
    vm = place.vm("desk-01")
    place.vm("desk-02")
    first = place.take("desk-01")
    with pytest.raises(Conflict, match="already"):
        control_shape.rename(place.control, "desk-01", "desk-02")
    with pytest.raises(Invalid):
        control_shape.rename(place.control, "desk-01", "Not A Name")
    assert control_shape.rename(place.control, "desk-01", "anna")["id"] == vm
    with pytest.raises(NotFound):
        place.take("desk-01")
    second = place.take("anna")
    assert (second.kind, second.parent_id, second.vm_name) == ("increment", first.id, "anna")
    assert [b["id"] for b in backups.list_backups(place.control, "anna")] == [first.id, second.id]
    with place.control.store.session() as session:
        session.get_one(Vm, vm).state = VmState.RUNNING
    with pytest.raises(WrongState, match="Stop it first"):
        control_shape.rename(place.control, "anna", "bert")


def test_after_a_growth_a_chain_begins_anew(place: Place) -> None:  # noqa: F811
    vm = place.vm()
    first = place.take("desk-01")
    assert place.take("desk-01").kind == "increment"
    with pytest.raises(Invalid, match="Only growing"):
        control_shape.grow(place.control, "desk-01", 16 * MIB, Asked())
    operation = control_shape.grow(place.control, "desk-01", 64 * MIB, Asked())
    place.work()
    assert show(place.control, operation.id)["state"] == "done"
    assert place.show(vm).disk_bytes == disks.probe(place.layout.disk(vm)).virtual_bytes == 64 * MIB
    grown = place.take("desk-01")
    assert (grown.kind, grown.chain != first.chain) == ("full", True)
    assert "has grown" in place.request(_newest(place))["why"]
    assert place.take("desk-01").kind == "increment"


def _newest(place: Place) -> str:  # noqa: F811
    from sqlalchemy import select

    from hdcs_tasks.store.models import Operation

    with place.control.store.read() as session:
        query = select(Operation.id).where(Operation.kind == "backup.create").order_by(Operation.created_at.desc())
        return str(session.scalars(query).first())


def test_a_growth_that_fails_promises_nothing(place: Place) -> None:  # noqa: F811
    vm = place.vm()
    place.control.reservations.disks.claim("east", vm, 32 * MIB, 1 << 40)
    before = place.control.reservations.disks.used("east")
    place.fails["vm.grow_on_node"] = HypervisorRefused("no")
    operation = control_shape.grow(place.control, "desk-01", 64 * MIB, Asked())
    assert place.control.reservations.disks.used("east") == before + 32 * MIB
    place.work()
    assert show(place.control, operation.id)["state"] == "failed"
    assert place.show(vm).disk_bytes == 32 * MIB
    assert place.control.reservations.disks.used("east") == before
    with place.control.store.session() as session:
        session.get_one(DomainNode, "east").storage_total_bytes = 1
    with pytest.raises(NoCapacity):
        control_shape.grow(place.control, "desk-01", 128 * MIB, Asked())
