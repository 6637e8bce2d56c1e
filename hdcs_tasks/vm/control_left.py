"""What a VM left behind where it was: its move has ended for the VM, and is cleaned up at the source when that can be.

Whoever uses the VM does not wait for that: the operation lets go of it and goes on. Until it has ended the VM does not
come back to the place that is to be cleaned, so nothing that lies there can be taken for it, nor what it has there anew
for left over.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Conflict
from hdcs_tasks.operations.control import Tx
from hdcs_tasks.states import OperationState
from hdcs_tasks.store.models import Operation, Vm

_KNOWN = "moves_left"


def let_go(tx: Tx, operation: Operation) -> None:
    """The VM is whole at its new place: it takes other operations from now on, while this one cleans up."""
    operation.live_vm = None
    tx.session.flush()
    tx.start_waiting(operation.id)
    tx.session.info.pop(_KNOWN, None)


def _left(session: Session, vm_id: str) -> Sequence[Operation]:
    """The VM's moves that still clean up behind it. Read once per transaction: a storm asks for each of its VMs."""
    known: dict[str, list[Operation]] | None = session.info.get(_KNOWN)
    if known is None:
        known = session.info[_KNOWN] = {}
        query = select(Operation).where(
            Operation.state == OperationState.RUNNING, Operation.kind == "vm.migrate",
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
