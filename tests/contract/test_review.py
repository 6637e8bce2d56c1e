from __future__ import annotations
import threading, time, json
from pathlib import Path
from typing import Any
import pytest
from hdcs_tasks.backup import control as backups, control_prune, node_chains, node_restore
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.errors import HypervisorRefused, Unreachable, HdcsError
from hdcs_tasks.hypervisor import merging, disks
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.node import Run
from hdcs_tasks.operations.recovery import recovery_sweep, settle, wake
from hdcs_tasks.operations.views import show, cancel
from hdcs_tasks.states import BackupState
from hdcs_tasks.vm.node import remove_folder
from hdcs_tasks.reservations import PlaceRequest
from tests.contract.backup_place import Place
from tests.contract.test_backup_control import place  # noqa
from tests.contract.test_operations import desk, Desk, ago, failing  # noqa
from tests.contract.test_scheduling import center, Center  # noqa
from tests.contract.test_backup_kills import attempt, spec_of

pytestmark = pytest.mark.contract


@pytest.fixture(params=["sqlite"])
def empty_database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/hdcs.sqlite"


def test_p1_stale_restore_deletes_newer_disk(place: Place, monkeypatch: Any) -> None:
    vm = place.vm(); place.write(vm, 10, 7); newest = place.take("desk-01")
    new = place.vm("back"); remove_folder(place.layout.vm_dir(new))
    spec = spec_of(place, newest.id) | {"vm_id": new, "image": {"name": "mini", "version": 1}}
    real, calls = node_restore._write, []
    def write(run: Run, *a: Any, **k: Any) -> None:
        calls.append(run.attempt)
        if run.attempt == 1:  # stands still past its lease here; attempt 2 comes, ends, goes
            place.done2 = attempt(place, node_restore.restore, spec, "s1", 2)
            assert place.layout.disk(new).exists()
        real(run, *a, **k)
    monkeypatch.setattr(node_restore, "_write", write)
    with pytest.raises(HdcsError) as e:
        attempt(place, node_restore.restore, spec, "s1", 1)
    print("attempt 1 ended with", e.value.code, "| disk there:", place.layout.disk(new).exists())
    assert place.layout.disk(new).exists()


def test_p2_published_but_failed(place: Place, monkeypatch: Any) -> None:
    place.vm(); place.take("desk-01")
    real = Place._backup
    def once(self: Place, spec: Any) -> Any:
        real(self, spec)
        monkeypatch.setattr(Place, "_backup", real)
        raise HypervisorRefused("keeping the checkpoint failed: No space left on device")
    monkeypatch.setattr(Place, "_backup", once)
    seen = []
    for _ in range(5):
        op = backups.create(place.control, "desk-01", Asked()); place.work()
        s = show(place.control, op.id); seen.append((s["state"], (s["error"] or {}).get("message")))
    for x in seen: print(x)
    print([(p.seq, p.id[:6]) for p in place.repository.points()], [b["state"] for b in backups.list_backups(place.control)])
    assert seen[-1][0] == "done"


def test_p3_cancelled_prune_makes_broken_ready(place: Place) -> None:
    place.vm(); first, second = place.take("desk-01"), place.take("desk-01")
    file = place.repository.file(place.repository.get(second.vm_id, second.id))
    good = file.read_bytes(); file.write_bytes(bytes([*good[:-1], good[-1] ^ 1]))
    backups.verify(place.control, second.id, Asked()); place.work()
    assert place.row(second.id).state is BackupState.BROKEN
    op = control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1))
    cancel(place.control, op.id); place.work(); recovery_sweep(place.control)
    print(show(place.control, op.id)["state"], place.row(second.id).state)
    third = place.take("desk-01")
    print("next point:", third.kind, third.seq, "on", third.parent_id == second.id)
    v = backups.verify(place.control, third.id, Asked()); place.work()
    print("its verify:", show(place.control, v.id)["state"])
    assert third.kind == "full"


