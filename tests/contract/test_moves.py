"""Moves and drains on the control plane: the test plays the server nodes, and every step can be made to fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis

from hdcs_tasks.config import CapacitySettings, Settings
from hdcs_tasks.errors import (
    Cancelled,
    Conflict,
    HdcsError,
    HypervisorRefused,
    NoCapacity,
    OutcomeUnknown,
    Unreachable,
    WrongState,
)
from hdcs_tasks.operations.recovery import recovery_sweep, settle
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool.tidy import tidy_sweep
from hdcs_tasks.states import ServerNodeState
from hdcs_tasks.store.models import ServerNode, Step
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control_drain import drain_sweep
from tests.contract.test_scheduling import GIB, Center
from tests.services import RedisServer

pytestmark = pytest.mark.contract

FIGURES = {"total_ms": 900, "downtime_ms": 50, "bytes": 7, "memory_bytes": 5, "disk_bytes": 2}


class Played(Center):
    """Server nodes that do what they are asked, but for the steps named in ``fails``."""

    def __init__(self, config: Settings) -> None:
        super().__init__(config)
        self.fails: dict[str, HdcsError] = {}
        self.held_by = "source"
        self.done: list[str] = []

    def _report(self, step: dict[str, Any], result: dict[str, Any] | None) -> dict[str, Any]:
        name, spec = step["name"], self.spec(step)
        self.done.append(name)
        if name == "vm.move_prepare_on_node":
            step = step | {"name": "vm.migrate_prepare_on_node"}
        report = super()._report(step, self._result(name, spec) if result is None else result)
        if name in self.fails:
            return {k: v for k, v in report.items() if k != "result"} | {"error": self.fails.pop(name).to_dict()}
        self._give_back(name, spec, report["node"])
        return report

    def _result(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        if name in ("vm.migrate_on_node", "vm.move_on_node"):
            return dict(FIGURES)
        if name.endswith(("look_on_node", "undo_on_node")):
            return {"held_by": self.held_by}
        if name == "vm.save_on_node":
            return {"bytes": 99}
        if name == "vm.offer_on_node":
            files = [{"path": p, "size_bytes": 9, "sha256": "0" * 64, "allocated_bytes": 9} for p in spec["paths"]]
            return {"node": "played", "address": "10.0.0.1", "root": "/srv/hdcs", "files": files}
        if name in ("vm.fetch_on_node", "image.copy_on_node"):
            return {"bytes": 9, "seconds": 0.1, "resumed": False}
        return {}

    def _give_back(self, name: str, spec: dict[str, Any], node: str) -> None:
        """What a server node gives back in Redis when it did this step."""
        undone = name.endswith("undo_on_node") and self.held_by == "source"
        if name.endswith("clean_on_node") or undone or name == "vm.save_on_node":
            for claim in self.pool.claim_of(spec["vm_id"]):
                if claim.node == node:
                    cooling = 0.0 if name == "vm.move_undo_on_node" else None
                    self.pool.release(claim.domain_node, spec["vm_id"], node, 0, cooling)

    def play_one(self) -> None:
        """Do the oldest published step."""
        step = self.steps("published")[0]
        settle(self.control, self._report(step, None))

    def started(self, name: str, **more: Any) -> dict[str, Any]:
        self.clone(name, **more)
        self.cloud.vms[name].start()
        self.play()
        return self.vm(name)

    def vm(self, name: str) -> dict[str, Any]:
        return dict(self.cloud.vms[name].show())

    def lose(self, name: str) -> None:
        with self.control.transaction() as tx:
            node = tx.session.get_one(ServerNode, name)
            move(node, ServerNodeState.LOST)
            domain_node = node.domain_node
        self.pool.remove_node(domain_node, name, force=True)

    def publish_now(self) -> None:
        """What waits for its next attempt gets it now."""
        with self.control.transaction() as tx:
            for step in self.steps("parked"):
                row = tx.session.get_one(Step, step["id"])
                row.not_before = row.created_at
        recovery_sweep(self.control)


P = TypeVar("P", bound=Played)


@contextmanager
def made_center(of: type[P], redis_service: RedisServer, tmp_path: Path) -> Iterator[P]:
    """East (node1, node2) with image mini, and west (node3, node4)."""
    redis.Redis.from_url(redis_service.url).flushall()
    capacity = CapacitySettings(
        host_reserve_mib=0, overhead_mib=0, overhead_per_vcpu_mib=0, overhead_graphics_mib=0, overhead_ratio=0,
    )  # fmt: skip
    config = Settings(
        redis_url=redis_service.url, database_url=f"sqlite:///{tmp_path}/hdcs.sqlite", state_dir=tmp_path,
        capacity=capacity, port_cooling_s=0, attempts_max=1,
    )  # fmt: skip
    made = of(config)
    for name in ("node1", "node2"):
        made.node("east", name, 1024)
    made.cloud.images.add("mini", "/srv/mini.qcow2", domain_nodes=["east"])
    made.play(result={"sha256": "0" * 64, "virtual_size_bytes": GIB, "file_bytes": 2**20})
    for name in ("node3", "node4"):
        made.node("west", name, 1024)
    yield made
    made.control.store.dispose()


@pytest.fixture
def center(redis_service: RedisServer, tmp_path: Path) -> Iterator[Played]:
    with made_center(Played, redis_service, tmp_path) as made:
        yield made


def consistent(center: Played) -> None:
    """Claims, ports and promises of storage are the record's, in every domain node; nothing is under way."""
    assert center.cloud.operations.list(live=True) == []
    tidy_sweep(center.control)
    vms = center.cloud.vms.list()
    held = center.control.reservations.dump().pools
    for name, pool in held.items():
        here = [vm for vm in vms if vm["home"] == name]
        assert set(pool.disks) == {vm["id"] for vm in here}
        assert {(c.vm, c.node) for c in pool.claims} == {
            (vm["id"], vm["server_node"]) for vm in here if vm["server_node"]
        }
        cooling = center.control.reservations.ports.cooling(name)
        ports = {vm: port for vm, port in pool.ports.items() if vm not in cooling}
        assert ports == {vm["id"]: vm["port"] for vm in here if vm["port"]}


