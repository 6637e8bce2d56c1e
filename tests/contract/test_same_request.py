"""An idempotency key stands for one request: given again with it, the same operation; with another, a Conflict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup import control_adopt, control_drill, control_prune, control_restore
from hdcs_tasks.backup import control_copy as backup_copies
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.errors import Conflict
from hdcs_tasks.image import control as images
from hdcs_tasks.image import control_copy, control_export, control_import, control_publish
from hdcs_tasks.image.control_export import ExportRequest
from hdcs_tasks.image.control_import import ImportRequest
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.views import show
from hdcs_tasks.states import VmState
from hdcs_tasks.vm import control as vms
from hdcs_tasks.vm import (
    control_clone,
    control_delete,
    control_drain,
    control_migrate,
    control_rebalance,
    control_refresh,
    control_shape,
)
from hdcs_tasks.vm import control_export as vm_export
from hdcs_tasks.vm.control_clone import CloneRequest
from tests.contract.desk import Desk, desk  # noqa: F401 - desk is a fixture
from tests.contract.test_vm_control import add, started

pytestmark = pytest.mark.contract

KEY = Asked(by="anna", idempotency_key="order-7")
TO = ExportRequest("a.qcow2")
FROM = ImportRequest("mini", "/srv/a.qcow2")

USE_CASES: dict[str, Callable[[Control], Any]] = {
    "vm.start": lambda c: vms.start(c, "b", KEY),
    "vm.start_many": lambda c: vms.start_many(c, ["a", "b"], KEY),
    "vm.stop": lambda c: vms.command(c, "stop", "a", KEY, force=True),
    "vm.suspend": lambda c: vms.command(c, "suspend", "a", KEY),
    "vm.delete": lambda c: control_delete.delete(c, "a", KEY),
    "vm.grow": lambda c: control_shape.grow(c, "a", 2**40, KEY),
    "vm.migrate": lambda c: control_migrate.migrate(c, "a", KEY),
    "vm.refresh": lambda c: control_refresh.refresh(c, "a", KEY),
    "vm.export": lambda c: vm_export.export(c, "a", TO, KEY),
    "vm.clone": lambda c: control_clone.clone(c, CloneRequest("mini", "a"), KEY),
    "pool.drain": lambda c: control_drain.drain_node(c, "node1", KEY),
    "pool.drain_domain": lambda c: control_drain.drain_domain_node(c, "east", KEY),
    "pool.rebalance": lambda c: control_rebalance.rebalance(c, "east", KEY),
    "image.add": lambda c: images.add(c, "mini", "/srv/a.qcow2", KEY),
    "image.copy": lambda c: control_copy.copy(c, "mini", "east", KEY),
    "image.publish": lambda c: control_publish.publish(c, "mini", 1, KEY),
    "image.import": lambda c: control_import.import_(c, FROM, KEY),
    "image.probe": lambda c: control_import.probe(c, FROM, KEY),
    "image.export": lambda c: control_export.export(c, "mini", TO, KEY),
    "image.delete": lambda c: images.delete(c, "mini", KEY),
    "backup.create": lambda c: backups.create(c, "a", KEY),
    "backup.verify": lambda c: backups.verify(c, "6e2b", KEY),
    "backup.delete": lambda c: backups.delete(c, "6e2b", KEY),
    "backup.copy": lambda c: backup_copies.copy(c, "6e2b", "east", KEY),
    "backup.restore": lambda c: control_restore.restore(c, "6e2b", KEY, name="c"),
    "backup.extract": lambda c: control_restore.extract(c, "6e2b", "c", KEY),
    "backup.drill": lambda c: control_drill.drill(c, "6e2b", KEY),
    "backup.prune": lambda c: control_prune.prune(c, "a", KEY, Keep()),
    "backup.adopt": lambda c: control_adopt.adopt(c, "east", KEY),
}


def test_every_use_case_refuses_a_key_of_another_request(desk: Desk) -> None:  # noqa: F811
    add(desk, "a", 1)
    add(desk, "b", 2)
    first = vms.start(desk.control, "a", KEY)
    for kind, ask in USE_CASES.items():
        with pytest.raises(Conflict) as refused:
            ask(desk.control)
        assert refused.value.details == {"operation": first.id, "kind": "vm.start", "subject": "a"}, kind
        assert f"belongs to operation {first.id} (vm.start a, running); this is {kind} " in refused.value.message
        assert f"hdcs op show {first.id}" in refused.value.next
    assert vms.start(desk.control, "a", KEY).id == first.id
    assert desk.run(started) == ["done"]
    assert vms.start(desk.control, "a", KEY).id == first.id, "also when it has ended"
    with pytest.raises(Conflict, match=r"vm\.start a, done"):
        vms.start(desk.control, "b", KEY)


def test_other_parameters_are_another_request(desk: Desk) -> None:  # noqa: F811
    add(desk, "a", 1, state=VmState.RUNNING, server_node="node1")
    first = vms.command(desk.control, "stop", "a", KEY, timeout_s=60)
    assert vms.command(desk.control, "stop", "a", KEY, timeout_s=60.0).id == first.id
    why = Asked(by="bert", reason="he asks again", idempotency_key=KEY.idempotency_key)
    assert vms.command(desk.control, "stop", "a", why, timeout_s=60.0).id == first.id
    for other in ({"force": True}, {"timeout_s": 61.0}):
        with pytest.raises(Conflict, match="the same with other parameters"):
            vms.command(desk.control, "stop", "a", KEY, **other)  # type: ignore[arg-type]


def test_a_key_that_joined_a_live_operation_stands_for_its_own_request(desk: Desk) -> None:  # noqa: F811
    add(desk, "a", 1, state=VmState.RUNNING, server_node="node1")
    live = vms.command(desk.control, "stop", "a", Asked(), force=True)
    assert vms.command(desk.control, "stop", "a", KEY, force=True).id == live.id
    assert vms.command(desk.control, "stop", "a", KEY, force=True).id == live.id
    with pytest.raises(Conflict, match=r"this is vm\.delete a"):
        control_delete.delete(desk.control, "a", KEY)


def test_a_selector_is_the_request_not_what_it_finds_now(desk: Desk) -> None:  # noqa: F811
    for number, name in enumerate("abc"):
        add(desk, name, number)
    first = vms.start_many(desk.control, ["a", "b", "c"], KEY, chosen_by={"tag": "lab"})
    assert vms.start_many(desk.control, ["c"], KEY, chosen_by={"tag": "lab"}).id == first.id
    with pytest.raises(Conflict):
        vms.start_many(desk.control, ["a", "b", "c"], KEY, chosen_by={"tag": "school"})
    with pytest.raises(Conflict):
        vms.start_many(desk.control, ["a", "b", "c"], KEY)


def test_a_sweep_s_key_says_all(desk: Desk) -> None:  # noqa: F811
    for number, name in enumerate("ab"):
        add(desk, name, number)
    sweep = replace(KEY, key_says_all=True)
    first = vms.start_many(desk.control, ["a", "b"], sweep)
    assert vms.start_many(desk.control, ["b"], sweep).id == first.id
    assert len(show(desk.control, first.id)["children"]) == 2
