"""VMs leave, on the control plane: a stopped VM's disk from any server node of its home, a running one's from its."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.errors import Invalid
from hdcs_tasks.image.control_export import PATIENCE_S, ExportRequest
from hdcs_tasks.image.control_import import living_node
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.routing import direct_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Image, Operation, Vm
from hdcs_tasks.vm.control import check_given, check_reachable, get_vm


def export(control: Control, name: str, request: ExportRequest, asked: Asked, *, dry_run: bool = False) -> Operation:
    """Export a VM: it stays as it is, and is busy meanwhile. ``dry_run``: only look whether the target may be written.

    Of a running or suspended one the disk of one moment leaves; its memory does not.
    """
    kind = "vm.check_export" if dry_run else "vm.export"
    with control.transaction() as tx:
        if (same := tx.same_request(asked, kind, name, **vars(request))) is not None:
            return same
        vm = get_vm(tx.session, name)
        check_given(tx, vm, "export")
        running = vm.state is not VmState.STOPPED
        node = _node(tx.session, vm, request, running)
        image = tx.session.get(Image, vm.image_id) if vm.image_id else None
        spec = request.spec() | {
            "shown": {"vm": vm.name, "to": request.path}, "vm_id": vm.id, "name": vm.name, "running": running,
            "disk_key": vm.disk_key, **CAN_BE_ASKED_AGAIN,
            "shape": {"name": vm.name, "vcpus": vm.vcpus, "memory_mib": vm.memory_mib, "mac": vm.mac, "known": True},
            "origin": {
                "vm": vm.name, "vm_id": vm.id, "domain_node": vm.home, "profile": vm.profile,
                "image": f"{image.name}:{image.version}" if image else None,
            },
        }  # fmt: skip
        subject = f"{vm.name} to {request.path}"
        wanted = {"path": request.path, "node": node, "running": running}
        # Only looking keeps nobody from the VM.
        operation = tx.open(kind, asked=asked, vm=None if dry_run else vm, subject=subject, request=wanted)
        queue = direct_queue(vm.home, node) if node else vm.home
        tx.step(operation, f"{kind}_on_node", queue, spec, node=node if running else None, patience_s=PATIENCE_S)
        return operation


def _node(session: Any, vm: Vm, request: ExportRequest, running: bool) -> str | None:
    if request.domain_node not in (None, vm.home):
        raise Invalid(f"VM {vm.name} lives in {vm.home}, not in {request.domain_node}", next="Leave it out")
    if request.node is not None and living_node(session, request.node).domain_node != vm.home:
        raise Invalid(f"server node {request.node} is not of {vm.home}", next="Name one of its own: hdcs node list")
    if not running:
        return request.node
    if request.node not in (None, vm.server_node):
        raise Invalid(
            f"VM {vm.name} runs on {vm.server_node}: it leaves from there, not from {request.node}",
            next="Stop it first, or migrate it there",
        )
    check_reachable(session, vm)
    return vm.server_node
