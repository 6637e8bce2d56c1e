from __future__ import annotations
from pathlib import Path
from typing import Any
import pytest
from hdcs_tasks.backup import control as backups, control_copy
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.operations.views import show, cancel, list_operations
from hdcs_tasks.store.models import Backup, DomainNode
from tests.contract.test_backup_control import place  # noqa
from tests.contract.test_operations import desk  # noqa
pytestmark = pytest.mark.contract

@pytest.fixture(params=["sqlite"])
def empty_database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/hdcs.sqlite"

def flip(place: Any, b: Any) -> None:
    f = place.repository.file(place.repository.get(b.vm_id, b.id)); g = f.read_bytes(); f.write_bytes(bytes([*g[:-1], g[-1] ^ 1]))

def test_p12(place: Any) -> None:
    place.vm(); first, second = place.take("desk-01"), place.take("desk-01")
    flip(place, first)
    backups.verify(place.control, first.id, Asked()); place.work()
    print("P12 states", place.row(first.id).state.value, place.row(second.id).state.value)
    third = place.take("desk-01"); print("P12 next:", third.kind)
    assert third.kind == "full"

def test_p13(place: Any) -> None:
    place.vm(); first = place.take("desk-01")
    with place.control.store.session() as s:
        s.add(DomainNode(name="west", token_key="k", port_first=22000, port_last=22999))
    flip(place, first); second = place.take("desk-01")
    backups.verify(place.control, first.id, Asked()); place.work()
    policy = {"name": "nightly", "full_every": 64, "full_percent": None, "keep": {"last": 9, "daily": 0, "weekly": 0, "monthly": 0}, "merge": False, "copy_to": "west", "bandwidth_mib_s": None}
    op = backups.create(place.control, "desk-01", Asked(), policy=policy); place.work()
    print("P13", show(place.control, op.id)["state"])
    live = [o for o in list_operations(place.control, live=True)]
    for o in live:
        cancel(place.control, o["id"]); recovery_sweep(place.control)
        f = show(place.control, o["id"]); print("P13", f["kind"], f["state"], f["phase"], "steps", f["steps"], "cancel_asked", f["cancel_asked"])
    try: control_copy.copy(place.control, second.id, "west", Asked())
    except HdcsError as e: print("P13 copy asked by hand:", e)
    assert not list_operations(place.control, live=True)
