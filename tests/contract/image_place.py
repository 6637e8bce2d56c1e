"""Two domain nodes with real storages under a real control plane, for the contract tests of images.

Every step that needs no libvirt runs as on a server node, with the real qemu-img. Copies between storages, which travel
over libvirt, are made by the test's own hand; so is what a server node would report of a VM's new disk.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.handles.images import Images
from hdcs_tasks.handles.operation import Operation
from hdcs_tasks.hypervisor import storage
from hdcs_tasks.image import node, node_export, node_import
from hdcs_tasks.operations.node import NodeContext, Run
from hdcs_tasks.operations.recovery import settle
from hdcs_tasks.pool.profiles import ensure_built_in
from hdcs_tasks.reservations import PoolNode
from hdcs_tasks.states import ServerNodeState
from hdcs_tasks.store.models import DomainNode, ServerNode, Step
from hdcs_tasks.vm import node as vm_node
from tests.contract.desk import Desk

MIB = 1 << 20
GIB = 1 << 30
Handler = Callable[[Run, dict[str, Any]], dict[str, Any]]
REAL: dict[str, Handler] = {
    "image.add_on_node": node.add,
    "image.delete_on_node": node.delete,
    "image.import_on_node": node_import.bring_in,
    "image.probe_on_node": node_import.probe,
    "image.export_on_node": node_export.export,
    "image.check_export_on_node": node_export.check,
    "vm.clone_on_node": vm_node.clone,
}
QUEUES = ("east", "west", "east@node1.dq2", "west@node3.dq2")


def tool(*argv: object) -> None:
    subprocess.run([str(a) for a in argv], check=True, capture_output=True)


class ImagePlace:
    """``east`` (node1, 20 GiB free) and ``west`` (node3, 10 GiB free). ``fails``: step → error it raises;
    ``before``: what happens between a step's claim and its work."""

    def __init__(self, desk: Desk, root: Path) -> None:
        self.desk, self.control = desk, desk.control
        self.images = Images(desk.control, "tester")
        self.fails: dict[str, HdcsError] = {}
        self.before: Callable[[], object] = lambda: None
        self.roots = {name: root / name for name in ("east", "west")}
        self.outside = root / "outside"
        self.outside.mkdir(parents=True)
        with desk.control.store.session() as session:
            session.add(DomainNode(name="west", token_key="k", port_first=21000, port_last=21999))
            session.flush()
            session.add(ServerNode(
                name="node3", domain_node="west", state=ServerNodeState.UP, ip="127.0.0.1", subnet="10.1.0.0/24",
                instance="i", facts={}, vcpus=8, memory_mib=8192,
            ))  # fmt: skip
            for name, free in (("east", 20 * GIB), ("west", 10 * GIB)):
                row = session.get_one(DomainNode, name)
                row.storage_total_bytes, row.storage_free_bytes = 100 * GIB, free
        self.contexts: dict[str, NodeContext] = {}
        for name, server_node in (("east", "node1"), ("west", "node3")):
            self.roots[name].mkdir()
            storage.prepare(self.roots[name], name)
            self.contexts[name] = self._context(name, server_node)
        ensure_built_in(desk.control)

    def _context(self, domain_node: str, server_node: str) -> NodeContext:
        made = self.desk._node(server_node, self.roots[domain_node].parent / "nodes")
        made.settings = made.settings.model_copy(update={
            "storage_root": self.roots[domain_node], "domain_node": domain_node, "server_node": server_node,
            "import_paths": str(self.outside), "export_paths": str(self.outside),
        })  # fmt: skip
        reservations = self.control.reservations
        reservations.pool.put_node(domain_node, PoolNode(server_node, 64, 65536, f"10.{len(self.contexts)}.0.0/22"))
        first = 20000 + 1000 * len(self.contexts)
        reservations.ports.set_range(domain_node, first, first + 999)
        return made

    def close(self) -> None:
        for context in self.contexts.values():
            context.celery.close()

    # --- files

    def disk(self, path: Path, fmt: str = "qcow2", mib: int = 8, pattern: int = 1) -> Path:
        tool("qemu-img", "create", "-q", "-f", fmt, path, f"{mib}M")
        tool("qemu-io", "-f", fmt, "-c", f"write -q -P {pattern} 1M 1M", path)
        return path

    def file(self, name: str, domain_node: str = "east", **more: Any) -> Path:
        """A disk in the import folder."""
        return self.disk(self.roots[domain_node] / "import" / name, **more)

    def image(self, version: int = 1, domain_node: str = "east", name: str = "mini") -> Path:
        return self.roots[domain_node] / "images" / name / f"{version}.qcow2"

    def everything(self) -> list[str]:
        """Files and folders of both storages' images/ and export/."""
        return sorted(
            str(path.relative_to(root.parent))
            for root in self.roots.values() for kind in ("images", "export") for path in (root / kind).rglob("*")
        )  # fmt: skip

    # --- images that are there

    def add(self, name: str = "mini", *, domain_nodes: tuple[str, ...] = ("east",), **more: Any) -> Operation:
        """Import a new version there."""
        number = len(list(self.outside.iterdir()))
        path = self.disk(self.outside / f"{name}-{number}.qcow2", **more)
        operation = self.images.import_(name, str(path), domain_nodes=domain_nodes)
        self.work()
        assert operation.state == "done", operation.show()
        return Operation(self.control, operation.id)

    def row(self, name: str = "mini", version: int = 1) -> dict[str, Any]:
        return next(i for i in self.images.list() if (i["name"], i["version"]) == (name, version))

    # --- steps

    def work(self, *, but: str = "") -> list[str]:
        """Deliver, execute and settle until nothing waits; the steps, in order. ``but``: leave this step's message."""
        done: list[str] = []
        while True:
            found = [(queue, message) for queue in QUEUES for message in self.desk.messages(queue)]
            if not found:
                return done
            for queue, message in found:
                name = self.name_of(message["step"])
                if name == but:
                    continue
                done.append(name)
                context = self.contexts[queue.split("@")[0]]
                self.desk.nodes["here"] = context
                self.desk.work(message, self._handler(name), "here")
            while messages := self.desk.messages("control"):
                for message in messages:
                    settle(self.control, message["report"])

    def name_of(self, step_id: str) -> str:
        with self.control.store.read() as session:
            return session.get_one(Step, step_id).name

    def _handler(self, name: str) -> Handler:
        def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
            self.before()
            if name in self.fails:
                raise self.fails[name]
            return REAL[name](run, spec) if name in REAL else self._by_hand(name, spec)

        return handler

    def _by_hand(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        if name == "image.copy_on_node":
            (file,) = spec["files"]
            to = self.roots[spec["domain_node"]] / file["path"]
            to.parent.mkdir(exist_ok=True)
            source = next(r / file["path"] for r in self.roots.values() if (r / file["path"]).exists())
            shutil.copy(source, to)
            return {"bytes": to.stat().st_size}
        return {"node": "node1"}