@pytest.mark.parametrize("to", ["west", "node4"])
def test_a_live_move_changes_home_port_and_promises_in_one_go(center: Played, to: str) -> None:
    before = center.started("a")
    operation = center.cloud.vms["a"].migrate(to)
    center.done.clear()
    center.play()
    assert center.done == [
        "image.copy_on_node", "vm.move_prepare_on_node", "vm.move_on_node", "vm.move_finish_on_node",
        "vm.move_clean_on_node",
    ]  # fmt: skip
    found = operation.result()
    after = center.vm("a")
    assert (after["state"], after["home"], after["mac"]) == ("running", "west", before["mac"])
    assert to in ("west", after["server_node"])
    assert found["downtime_ms"] == 50 and found["next_backup"] == "full" and found["image_bytes"] == 9
    consistent(center)
    back = center.cloud.vms["a"].migrate("east")
    center.done.clear()
    center.play()
    assert back.result()["domain_node"] == "east" and "image.copy_on_node" not in center.done
    consistent(center)


STEPS = ["image.copy_on_node", "vm.move_prepare_on_node", "vm.move_on_node"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [HypervisorRefused("no space left"), Cancelled("cancelled by request")])
def test_a_live_move_that_fails_leaves_the_vm_as_it_was(center: Played, step: str, error: HdcsError) -> None:
    before = center.started("a")
    center.fails[step] = error
    operation = center.cloud.vms["a"].migrate("west")
    center.play()
    assert operation.state == ("cancelled" if isinstance(error, Cancelled) else "failed")
    after = center.vm("a")
    assert {k: after[k] for k in ("state", "home", "server_node", "port", "ip")} == {
        k: before[k] for k in ("state", "home", "server_node", "port", "ip")
    }
    assert not operation.show()["needs_operator"]
    consistent(center)


