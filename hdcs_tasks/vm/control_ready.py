"""When a desktop was ready, as its own start has it: how long boots take, and how long a storm took.

A VM's ``ready_at`` belongs to whatever runs now: the next start takes it away. What is measured is kept with the step
that started the guest, once: a reboot, a migration or a worker that looks anew makes no desktop ready later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from hdcs_tasks.operations.control import Tx
from hdcs_tasks.states import StepState
from hdcs_tasks.store.models import Operation, Step, Vm

START = "vm.start_on_node"
BOOTS_LOOKED_AT = 50
_BOOT_MAX = timedelta(hours=1)
"""An agent that is heard of later after its start tells nothing about how long a boot takes."""


def note_ready(tx: Tx, vm: Vm, at: datetime, *, heard: bool) -> None:
    """The VM's agent answers, and did not before its start: note it with the VM and with the step that started it.

    ``heard``: at the moment it came up. Otherwise a worker found it up; since when is not known.
    """
    if vm.ready_at is not None:
        return
    vm.ready_at = at
    query = (
        select(Step).join(Operation, Step.operation_id == Operation.id)
        .where(Operation.vm_id == vm.id, Step.name == START).order_by(Step.created_at.desc()).limit(1)
    )  # fmt: skip
    step = tx.session.scalar(query)
    if not heard or step is None or step.ready_at is not None or step.state in (StepState.FAILED, StepState.CANCELLED):
        return
    if step.ended_at is None or at - step.ended_at < _BOOT_MAX:
        step.ready_at = at


def boots_s(session: Session, home: str | None) -> list[float]:
    """Of the newest starts (of a domain node), how long each took from its server node's work on to its agent's
    answer; seconds."""
    query = (
        select(Step.started_at, Step.ready_at)
        .where(Step.name == START, Step.state == StepState.DONE, Step.ready_at.is_not(None))
        .order_by(Step.ended_at.desc()).limit(BOOTS_LOOKED_AT)
    )  # fmt: skip
    if home:
        query = (
            query.join(Operation, Step.operation_id == Operation.id).join(Vm, Operation.vm_id == Vm.id)
            .where(Vm.home == home)
        )  # fmt: skip
    seen = [(ready - began).total_seconds() for began, ready in session.execute(query) if began and ready]
    return [boot for boot in seen if boot > 0]


def ready_by(session: Session, operations: Sequence[str]) -> Mapping[str, datetime]:
    """VM's id -> when it was ready, of those that these operations (or their children) started."""
    query = (
        select(Operation.vm_id, Step.ready_at).join(Step, Step.operation_id == Operation.id)
        .where(or_(Operation.id.in_(operations), Operation.parent_id.in_(operations)),
               Step.name == START, Step.ready_at.is_not(None))
    )  # fmt: skip
    return {vm_id: at for vm_id, at in session.execute(query) if vm_id and at}
