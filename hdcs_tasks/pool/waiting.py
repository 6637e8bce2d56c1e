"""The line of those that wait for room in a domain node: freed capacity wakes the oldest that fit, and only those."""

from __future__ import annotations

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from hdcs_tasks.operations.control import Control
from hdcs_tasks.operations.recovery import wake
from hdcs_tasks.operations.rules import is_waiting
from hdcs_tasks.pool import planning
from hdcs_tasks.pool.rooms import candidate, vm_shape, vm_terms
from hdcs_tasks.states import StepState
from hdcs_tasks.store.lookups import by_key
from hdcs_tasks.store.models import DomainNode, Operation, Step, Vm

PLACING = ("vm.start_on_node", "vm.migrate_prepare_on_node", "vm.move_prepare_on_node")
"""Steps that layer two places."""

LOOKED_AT = 1000

_QUEUES = select(Step.queue).where(Step.state == StepState.PARKED, Step.name.in_(PLACING)).distinct()
_WAITERS = (
    select(Step, Vm).join(Operation, Step.operation_id == Operation.id).join(Vm, Operation.vm_id == Vm.id)
    .where(Step.state == bindparam("state"), Step.queue == bindparam("queue"), Step.name.in_(PLACING))
    .order_by(Step.created_at).limit(LOOKED_AT)
)  # fmt: skip


def waiting_sweep(control: Control) -> int:
    """Look at every domain node somebody waits for; how many were woken. Makes up for a wake-up that was lost."""
    if not control.reservations.epoch.is_open():
        return 0
    with control.store.read() as session:
        names = list(session.scalars(_QUEUES))
    return sum(wake_waiting(control, name) for name in names)


def wake_waiting(control: Control, domain_node: str) -> int:
    """Publish the oldest steps of this domain node that wait for room and fit now. Returns how many.

    Room that a published step is about to take counts as taken, so that a burst of freed capacity does not wake the
    same room's worth twice.
    """
    with control.store.read() as session:
        parked = [row for row in _steps(session, domain_node, StepState.PARKED) if is_waiting(row[0].error)]
        row = by_key(session, DomainNode, domain_node)
        if not parked or row is None:
            return 0
        room = candidate(control, session, row, cooling_ports=False)
        coming = _steps(session, domain_node, StepState.PUBLISHED)
    held = control.reservations.pool.claim_counts(domain_node, [vm.id for _, vm in coming])
    unplaced = [_waiter(step, vm) for step, vm in coming if held[vm.id] < _held_when_placed(step)]
    _, room = planning.plan(room, unplaced, control.settings.capacity)
    waiters = [_waiter(step, vm) for step, vm in parked]
    chosen = planning.next_in_line(room, waiters, control.settings.capacity)
    return wake(control, chosen)


def _steps(session: Session, domain_node: str, state: StepState) -> list[tuple[Step, Vm]]:
    return [(step, vm) for step, vm in session.execute(_WAITERS, {"state": state, "queue": domain_node})]


def _is_move(step: Step) -> bool:
    return step.name != "vm.start_on_node"


def _held_when_placed(step: Step) -> int:
    """Claims a VM holds in this domain node once the step has its own."""
    return 2 if step.name == "vm.migrate_prepare_on_node" else 1


def _waiter(step: Step, vm: Vm) -> planning.Waiter:
    terms = vm_terms(
        vm, pin=step.spec.get("pin"), exclude=step.spec.get("exclude", ()), pinned=not _is_move(step),
        start=not _is_move(step),
    )  # fmt: skip
    return planning.Waiter(step.id, vm_shape(vm), terms)