@pytest.mark.parametrize("where", ["source", "target"])
@pytest.mark.parametrize("to", ["west", "node2", "node1"])
def test_an_end_nobody_saw_is_looked_for_at_both_ends(center: Played, where: str, to: str) -> None:
    before = center.started("a")
    if to == before["server_node"]:
        to = "node1" if to == "node2" else "node2"
    between = to == "west"
    kind = "move" if between else "migrate"
    center.fails[f"vm.{kind}_on_node"] = OutcomeUnknown("libvirtd went away")
    center.held_by = where
    operation = center.cloud.vms["a"].migrate(to)
    center.play()
    after = center.vm("a")
    if where == "source":
        assert operation.state == "failed" and after["server_node"] == before["server_node"]
    else:
        assert operation.state == "done" and after["server_node"] != before["server_node"]
        assert after["home"] == ("west" if between else "east")
    assert after["state"] == "running"
    consistent(center)


def test_a_lost_target_is_not_waited_for(center: Played) -> None:
    before = center.started("a")
    center.fails["vm.move_on_node"] = HypervisorRefused("no route to host")
    operation = center.cloud.vms["a"].migrate("node3")
    while center.steps("published")[0]["name"] != "vm.move_on_node":
        center.play_one()
    center.play_one()
    assert center.steps("published")[0]["name"] == "vm.move_undo_on_node"
    center.lose("node3")
    recovery_sweep(center.control)
    assert center.steps("published")[0]["name"] == "vm.discard_on_node", "another server node removes what it left"
    center.play()
    assert operation.state == "failed" and not operation.show()["needs_operator"]
    assert center.vm("a")["server_node"] == before["server_node"] and center.vm("a")["state"] == "running"
    consistent(center)


@pytest.mark.parametrize("step", ["vm.move_finish_on_node", "vm.discard_on_node"])
def test_a_cancel_that_comes_too_late_changes_nothing(center: Played, step: str) -> None:
    live = step != "vm.discard_on_node"
    center.started("a") if live else center.clone("a")
    operation = center.cloud.vms["a"].migrate("west")
    while center.steps("published")[0]["name"] != step:
        center.play_one()
    operation.cancel()
    recovery_sweep(center.control)
    center.play()
    assert operation.state == "done" and center.vm("a")["home"] == "west"
    assert center.vm("a")["state"] == ("running" if live else "stopped")
    consistent(center)


@pytest.mark.parametrize("fails", ["", "vm.offer_on_node", "vm.fetch_on_node"])
@pytest.mark.parametrize("runs", [False, True])
def test_carried(center: Played, fails: str, runs: bool) -> None:
    center.started("a") if runs else center.clone("a")
    if fails:
        center.fails[fails] = HypervisorRefused("no")
    operation = center.cloud.vms["a"].migrate("west", live=not runs)
    center.play()
    after = center.vm("a")
    assert after["state"] == ("running" if runs else "stopped")
    assert after["home"] == ("east" if fails else "west")
    assert operation.state == ("failed" if fails else "done")
    if not fails and runs:
        assert operation.result()["downtime_ms"] >= 0
    consistent(center)


