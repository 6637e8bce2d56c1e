"""Run as a program: takes points of a running desk, copies points elsewhere, and sets back a stopped one, with a worker
that is killed at each place where it changes the disk, or while file systems are frozen. It opens libvirt in its
children only. Prints JSON: what each step's workers died at.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import libvirt_qemu

from hdcs_tasks.app import make_app
from hdcs_tasks.backup import node, node_copy, node_restore
from hdcs_tasks.config import Settings
from hdcs_tasks.errors import Cancelled
from hdcs_tasks.hypervisor import agent, checkpoints, disks, storage
from hdcs_tasks.hypervisor.bitmaps import bitmaps
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.pacing import Pace
from hdcs_tasks.hypervisor.repository import Repository
from hdcs_tasks.operations.node import NodeContext, Run
from tests.kills import killed_at, killed_in

NEVER = 1 << 30
FIRST, STRIDE = 1, 2
"""Every other place, beginning with the first: the lab is slow, and what a step leaves changes seldom in between."""


class Node:
    """A server node's process, as often as it is needed."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.settings = Settings(**facts["settings"])
        self.repository = Repository(self.settings.storage_root)
        self.layout = storage.StorageLayout(self.settings.storage_root)
        self.last: list[dict[str, Any]] = []
        self.chain = str(uuid.uuid4())

    def attempt(
        self, handler: Callable[..., Any], spec: dict[str, Any], step: str, number: int, *, cancel: bool = False
    ) -> NodeContext:
        ctx = NodeContext.from_settings(self.settings, make_app(self.settings))
        steps, holder = ctx.reservations.steps, f"node1:{number}"
        steps.issue(step, number)
        steps.claim(step, number, holder, "node1", 120)
        if cancel:
            steps.request_cancel(step, number)
        handler(
            Run(
                ctx, step, number, "op", holder, lambda _: None, time.monotonic() + 600, "east", time.monotonic() + 600
            ),
            spec,
        )
        return ctx

    def everywhere(
        self, handler: Callable[..., Any], prepare: Callable[[int], dict[str, Any]],
        good: Callable[[NodeContext, dict[str, Any]], None],
    ) -> list[str]:  # fmt: skip
        died: list[str] = []
        for number in itertools.count(FIRST, STRIDE):
            spec, step = prepare(number), str(uuid.uuid4())
            event = killed_at(number, lambda: self.attempt(handler, spec, step, 1))  # noqa: B023 - it runs at once
            assert killed_at(NEVER, lambda: good(self.attempt(handler, spec, step, 2), spec)) is None  # noqa: B023
            if event is None:
                return died
            died.append(event)
        raise AssertionError

    # --- taking points

    def take(self) -> list[str]:
        return self.everywhere(node.create, lambda _: self._next_point(), self._taken)

    def _next_point(self) -> dict[str, Any]:
        parent = self.last[-1] if self.last else None
        spec = {
            "server_node": None, "vm_id": self.facts["vm_id"], "point": str(uuid.uuid4()), "chain": self.chain,
            "seq": len(self.last) + 1, "kind": "increment" if parent else "full",
            "parent": parent and parent["point"], "parent_checkpoint": parent and f"hdcs-{parent['point']}",
            "image": self.facts["image"], "definition": {"name": "desk"},
        }  # fmt: skip
        self.last.append(spec)
        return spec

    def _taken(self, ctx: NodeContext, spec: dict[str, Any]) -> None:
        vm_id = self.facts["vm_id"]
        self.repository.verify(self.repository.get(vm_id, spec["point"]))
        assert list(self.repository.leftovers(vm_id)) == []
        names = set(checkpoints.checkpoint_names(ctx.host().guest(vm_id)))
        assert names <= {SEED, f"hdcs-{spec['point']}"}, names
        done = agent.exec_(ctx.host(), vm_id, ["/bin/sh", "-c", "date > /root/x; sync"], timeout_s=60)
        assert done.exit_code == 0, "its file systems are not frozen"

    def frozen(self) -> list[str]:
        """Killed between freeze and thaw: with no job yet, and with the job begun. The next attempt thaws."""
        for function, event in ((agent.freeze, "return"), (Pace.hold, "call")):
            spec, step = self._next_point(), str(uuid.uuid4())
            assert killed_in(function, event, lambda: self.attempt(node.create, spec, step, 1))  # noqa: B023
            assert killed_at(NEVER, self._is_frozen) is None
            assert killed_at(NEVER, lambda: self._taken(self.attempt(node.create, spec, step, 2), spec)) is None  # noqa: B023
        self._cancelled()
        return ["frozen", "frozen with a job", "frozen, then cancelled"]

    def _cancelled(self) -> None:
        """Killed while frozen, and then cancelled: the attempt that comes to end it undoes all of it."""
        spec, step = self._next_point(), str(uuid.uuid4())
        assert killed_in(Pace.hold, "call", lambda: self.attempt(node.create, spec, step, 1))
        assert killed_at(NEVER, self._is_frozen) is None

        def end() -> None:
            with suppress(Cancelled):
                self.attempt(node.create, spec, step, 2, cancel=True)
                raise AssertionError("it was cancelled")
            ctx = NodeContext.from_settings(self.settings, make_app(self.settings))
            done = agent.exec_(ctx.host(), self.facts["vm_id"], ["/bin/sh", "-c", "date > /root/x; sync"], timeout_s=60)
            assert done.exit_code == 0, "its file systems are not frozen"
            left = list(self.repository.leftovers(self.facts["vm_id"]))
            assert left == [], left
            names = checkpoints.checkpoint_names(ctx.host().guest(self.facts["vm_id"]))
            assert f"hdcs-{spec['point']}" not in names, names

        assert killed_at(NEVER, end) is None
        self.last.pop()

    def _is_frozen(self) -> None:
        host = NodeContext.from_settings(self.settings, make_app(self.settings)).host()
        guest = host.guest(self.facts["vm_id"])
        answer = libvirt_qemu.qemuAgentCommand(guest, json.dumps({"execute": "guest-fsfreeze-status"}), 30, 0)
        assert json.loads(answer)["return"] == "frozen", answer

    # --- setting back

    def set_back(self) -> list[str]:
        point = self.repository.points(self.facts["vm_id"])[0]
        image = self.facts["image"]

        def prepare(number: int) -> dict[str, Any]:
            vm_id = str(uuid.UUID(int=number))
            disk = self.layout.disk(vm_id)
            disk.parent.mkdir()
            base = self.layout.path("images", image["name"], f"{image['version']}.qcow2")
            disks.create_overlay(base, disk, bitmap=SEED, base_format="qcow2")
            return {
                "source_vm_id": point.vm_id, "chain": point.chain, "seq": point.seq, "point": point.id, "vm_id": vm_id,
                "image": {"name": image["name"], "version": image["version"]},
            }  # fmt: skip

        def good(_ctx: NodeContext, spec: dict[str, Any]) -> None:
            disk = self.layout.disk(spec["vm_id"])
            assert self.repository.compare(point, disk)
            assert bitmaps(disk) == {SEED: True}
            assert [p.name for p in disk.parent.iterdir()] == [disk.name]

        return self.everywhere(node_restore.restore_in_place, prepare, good)

    # --- a second copy

    def fetch(self) -> list[str]:
        """As a server node of west, out of the storage of east."""
        east, settings = self.repository, self.settings
        self.settings = settings.model_copy(update=self.facts["west"] | {"storage_root": Path(self.facts["west_root"])})
        west = Repository(self.settings.storage_root)
        points = east.points(self.facts["vm_id"])[:2]

        def prepare(_number: int) -> dict[str, Any]:
            shutil.rmtree(west.folder)
            storage.prepare(west.root, "west")
            return {
                "source_vm_id": points[0].vm_id, "points": [asdict(p) for p in points], "replace": [], "drop": [],
                "sources": self.facts["sources"], "bandwidth_mib_s": None,
            }  # fmt: skip

        def good(_ctx: NodeContext, _spec: dict[str, Any]) -> None:
            found = [p.id for p in west.points(points[0].vm_id)]
            assert found == [p.id for p in points], found
            west.verify(west.get(points[0].vm_id, points[-1].id))
            left = list(west.leftovers())
            assert left == [], left
            for point in points:
                assert west.file(point).read_bytes() == east.file(point).read_bytes()

        try:
            return self.everywhere(node_copy.fetch, prepare, good)
        finally:
            self.settings = settings


if __name__ == "__main__":
    made = Node(json.loads(Path(sys.argv[1]).read_text()))
    print(
        json.dumps(
            {
                "create": made.take(), "frozen": made.frozen(), "fetch": made.fetch(),
                "restore_in_place": made.set_back(),
            }
        )
    )  # fmt: skip
