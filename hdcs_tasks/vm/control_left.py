"""What a VM left behind where it was: its move has ended for the VM, and is cleaned up at the source when that can be.

Whoever uses the VM does not wait for that: the operation lets go of it and goes on. Until it has ended the VM does not
come back to the place that is to be cleaned, so nothing that lies there can be taken for it, nor what it has there anew
for left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Cancelled, Conflict, HdcsError, Unreachable
from hdcs_tasks.operations.control import Asked, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed, on_start
from hdcs_tasks.states import OPERATION_LIVE, ServerNodeState
from hdcs_tasks.store.models import Operation, ServerNode, Step, Vm

CLEAN = "vm.clean"
_KNOWN = "moves_left"


def let_go(tx: Tx, operation: Operation) -> None:
    """The VM is whole at its new place: it takes other operations from now on, while this one cleans up."""
    operation.live_vm = None
    tx.session.flush()
    tx.start_waiting(operation.id)
    tx.session.info.pop(_KNOWN, None)


def clean_later(tx: Tx, vm: Vm, home: str) -> Operation:
    """No server node of ``home`` is up to remove what the VM has there and is not it (or whoever did is lost): an
    operation of its own waits for one, while the VM is used."""
    request = {"home": home, "source": None, "domain_node": vm.home, "vm_id": vm.id}
    asked = Asked(by="hdcs", reason=f"files of it may lie in {home}, and no server node was up to see")
    operation = tx.open(CLEAN, asked=asked, subject=vm.name, request=request)
    operation.vm_id = vm.id
    tx.session.flush()
    tx.session.info.pop(_KNOWN, None)
    return operation


@on_start(CLEAN)
def _begin(tx: Tx, operation: Operation) -> None:
    home, name = operation.request["home"], operation.subject
    shown = {"vm": name, "pool": home}
    spec = {"shown": shown, "vm_id": operation.request["vm_id"], "name": name, "home": home}
    tx.step(operation, "vm.discard_on_node", home, spec | {"ends_with_its_node": True})


@on_done(f"{CLEAN}:vm.discard_on_node")
def _cleaned(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    reservations, home, vm_id = tx.control.reservations, operation.request["home"], operation.request["vm_id"]
    tx.after(lambda: reservations.disks.release(home, vm_id))
    tx.after(lambda: reservations.ports.cool(home, vm_id, tx.control.settings.port_cooling_s))
    tx.finish(operation)


@on_failed(f"{CLEAN}:vm.discard_on_node")
def _not_cleaned(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    node = tx.session.get(ServerNode, step.node) if step.node else None
    if error.code == Unreachable.code and (node is None or node.state is ServerNodeState.LOST):
        _begin(tx, operation)  # whoever was at it is lost, or nobody came: the next
        return
    tx.fail(operation, error, needs_operator=error.code != Cancelled.code)


def _left(session: Session, vm_id: str) -> Sequence[Operation]:
    """What still cleans up behind the VM. Read once per transaction: a storm asks for each of its VMs."""
    known: dict[str, list[Operation]] | None = session.info.get(_KNOWN)
    if known is None:
        known = session.info[_KNOWN] = {}
        query = select(Operation).where(
            Operation.state.in_(OPERATION_LIVE), Operation.kind.in_(("vm.migrate", CLEAN)),
            Operation.live_vm.is_(None), Operation.vm_id.is_not(None),
        )  # fmt: skip
        for operation in session.scalars(query):
            known.setdefault(operation.vm_id or "", []).append(operation)
    return known.get(vm_id, ())


def nodes_left(session: Session, vm: Vm) -> list[str]:
    """Server nodes that something the VM had is to be cleaned off: it is not placed there meanwhile."""
    return sorted({move.request["source"] for move in _left(session, vm.id) if move.request["source"]})


def check_left(session: Session, vm: Vm, *, node: str | None = None, home: str | None = None) -> None:
    """Conflict where the VM is to go to a server node (``node``, else that of its own pin), or a domain node, that is
    still to be cleaned of it."""
    node = node or vm.rules.get("pin")
    for move in _left(session, vm.id):
        old = move.request["home"]
        where = node if node is not None and node == move.request["source"] else None
        if home is not None and home == old != move.request["domain_node"]:
            where = home
        if where is not None:
            raise Conflict(
                f"VM {vm.name} cannot go back to {where}: what it left there is not cleaned up yet ({move.phase})",
                next=f"Wait for its last move to end: hdcs op watch {move.id}", details={"operation": move.id},
            )  # fmt: skip