@pytest.mark.parametrize("cut", ["vm.save_on_node", "vm.offer_on_node", "vm.fetch_on_node"])
@pytest.mark.parametrize("room", [True, False])
def test_an_offline_move_that_is_cancelled_goes_on_where_it_was(center: Played, cut: str, room: bool) -> None:
    """On the server node it came from if that has room, with the port it had, however long its files travelled."""
    for name in ("a", "beside"):  # so that whoever has no wish goes to node1: the emptiest
        center.clone(name)
        center.cloud.vms[name].start(node="node2")
        center.play()
    before = center.vm("a")
    operation = center.cloud.vms["a"].migrate("west", live=False)
    while center.steps("published")[0]["name"] != cut:
        center.play_one()
    if cut != "vm.save_on_node":
        assert center.control.reservations.ports.reclaim("east") == 0, "its port goes to whoever comes next"
    if not room:
        center.cloud.server_nodes.drain("node2", move=False)
    operation.cancel()
    if cut == "vm.fetch_on_node":
        center.fails[cut] = Cancelled("cancelled by request")
    center.play()
    after = center.vm("a")
    assert operation.state == "cancelled" and (after["state"], after["home"]) == ("running", "east")
    assert (after["server_node"], after["port"]) == ("node2" if room else "node1", before["port"])
    consistent(center)


def test_saved_and_restored_inside_a_domain_node(center: Played) -> None:
    before = center.started("a")
    operation = center.cloud.vms["a"].migrate(live=False)
    center.play()
    after = center.vm("a")
    assert operation.result()["way"] == "saved" and after["state"] == "running"
    assert after["server_node"] != before["server_node"]
    consistent(center)


def test_a_stopped_one_needs_no_move(center: Played) -> None:
    center.clone("a")
    done = center.cloud.vms["a"].migrate("node2", live=False).result()
    assert done["moved"] is False and "any server node" in done["why"]
    with pytest.raises(WrongState, match="it cannot migrate"):
        center.cloud.vms["a"].migrate("node2")


def test_of_a_stopped_one_no_server_node_is_kept(center: Played) -> None:
    center.clone("a")
    operation = center.cloud.vms["a"].migrate("node4")
    center.play()
    assert operation.result()["why"] == "it does not run: it starts on any server node of west, not just node4"
    center.started("b")
    operation = center.cloud.vms["b"].migrate("node4")
    center.play()
    assert "why" not in operation.result()


# --- drains


def spread(center: Played) -> list[str]:
    """Four running VMs and a stopped one; the names of those on node1."""
    for name in ("a", "b", "c", "d"):
        center.started(name)
    center.clone("off")
    return [vm["name"] for vm in center.cloud.vms.list(server_node="node1")]


def test_a_server_node_is_emptied_a_few_at_a_time(center: Played) -> None:
    there = spread(center)
    assert len(there) == 2
    plan = center.cloud.server_nodes.drain("node1", dry_run=True).explain()
    assert [(vm["name"], vm["server_node"]) for vm in plan["vms"]] == [(name, "node2") for name in there]
    operation = center.cloud.server_nodes.drain("node1", concurrency=1)
    assert len(operation.show()["children"]) == 1
    with pytest.raises(Conflict, match="being drained already"):
        center.cloud.server_nodes.drain("node1")
    center.play()
    assert operation.result() == {"moved": there, "left": []}
    assert operation.show()["percent"] == 100.0
    assert center.cloud.vms.list(server_node="node1") == []
    assert center.cloud.server_nodes.show("node1")["state"] == "draining"
    center.cloud.vms["off"].start()
    center.play()
    assert center.vm("off")["server_node"] == "node2"
    consistent(center)


def test_what_cannot_be_moved_stays_and_the_drain_says_why(center: Played) -> None:
    there = spread(center)
    center.fails["vm.migrate_on_node"] = HypervisorRefused("QEMU said no")
    operation = center.cloud.server_nodes.drain("node1")
    center.play()
    with pytest.raises(Conflict, match="1 of 2 VMs could not be moved off node1") as caught:
        operation.result()
    assert list(caught.value.details["left"].values()) == ["QEMU said no"]
    assert len(caught.value.details["moved"]) == len(there) - 1
    again = center.cloud.server_nodes.drain("node1")
    center.play()
    assert again.result()["left"] == []
    consistent(center)


