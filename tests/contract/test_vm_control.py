"""VMs on the control plane without a hypervisor: what the record says when their steps end well, badly or unknown."""

from __future__ import annotations

from typing import Any

import pytest

from hdcs_tasks.errors import HypervisorRefused, Invalid, NotFound, OutcomeUnknown, Unreachable
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.node import Run
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.operations.views import cancel, show
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.states import ServerNodeState, VmState
from hdcs_tasks.store.models import ServerNode, Vm
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control as vms
from hdcs_tasks.vm import control_console, control_delete, control_select
from tests.contract.desk import Desk, desk, failing  # noqa: F401 - desk is a fixture
from tests.contract.test_store import vm_row

pytestmark = pytest.mark.contract


def add(desk: Desk, name: str, number: int, **more: Any) -> str:  # noqa: F811
    with desk.control.store.session() as session:
        vm = vm_row(name, mac=f"52:54:00:00:00:{number:02x}", **more)
        session.add(vm)
        session.flush()
        return vm.id


def vm_of(desk: Desk, vm_id: str) -> Vm:  # noqa: F811
    with desk.control.store.read() as session:
        return session.get_one(Vm, vm_id)


def started(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    return {"node": run.ctx.server_node, "port": 20000, "ip": "10.0.0.2"}


def test_a_start_that_failed_leaves_the_vm_stopped(desk: Desk) -> None:  # noqa: F811
    vm = add(desk, "desk-01", 1)
    vms.start(desk.control, "desk-01", Asked())
    assert vm_of(desk, vm).state is VmState.STARTING
    desk.run(failing(HypervisorRefused("no")))
    assert vm_of(desk, vm).state is VmState.STOPPED


def test_a_start_nobody_knows_the_end_of_is_not_recorded_as_stopped(desk: Desk) -> None:  # noqa: F811
    vm = add(desk, "desk-01", 1)
    operation = vms.start(desk.control, "desk-01", Asked())
    desk.control.settings.attempts_max = 1
    desk.run(failing(OutcomeUnknown("nobody answers")))
    found = vm_of(desk, vm)
    assert (found.state, found.server_node) == (VmState.FAILED, "node1")
    assert show(desk.control, operation.id)["needs_operator"]
    vms.command(desk.control, "stop", "desk-01", Asked(), force=True)  # goes there and finds out
    assert desk.run(lambda run, spec: {}, queue=quick_queue("east", "node1")) == ["done"]
    assert (vm_of(desk, vm).state, vm_of(desk, vm).server_node) == (VmState.STOPPED, None)


def test_a_bulk_start_fails_alone(desk: Desk) -> None:  # noqa: F811
    names = ["a", "b", "c"]
    add(desk, "a", 1)
    add(desk, "b", 2, state=VmState.RUNNING, server_node="node1")
    add(desk, "c", 3)
    parent = vms.start_many(desk.control, names, Asked())
    assert desk.state(parent.id) == "running"
    assert desk.run(started) == ["done", "done"]
    found = show(desk.control, parent.id)
    assert found["state"] == "failed"
    assert found["error"]["details"] == {"failed": ["b"], "done": ["a", "c"]}
    assert "VM b is running: it cannot start" in found["error"]["message"]
    with pytest.raises(Invalid, match="no VM was named"):
        vms.start_many(desk.control, [], Asked())


def test_no_console_at_a_server_node_that_left(desk: Desk) -> None:  # noqa: F811
    add(desk, "desk-01", 1, state=VmState.RUNNING, server_node="node1", port=20000)
    assert "port=20000" in control_console.console(desk.control, "desk-01", Asked(), ttl_s=60)[1]
    with desk.control.store.session() as session:
        move(session.get_one(ServerNode, "node1"), ServerNodeState.LEFT)
    with pytest.raises(Unreachable, match=r"on server node node1, which is left\. Bring node1 back"):
        control_console.console(desk.control, "desk-01", Asked(), ttl_s=60)


def test_a_name_nobody_has_brings_those_that_come_close(desk: Desk) -> None:  # noqa: F811
    for number, name in enumerate(("desk-01", "desk-02", "lab-01")):
        add(desk, name, number)
    with desk.control.store.read() as session:
        for wrong, told in (
            ("desk01", "Did you mean desk-01 or desk-02? See: hdcs vm list"),
            ("anna", "Known: desk-01, desk-02, lab-01. See: hdcs vm list"),
        ):
            with pytest.raises(NotFound) as refused:
                vms.get_vm(session, wrong)
            assert (refused.value.message, refused.value.next) == (f"there is no VM {wrong!r}", told)
    with pytest.raises(NotFound, match=r"no domain node 'eats'\. Did you mean east\?"):
        control_select.check_filters(desk.control, {"home": "eats"})
    with pytest.raises(NotFound, match=r"no server node 'node3'\. Did you mean node[12] or node[12]\?"):
        control_select.check_filters(desk.control, {"server_node": "node3"})


def test_a_delete_whose_stop_failed_ends(desk: Desk) -> None:  # noqa: F811
    vm = add(desk, "desk-01", 1, state=VmState.RUNNING, server_node="node1")
    operation = control_delete.delete(desk.control, "desk-01", Asked())
    assert control_delete.delete(desk.control, "desk-01", Asked()).id == operation.id, "asked again it is the same"
    desk.run(failing(HypervisorRefused("no")), queue=quick_queue("east", "node1"))
    assert desk.state(operation.id) == "failed"
    assert vm_of(desk, vm).state is VmState.FAILED
    again = control_delete.delete(desk.control, "desk-01", Asked())
    desk.run(lambda run, spec: {}, queue=quick_queue("east", "node1"))
    desk.run(lambda run, spec: {})
    assert desk.state(again.id) == "done"
    assert vm_of(desk, vm).deleted_at is not None


@pytest.mark.parametrize("state", [VmState.RUNNING, VmState.STOPPED, VmState.SAVED])
def test_a_delete_cancelled_before_it_began_leaves_the_vm_as_it_was(desk: Desk, state: VmState) -> None:  # noqa: F811
    """Not failed: nothing can be done with one, and saved memory would be lost."""
    held = "node1" if state is VmState.RUNNING else None
    vm = add(desk, "desk-01", 1, state=state, server_node=held)
    operation = control_delete.delete(desk.control, "desk-01", Asked())
    cancel(desk.control, operation.id)
    recovery_sweep(desk.control)
    assert desk.state(operation.id) == "cancelled"
    assert (vm_of(desk, vm).state, vm_of(desk, vm).server_node) == (state, held)
    if held is None:
        return
    operation = control_delete.delete(desk.control, "desk-01", Asked())
    desk.run(lambda run, spec: {}, queue=quick_queue("east", "node1"))
    cancel(desk.control, operation.id)
    recovery_sweep(desk.control)
    assert vm_of(desk, vm).state is VmState.STOPPED, "its guest was stopped, its disk is there"


def test_a_suspended_vm_can_be_saved(desk: Desk) -> None:  # noqa: F811
    vm = add(desk, "desk-01", 1, state=VmState.SUSPENDED, server_node="node1")
    vms.command(desk.control, "save", "desk-01", Asked())
    assert vm_of(desk, vm).state is VmState.SAVING
    desk.run(lambda run, spec: {}, queue="east@node1.dq2")
    assert (vm_of(desk, vm).state, vm_of(desk, vm).server_node) == (VmState.SAVED, None)
