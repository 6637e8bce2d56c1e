"""Every step of every way to move, with every fault: nothing is left under way, and record, guests and files agree.

The server nodes are played, but what they do is kept: where guests run and disks lie (``World``). A new step, or a
handler that another kind of operation shares, is tried with every fault without anybody thinking of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import HypervisorRefused, OutcomeUnknown
from hdcs_tasks.operations.recovery import settle
from hdcs_tasks.states import IN_POOL, VM_RESTS, VmState
from hdcs_tasks.store.models import ServerNode
from hdcs_tasks.store.models import Step as Record
from tests.contract.test_moves import Played, consistent, made_center
from tests.contract.test_moves_lost import sweep_in
from tests.services import RedisServer

pytestmark = pytest.mark.contract

Step = dict[str, Any]
NODES = {"node1": "east", "node2": "east", "node3": "west", "node4": "west"}


class World(Played):
    """Server nodes whose work is remembered: ``guests`` and ``disks`` say where each VM's are."""

    def __init__(self, config: Settings) -> None:
        super().__init__(config)
        self.guests: defaultdict[str, set[str]] = defaultdict(set)
        self.disks: defaultdict[str, set[str]] = defaultdict(set)

    def _report(self, step: Step, result: dict[str, Any] | None) -> dict[str, Any]:
        name, spec = step["name"], self.spec(step)
        home = step["queue"].split("@")[0]
        up = next((name for name, at in self._up().items() if at == home), None)
        vm = spec["guest"]["vm_id"] if "guest" in spec else spec.get("vm_id", "")
        if name.endswith(("look_on_node", "undo_on_node")):
            self.held_by = "source" if spec["source"]["name"] in self.guests[vm] else "target"
        report = super()._report(step | {"node": step["node"] or up}, result)
        if "error" not in report:
            self._happens(name, spec, vm, home, report["node"])
        return report

    def _happens(self, name: str, spec: dict[str, Any], vm: str, home: str, node: str) -> None:
        guests, disks = self.guests[vm], self.disks[vm]
        what = name.removeprefix("vm.").removesuffix("_on_node")
        if what in ("clone", "move_prepare", "fetch"):
            disks.add(home)
        elif what == "start":
            assert home in disks and not guests - {node}, f"{name} on {node}: guests {guests}, disks {disks}"
            guests.add(node)
        elif what in ("stop", "save"):
            guests.discard(node)
        elif what in ("migrate", "move"):
            self.guests[vm] = {spec["target"]["node"]}
        elif what in ("move_clean", "discard", "delete") or (what == "move_undo" and self.held_by == "source"):
            assert not any(NODES[guest] == home for guest in guests), f"{name} in {home}: its guest runs on {guests}"
            disks.discard(home)

    def next(self) -> Step | None:
        """The oldest step that somebody up can do."""
        up = self._up()
        for step in self.steps("published"):
            if step["node"] in up or (step["node"] is None and step["queue"] in up.values()):
                return step
        return None

    def _up(self) -> dict[str, str]:
        with self.control.store.read() as session:
            rows = session.scalars(select(ServerNode).where(ServerNode.state.in_(IN_POOL)))
            return {row.name: row.domain_node for row in rows}

    def steps(self, *states: str) -> list[Step]:
        with self.control.store.read() as session:
            rows = session.scalars(select(Record).where(Record.state.in_(states)).order_by(Record.published_at))
            return [{key: getattr(row, key) for key in ("id", "name", "queue", "node", "attempt")} for row in rows]

    def do(self, step: Step, then: Exception | None = None) -> None:
        """``then``: it does what it is asked, and this is what it reports."""
        report = self._report(step, None)
        if then is not None:
            report = {key: value for key, value in report.items() if key != "result"} | {"error": then.to_dict()}  # type: ignore[attr-defined]
        settle(self.control, report)

    def play_on(self) -> None:
        for _ in range(40):
            if (step := self.next()) is None:
                return
            self.do(step)
        raise AssertionError(f"it does not end: {self.done[-8:]}")


def refused(world: World, step: Step, operation: Any) -> None:
    world.fails[step["name"]] = HypervisorRefused("no")
    world.do(step)


def unknown(world: World, step: Step, operation: Any) -> None:
    """Done, and nobody heard of it."""
    world.do(step, OutcomeUnknown("libvirtd went away"))


def cancelled(world: World, step: Step, operation: Any) -> None:
    operation.cancel()


def deleted(world: World, step: Step, operation: Any) -> None:
    world.cloud.vms["a"].delete()


def lost(world: World, step: Step, operation: Any) -> None:
    """With its server node, which takes two minutes to be back."""
    home = step["queue"].split("@")[0]
    node = step["node"] or next(name for name, at in NODES.items() if at == home)
    world.control.reservations.steps.claim(step["id"], step["attempt"], "executor", node, ttl_s=0.001)
    world.control.settings.attempts_max = 3
    world.lose(node)
    for after_s in (0, 61, 120):
        sweep_in(world, after_s)
        world.play_on()


def bring_back(world: World) -> None:
    world.control.settings.attempts_max = 1
    for name in NODES.keys() - world._up():
        world.node(NODES[name], name, 1024)
    for after_s in (0, 4000):
        sweep_in(world, after_s)
        world.play_on()


def check(world: World, operation: Any) -> None:
    assert world.cloud.operations.list(live=True) == []
    vms = world.cloud.vms.list()
    if operation.show()["needs_operator"]:
        return
    for vm in vms:
        assert vm["state"] in VM_RESTS - {VmState.FAILED}
        assert world.guests[vm["id"]] == ({vm["server_node"]} if vm["state"] == "running" else set())
    assert {vm: at for vm, at in world.disks.items() if at} == {vm["id"]: {vm["home"]} for vm in vms}
    consistent(world)


WAYS: dict[str, Callable[[World], Any]] = {
    "live inside": lambda world: world.cloud.vms["a"].migrate(),
    "live between": lambda world: world.cloud.vms["a"].migrate("west"),
    "saved inside": lambda world: world.cloud.vms["a"].migrate(live=False),
    "carried": lambda world: world.cloud.vms["a"].migrate("west", live=False),
}


@pytest.mark.parametrize("fault", [refused, unknown, cancelled, deleted, lost])
@pytest.mark.parametrize("way", WAYS)
def test_every_step_with_every_fault(redis_service: RedisServer, tmp_path: Path, way: str, fault: Any) -> None:
    """One move after the other, each with the fault in a step that had none yet, until one has no such step."""
    tried: set[str] = set()
    with made_center(World, redis_service, tmp_path) as world:
        while True:
            world.cloud.vms.clone("mini", name="a", profile="tiny", domain_node="east", start=True)
            world.play_on()
            operation = WAYS[way](world)
            while (step := world.next()) is not None and step["name"] in tried:
                world.do(step)
            if step is not None:
                tried.add(step["name"])
                fault(world, step, operation)
            bring_back(world)
            check(world, operation)
            if step is None:
                assert operation.state == "done" and len(tried) >= 2
                return
            for vm in world.cloud.vms.list():
                world.cloud.vms[vm["name"]].delete()
            world.play_on()
            world.fails.clear()
            world.disks.clear()