def test_resume_ends_a_drain_and_what_has_begun_goes_on(center: Played) -> None:
    there = spread(center)
    operation = center.cloud.server_nodes.drain("node1", concurrency=1)
    center.cloud.server_nodes.resume("node1")
    assert operation.state == "running", "one move is under way"
    center.play()
    assert operation.state == "cancelled"
    assert [vm["name"] for vm in center.cloud.vms.list(server_node="node1")] == there[1:]
    assert center.cloud.server_nodes.show("node1")["state"] == "up"
    consistent(center)


def test_a_busy_vm_has_its_turn_later(center: Played) -> None:
    (first, _) = spread(center)
    center.cloud.vms[first].suspend()
    operation = center.cloud.server_nodes.drain("node1")
    assert [child["subject"] for child in operation.show()["children"]] != [first]
    center.play()
    drain_sweep(center.control)
    center.play()
    assert operation.state == "done" and center.vm(first)["state"] == "suspended"
    assert center.vm(first)["server_node"] == "node2"
    consistent(center)


def test_a_domain_node_is_emptied_of_stopped_ones_too(center: Played) -> None:
    spread(center)
    operation = center.cloud.domain_nodes.drain("east", concurrency=3)
    with pytest.raises(NoCapacity, match="draining"):
        center.cloud.vms.clone("mini", name="new", profile="tiny", domain_node="east")
    center.play()
    assert sorted(operation.result()["moved"]) == ["a", "b", "c", "d", "off"]
    assert {vm["home"] for vm in center.cloud.vms.list()} == {"west"}
    center.node("east", "node5", 1024)
    assert center.cloud.server_nodes.show("node5")["state"] == "draining", "a node that joins is closed too"
    consistent(center)
    assert center.cloud.domain_nodes.resume("east")["draining"] is False
    assert center.cloud.server_nodes.show("node1")["state"] == "up"


def test_a_full_data_center_says_who_stays(center: Played) -> None:
    spread(center)
    for name in ("node3", "node4"):
        pool_control.set_node_rules(center.control, name, host_reserve_mib=1024)
    plan = center.cloud.domain_nodes.drain("east", dry_run=True).explain()
    assert not plan["fits"] and "4 of 5 VMs would stay" in plan["refusal"]["message"]
    operation = center.cloud.domain_nodes.drain("east")
    center.play()
    with pytest.raises(Conflict, match="4 of 5 VMs could not be moved off east"):
        operation.result()
    assert center.vm("off")["home"] == "west"
    consistent(center)


def test_a_drains_dry_run_counts_what_goes_before(center: Played) -> None:
    """Each alone would find room; together they do not."""
    first, second = spread(center)
    pool_control.set_node_rules(center.control, "node2", host_reserve_mib=1024 - 3 * 128)  # two run there
    plan = center.cloud.server_nodes.drain("node1", dry_run=True).explain()
    assert [(vm["name"], vm["server_node"]) for vm in plan["vms"]] == [(first, "node2"), (second, None)]
    assert "1 of 2 VMs would stay: no server node of east fits" in plan["refusal"]["message"]
    for name, fit in (("node3", 2), ("node4", 1)):
        pool_control.set_node_rules(center.control, name, host_reserve_mib=1024 - fit * 128)
    plan = center.cloud.domain_nodes.drain("east", dry_run=True).explain()
    placed = sorted(str(vm["server_node"]) for vm in plan["vms"] if vm["name"] != "off")
    assert placed == ["None", "node3", "node3", "node4"]
    operation = center.cloud.server_nodes.drain("node1")
    center.play()
    states = {child["subject"]: child["state"] for child in operation.show()["children"]}
    assert states == {first: "done", second: "running"}, "the drain itself finds the same: one waits for room"


def test_a_server_node_that_is_lost_cannot_be_emptied(center: Played) -> None:
    spread(center)
    center.lose("node1")
    operation = center.cloud.server_nodes.drain("node1")
    assert operation.state == "failed"
    assert "which is lost" in str(operation.show()["error"]["message"])
    with pytest.raises(Unreachable):
        center.cloud.vms[center.cloud.vms.list(server_node="node1")[0]["name"]].migrate()
