"""Run as a program: takes points of a running desk, and sets back a stopped one, with a worker that is killed at each
place where it changes the disk. It opens libvirt in its children only. Prints JSON: what each step's workers died at.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdcs_tasks.app import make_app
from hdcs_tasks.backup import node, node_restore
from hdcs_tasks.config import Settings
from hdcs_tasks.hypervisor import agent, checkpoints, disks, storage
from hdcs_tasks.hypervisor.bitmaps import bitmaps
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.repository import Repository
from hdcs_tasks.operations.node import NodeContext, Run
from tests.kills import killed_at

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

    def attempt(self, handler: Callable[..., Any], spec: dict[str, Any], step: str, number: int) -> NodeContext:
        ctx = NodeContext.from_settings(self.settings, make_app(self.settings))
        steps, holder = ctx.reservations.steps, f"node1:{number}"
        steps.issue(step, number)
        steps.claim(step, number, holder, "node1", 120)
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
        vm_id, chain = self.facts["vm_id"], str(uuid.uuid4())
        last: list[dict[str, Any]] = []

        def prepare(_number: int) -> dict[str, Any]:
            parent = last[-1] if last else None
            spec = {
                "server_node": None, "vm_id": vm_id, "point": str(uuid.uuid4()), "chain": chain, "seq": len(last) + 1,
                "kind": "increment" if parent else "full", "parent": parent and parent["point"],
                "parent_checkpoint": parent and f"hdcs-{parent['point']}", "image": self.facts["image"],
                "definition": {"name": "desk"},
            }  # fmt: skip
            last.append(spec)
            return spec

        def good(ctx: NodeContext, spec: dict[str, Any]) -> None:
            self.repository.verify(self.repository.get(vm_id, spec["point"]))
            assert list(self.repository.leftovers(vm_id)) == []
            names = set(checkpoints.checkpoint_names(ctx.host().guest(vm_id)))
            assert names <= {SEED, f"hdcs-{spec['point']}"}, names
            done = agent.exec_(ctx.host(), vm_id, ["/bin/sh", "-c", "date > /root/x; sync"], timeout_s=60)
            assert done.exit_code == 0, "its file systems are not frozen"

        return self.everywhere(node.create, prepare, good)

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


if __name__ == "__main__":
    made = Node(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps({"create": made.take(), "restore_in_place": made.set_back()}))