def test_p4_stale_status_kills_live_executor(desk: Desk, monkeypatch: Any) -> None:
    op = desk.ask()
    steps = desk.control.reservations.steps
    real = steps.statuses
    out: dict[str, Any] = {}
    def executing(run: Run, spec: Any) -> Any:
        desk.due(op, published_at=ago(3))   # the sweep has other 3 s to do meanwhile
        out["go"].set(); out["end"].wait(10)
        run.check()
        return {}
    def statuses(ids: Any) -> Any:
        found = real(ids)
        monkeypatch.setattr(steps, "statuses", real)
        # now the sweep is busy with other steps; meanwhile: attempt 1 refused, parked, woken, attempt 2 at work
        desk.run(failing(Unreachable("later")))
        wake(desk.control, [desk.step(op).id])
        out["go"], out["end"] = threading.Event(), threading.Event()
        (message,) = desk.messages(desk.step(op).sent_to or "east")
        out["t"] = threading.Thread(target=lambda: out.update(ended=desk.work(message, executing)))
        out["t"].start(); out["go"].wait(10)
        return found
    monkeypatch.setattr(steps, "statuses", statuses)
    counts = recovery_sweep(desk.control)
    out["end"].set(); out["t"].join()
    print(counts, "attempt", desk.step(op).attempt, "executor of 2:", out["ended"], [h["error"] for h in desk.step(op).history])
    assert out["ended"] == "done"


def test_p4b_first_attempt(desk: Desk, monkeypatch: Any) -> None:
    """commit -> [statuses read] -> issued, sent, claimed -> the sweep comes to it 2 s later."""
    steps = desk.control.reservations.steps
    real_issue, out = steps.issue_many, {}
    monkeypatch.setattr(steps, "issue_many", lambda a: out.setdefault("kept", list(a)))
    op = desk.ask()
    monkeypatch.setattr(steps, "issue_many", real_issue)
    real = steps.statuses
    def executing(run: Run, spec: Any) -> Any:
        out["go"].set(); out["end"].wait(10); run.check(); return {}
    def statuses(ids: Any) -> Any:
        found = real(ids); monkeypatch.setattr(steps, "statuses", real)
        steps.issue_many(out["kept"]); desk.due(op, published_at=ago(3))
        out["go"], out["end"] = threading.Event(), threading.Event()
        (message,) = desk.messages()
        out["t"] = threading.Thread(target=lambda: out.update(ended=desk.work(message, executing, "node1"))); out["t"].start(); out["go"].wait(10)
        return found
    monkeypatch.setattr(steps, "statuses", statuses)
    counts = recovery_sweep(desk.control); 
    step = desk.step(op)
    print(counts, "attempt", step.attempt, "node", step.node, "sent_to", step.sent_to, "messages in east:", len(desk.messages()))
    out["end"].set(); out["t"].join(); print("executor of 1:", out["ended"])
    assert out["ended"] == "done"


def test_p5_cancel_while_replanned(center: Center) -> None:
    center.node("east", "node1", 256); center.node("west", "node9", 128); center.image()
    op = center.cloud.vms.clone("mini", name="a", profile="tiny", start=True)
    for n in range(2): center.pool.place(PlaceRequest("east", f"other{n}", f"s{n}", 1, 128))
    while True:
        (step,) = center.steps("published")
        if step["name"] == "vm.discard_on_node": break
        settle(center.control, center._report(step, None))
    cancel(center.control, op.id); recovery_sweep(center.control)
    for _ in range(3): recovery_sweep(center.control)
    vm = center.cloud.vms["a"].show()
    d = center.control.reservations.disks
    print(op.state, vm["state"], vm["home"], "disk promised east/west", d.used("east"), d.used("west"))
    assert vm["state"] != "creating"


def test_p7_settle_beside_a_merge(place: Place, monkeypatch: Any) -> None:
    vm = place.vm(); pts = []
    for n in range(3): place.write(vm, 10 + n, 50 + n); pts.append(place.take("desk-01"))
    old_hashed, replaced = threading.Event(), threading.Event()
    real_sha, real_sync, real_write = disks.sha256, disks.sync, merging.write_durably
    out: dict[str, Any] = {}
    def sha(path: Path, **k: Any) -> str:
        d = real_sha(path, **k)
        if threading.current_thread() is out.get("t"): old_hashed.set(); replaced.wait(10)
        return d
    def write(path: Path, content: bytes) -> None:
        real_write(path, content)
        out["t"] = threading.Thread(target=lambda: out.update(n=merging.settle(place.repository, vm)))  # as an adopt's scan does
        out["t"].start(); old_hashed.wait(10)
    def sync(path: Path) -> None:
        real_sync(path)
        if old_hashed.is_set() and not replaced.is_set(): replaced.set(); out["t"].join()
    monkeypatch.setattr(merging.disks, "sha256", sha); monkeypatch.setattr(merging, "write_durably", write); monkeypatch.setattr(merging.disks, "sync", sync)
    try: merging.merge(place.repository, place.repository.get(vm, pts[2].id), place.repository.get(vm, pts[0].id), attempt="1")
    except HdcsError as e: print("merge:", e)
    except OSError as e: print("merge:", e)
    monkeypatch.undo()
    place.repository.verify(place.repository.get(vm, pts[2].id))
