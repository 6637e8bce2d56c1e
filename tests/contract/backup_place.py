"""A domain node's storage with real qcow2 files under a real control plane, for the contract tests of backups.

Every step but one runs as on a server node: restore, verify, prune, scan and delete need qemu-img only. The steps that
need libvirt are done by hand: a backup's copy is made from the VM's disk by qemu-img, and published by the repository.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import select

from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup import control_policy, node_chains, node_restore
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.hypervisor import disks, storage
from hdcs_tasks.hypervisor.checkpoints import SEED
from hdcs_tasks.hypervisor.layers import extract_layer
from hdcs_tasks.hypervisor.manifests import BaseImage, Point
from hdcs_tasks.hypervisor.repository import Repository
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.node import Run
from hdcs_tasks.operations.recovery import settle
from hdcs_tasks.reservations import PoolNode
from hdcs_tasks.states import ImageState, VmState
from hdcs_tasks.store.models import Backup, DomainNode, Image, ImageCopy, Operation, Step, Vm
from tests.contract.desk import Desk
from tests.contract.test_store import vm_row

MIB = 1 << 20
Handler = Callable[[Run, dict[str, Any]], dict[str, Any]]


def tool(*argv: object) -> str:
    return subprocess.run([str(a) for a in argv], check=True, capture_output=True, text=True).stdout


class Place:
    """Domain node east: image mini:1, VMs on it, and the test as libvirt's hand. ``fails``: step → error to raise."""

    def __init__(self, desk: Desk, root: Path) -> None:
        self.desk = desk
        self.control = desk.control
        root.mkdir()
        self.layout = storage.prepare(root, "east")
        for node in desk.nodes.values():
            node.settings = node.settings.model_copy(update={"storage_root": root})
        self.repository = Repository(root)
        self.image = root / "images" / "mini" / "1.qcow2"
        self.image.parent.mkdir()
        tool("qemu-img", "create", "-q", "-f", "qcow2", self.image, "32M")
        tool("qemu-io", "-c", "write -q -P 1 0 8M", self.image)
        self.fails: dict[str, HdcsError] = {}
        self._record()

    def _record(self) -> None:
        reservations = self.control.reservations
        reservations.pool.put_node("east", PoolNode("node1", 64, 65536, "10.128.0.0/22"))
        reservations.ports.set_range("east", 20000, 20999)
        with self.control.store.session() as session:
            east = session.get_one(DomainNode, "east")
            east.storage_total_bytes = east.storage_free_bytes = 1 << 40
            self.image_id = "image-1"
            sha256 = disks.sha256(self.image)
            session.add(Image(id=self.image_id, name="mini", version=1, sha256=sha256, virtual_size_bytes=32 * MIB))
            session.flush()
            session.add(ImageCopy(image_id=self.image_id, domain_node="east", state=ImageState.READY))

    # --- VMs

    def vm(self, name: str = "desk-01", **more: Any) -> str:
        """A stopped VM with its disk; its id."""
        with self.control.store.session() as session:
            count = len(session.scalars(select(Vm.id)).all())
            vm = vm_row(name, mac=f"52:54:00:00:01:{count:02x}", image_id=self.image_id, disk_bytes=32 * MIB, **more)
            session.add(vm)
            session.flush()
            vm_id = vm.id
        disk = self.layout.disk(vm_id)
        disk.parent.mkdir()
        disks.create_overlay(self.image, disk, bitmap=SEED, base_format="qcow2")
        return vm_id

    def write(self, vm_id: str, at_mib: int, pattern: int) -> None:
        tool("qemu-io", "-c", f"write -q -P {pattern} {at_mib}M 1M", self.layout.disk(vm_id))

    def copy(self, vm_id: str, target: Path) -> Path:
        tool("qemu-img", "convert", "-O", "raw", self.layout.disk(vm_id), target)
        return target

    def show(self, vm_id: str) -> Vm:
        with self.control.store.read() as session:
            return session.get_one(Vm, vm_id)

    # --- steps

    def take(self, vm: str, **more: Any) -> Backup:
        """Back the VM up; its newest row."""
        operation = backups.create(self.control, vm, Asked(), **more)
        self.work()
        assert self.desk.state(operation.id) == "done"
        return self.row(str(self.request(operation.id)["backup"]))

    def request(self, operation_id: str) -> dict[str, Any]:
        with self.control.store.read() as session:
            return dict(session.get_one(Operation, operation_id).request)

    def row(self, backup_id: str) -> Backup:
        with self.control.store.read() as session:
            return session.get_one(Backup, backup_id)

    def work(self, *queues: str) -> list[str]:
        """Deliver, execute and settle until nothing waits; the names of the steps executed, in order."""
        done: list[str] = []
        while True:
            queue = next(((q, m) for q in (queues or QUEUES) if (m := self.desk.messages(q))), None)
            if queue is None:
                return done
            for message in queue[1]:
                name = self._name(message["step"])
                done.append(name)
                self.desk.work(message, self._handler(name))
            self._control()

    def _control(self) -> None:
        """What the control worker does with its queue: outcomes, and the wake-up of policies."""
        while messages := self.desk.messages("control"):
            for message in messages:
                if "report" in message:
                    settle(self.control, message["report"])
                else:
                    control_policy.open_pending(self.control)

    def _name(self, step_id: str) -> str:
        with self.control.store.read() as session:
            return session.get_one(Step, step_id).name

    def _handler(self, name: str) -> Handler:
        def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
            if name in self.fails:
                raise self.fails[name]
            return REAL[name](run, spec) if name in REAL else self._by_hand(name, run, spec)

        return handler

    def _by_hand(self, name: str, run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        if name == "backup.create_on_node":
            return self._backup(spec)
        if name == "vm.start_on_node":
            return {"node": "node1", "port": 20001, "ip": "10.128.0.9"}
        if name == "vm.grow_on_node":
            disks.resize(self.layout.disk(spec["vm_id"]), spec["disk_bytes"])
            return {"node": "node1", "disk_bytes": spec["disk_bytes"]}
        if name == "vm.delete_on_node":
            shutil.rmtree(self.layout.vm_dir(spec["vm_id"]))
        return {"node": "node1"}

    def _backup(self, spec: dict[str, Any]) -> dict[str, Any]:
        vm_id, repository = spec["vm_id"], self.repository
        base = BaseImage(**spec["image"], file_bytes=self.image.stat().st_size)
        repository.bases.keep(base, self.image)
        below = repository.get(vm_id, spec["parent"]) if spec["parent"] else base
        partial = repository.partial(vm_id, spec["chain"], spec["seq"], "1")
        backing = repository.backing(below, vm_id, spec["chain"])
        extract_layer(self.layout.disk(vm_id), partial, backing, None, None, 60)
        draft = Point(
            id=spec["point"], vm_id=vm_id, chain=spec["chain"], seq=spec["seq"], parent=spec["parent"], base=base,
            kind="full" if spec["kind"] == "full" else "inc", checkpoint=f"hdcs-{spec['point']}", consistency="crash",
            checkpoint_xml="<domaincheckpoint/>", definition=spec["definition"],
        )  # fmt: skip
        made = repository.publish(partial, draft)
        return {"node": "node1", "checkpoint": made.checkpoint, "file_bytes": made.file_bytes, "manifest": asdict(made)}


QUEUES = ("east", "east@node1.dq2", "east.quick@node1.dq2")
REAL: dict[str, Handler] = {
    "backup.restore_on_node": node_restore.restore,
    "backup.verify_on_node": node_chains.verify,
    "backup.extract_on_node": node_restore.extract,
    "backup.delete_on_node": node_chains.delete,
    "backup.prune_on_node": node_chains.prune,
    "backup.scan_on_node": node_chains.scan,
}

__all__ = ["MIB", "Place", "VmState", "tool"]
