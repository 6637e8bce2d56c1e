"""Rebalancing: a plan of live migrations that evens the load of a pool, and its run: ordinary migrations, N at once."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import HdcsError, Invalid, WrongState
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_child_ended
from hdcs_tasks.pool import balance_rules
from hdcs_tasks.pool import rules as pool_rules
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.pool.rooms import candidate, vm_shape, vm_terms
from hdcs_tasks.states import OPERATION_LIVE, VmState
from hdcs_tasks.store.models import Operation, Vm
from hdcs_tasks.vm.control import get_vm
from hdcs_tasks.vm.control_migrate import open_move
from hdcs_tasks.vm.move_rules import MoveOptions

MOVES = 100
"""Migrations a plan has at most, unless asked otherwise."""
AT_ONCE = 2


def plan(control: Control, domain_node: str, *, max_moves: int = MOVES) -> dict[str, Any]:
    """What ``rebalance`` would do now: ``{domain_node, fits, message, before, after, moves}``.

    ``before``, ``after``: ``{score, memory, vcpus, n_plus_one}`` as balance_rules tells them; ``moves``: ``[{vm, from,
    to, memory_mib, vcpus, score}]``, in order. Raises NotFound, Invalid.
    """
    _check("moves", max_moves, 10_000)
    with control.store.read() as session:
        room = candidate(control, session, get_domain_node(session, domain_node))
        vms = {vm.id: vm for vm in _on_nodes(session, domain_node)}
        busy = set(session.scalars(select(Operation.live_vm).where(Operation.live_vm.is_not(None))))
    residents = [_resident(control, vm, vm.id in busy) for vm in vms.values()]
    found = balance_rules.rebalance(room.nodes, residents, max_moves=max_moves)
    moves = [
        {"vm": vms[move.vm].name, "from": move.source, "to": move.target, "memory_mib": vms[move.vm].memory_mib,
         "vcpus": vms[move.vm].vcpus, "score": move.score}
        for move in found.moves
    ]  # fmt: skip
    message = f"{domain_node} is even: no migration is worth it"
    if moves:
        message = f"{len(moves)} migrations: score {found.before.score:.3f} to {found.after.score:.3f}"
    return {
        "domain_node": domain_node, "message": message, "before": found.before._asdict(),
        "after": found.after._asdict(), "moves": moves,
    }  # fmt: skip


def _check(what: str, number: int, most: int) -> None:
    if not 1 <= number <= most:
        raise Invalid(f"{number} {what} is not between 1 and {most}")


def _on_nodes(session: Session, domain_node: str) -> list[Vm]:
    query = select(Vm).where(Vm.home == domain_node, Vm.server_node.is_not(None), Vm.deleted_at.is_(None))
    return list(session.scalars(query.order_by(Vm.name)))


def _resident(control: Control, vm: Vm, busy: bool) -> balance_rules.Resident:
    need = pool_rules.need_of(vm_shape(vm), control.settings.capacity)
    movable = vm.state is VmState.RUNNING and not busy
    return balance_rules.Resident(vm.id, vm.server_node or "", need, vm_terms(vm, start=False), movable, vm.vcpus)


def rebalance(
    control: Control, domain_node: str, asked: Asked, *, max_moves: int = MOVES, concurrency: int = AT_ONCE
) -> Operation:
    """Plan, and run the plan: one parent operation with a ``vm.migrate`` child per move, ``concurrency`` at once."""
    _check("at once", concurrency, 100)
    found = plan(control, domain_node, max_moves=max_moves)
    with control.transaction() as tx:
        words = {"max_moves": max_moves, "concurrency": concurrency}
        if (same := tx.same_request(asked, "pool.rebalance", domain_node, **words)) is not None:
            return same
        request = {
            "domain_node": domain_node, "concurrency": concurrency, "before": found["before"], "after": found["after"],
            "pending": [{key: move[key] for key in ("vm", "from", "to")} for move in found["moves"]],
        }  # fmt: skip
        parent = tx.open("pool.rebalance", asked=asked, subject=domain_node, request=request)
        parent.decision = {"message": found["message"], "moves": found["moves"]}
        _open_next(tx, parent)
        if not _live_children(tx, parent):
            tx.finish(parent, {"children": [], "before": found["before"], "after": found["after"]})
        return parent


@on_child_ended("pool.rebalance")
def _one_ended(tx: Tx, parent: Operation, children: list[Operation]) -> int:
    return _open_next(tx, parent)


def _open_next(tx: Tx, parent: Operation) -> int:
    """Begin moves as far as may be under way at once; what can no longer be moved as planned is passed over."""
    pending = [] if parent.cancel_asked else list(parent.request["pending"])
    free = int(parent.request["concurrency"]) - _live_children(tx, parent)
    while pending and free > 0:
        free -= _begin(tx, parent, pending.pop(0))
    parent.request = parent.request | {"pending": pending}
    return len(pending)


def _live_children(tx: Tx, parent: Operation) -> int:
    tx.session.flush()
    query = select(Operation.id).where(Operation.parent_id == parent.id, Operation.state.in_(OPERATION_LIVE))
    return len(tx.session.scalars(query).all())


def _begin(tx: Tx, parent: Operation, move: dict[str, Any]) -> bool:
    """Open one migration, if the VM still is where the plan saw it and free to move."""
    try:
        vm = get_vm(tx.session, move["vm"])
        if vm.server_node != move["from"]:
            raise WrongState(f"it is {vm.state} on {vm.server_node or 'no server node'} by now")
        asked = Asked(by=parent.requested_by, reason=parent.reason or "rebalancing")
        with tx.part():
            open_move(tx, vm, asked, to=move["to"], options=MoveOptions(live=True), parent=parent)
    except HdcsError as error:
        tx.event("pool.not_moved", move["vm"], f"VM {move['vm']} stays on {move['from']}: {error.message}")
        return False
    return True
