from __future__ import annotations
from pathlib import Path
from typing import Any
import pytest
from hdcs_tasks.backup import control as backups, control_prune, control_restore, node_restore
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.errors import HypervisorRefused, HdcsError
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.operations.views import show, cancel
from hdcs_tasks.store.models import Backup, DomainNode
from hdcs_tasks.vm.node import remove_folder
from hdcs_tasks.pool import rebuild
from tests.contract.test_backup_control import place  # noqa
from tests.contract.test_operations import desk, failing  # noqa
from tests.contract.test_scheduling import center, GIB  # noqa
from tests.contract.test_backup_kills import attempt, spec_of
pytestmark = pytest.mark.contract

@pytest.fixture(params=["sqlite"])
def empty_database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/hdcs.sqlite"

def test_p6(place: Any) -> None:
    place.vm(); pts = [place.take("desk-01", full=True) for _ in range(3)]
    with place.control.store.session() as s:
        s.add(DomainNode(name="west", token_key="k", port_first=22000, port_last=22999)); s.flush()
        s.get_one(Backup, pts[0].id).domain_node = "west"
    op = control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1))
    place.desk.run(failing(HypervisorRefused("west's storage is read-only")), queue="west")
    place.work("east")
    f = show(place.control, op.id)
    print("P6", f["state"], f["error"], [(s["queue"], s["state"]) for s in f["steps"]], [place.row(p.id).state.value for p in pts])
    assert f["state"] == "failed"

def test_p8(place: Any, monkeypatch: Any) -> None:
    vm = place.vm(); place.write(vm, 10, 7); newest = place.take("desk-01")
    new = place.vm("back"); remove_folder(place.layout.vm_dir(new))
    spec = spec_of(place, newest.id) | {"vm_id": new, "image": {"name": "mini", "version": 1}, "compare": True}
    calls = []
    def check(*a: Any) -> None:
        calls.append(1)
        if len(calls) == 1: raise KeyboardInterrupt  # killed while comparing
    monkeypatch.setattr(node_restore, "_check_same", check)
    with pytest.raises(KeyboardInterrupt): attempt(place, node_restore.restore, spec, "s", 1)
    attempt(place, node_restore.restore, spec, "s", 2)
    print("P8 compares begun:", len(calls)); assert len(calls) == 2

def test_p11(place: Any) -> None:
    place.vm(); pts = [place.take("desk-01", full=True) for _ in range(2)]
    op = control_restore.restore(place.control, pts[1].id, Asked(), name="back", start=False)
    d = backups.delete(place.control, pts[1].id, Asked())
    print("P11 accepted", d.kind, d.state)
    msgs = place.desk.messages("east")
    for m in reversed(msgs): place.desk.work(m, place._handler(place._name(m["step"])))
    place._control()
    print("P11", show(place.control, op.id)["state"], (show(place.control, op.id)["error"] or {}).get("message"), place.row(pts[1].id).state)
    assert show(place.control, op.id)["state"] == "done"

def test_p9(center: Any, monkeypatch: Any) -> None:
    center.node("east", "node1", 1024); center.node("west", "node9", 1024); center.image()
    center.clone("a", domain_node="east")
    disks = center.control.reservations.disks
    op = center.cloud.vms["a"].migrate(to="west", live=False)
    before = (disks.used("east"), disks.used("west"))
    monkeypatch.setattr(rebuild, "WAIT_FOR_REPORTS_S", 0)
    center.control.reservations.epoch.close()   # Redis restarted; nothing was lost
    print("P9", rebuild.reservation_sweep(center.control), before, "->", (disks.used("east"), disks.used("west")))
    assert (disks.used("east"), disks.used("west")) == before
