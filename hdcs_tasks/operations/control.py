"""The ledger at work on the control plane: open operations, publish steps, settle outcomes.

A use case runs in one transaction (``Control.transaction``); the steps it added are published after the commit. If the
process dies in between, the recovery sweep publishes them: SQL owns the operation, a message is only a wake-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from celery import Celery
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import Cancelled, Conflict, HdcsError
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.cancelling import ask_cancel
from hdcs_tasks.operations.handlers import ON_START
from hdcs_tasks.operations.lookups import (
    BY_KEY,
    LAST_SEQ,
    LIVE_ON,
    LOCKED_ABOVE,
    LOCKED_OPERATION,
    LOCKED_STEP,
    WAITING_FOR,
)  # fmt: skip
from hdcs_tasks.operations.publishing import Publisher
from hdcs_tasks.operations.rules import request_digest
from hdcs_tasks.operations.settling import child_ended
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.states import OPERATION_LIVE, OperationState, StepState
from hdcs_tasks.store.engine import Store
from hdcs_tasks.store.locks import decide_alone
from hdcs_tasks.store.models import Event, Operation, Step, Vm, new_id, now
from hdcs_tasks.store.transitions import move

log = logger(__name__)


@dataclass(frozen=True)
class Asked:
    """Who asked, why, and the key under which the same request is answered with the same operation."""

    by: str = ""
    reason: str = ""
    idempotency_key: str | None = None
    key_says_all: bool = False
    """The key names the request by itself, as a sweep's does: what it works out anew may differ the second time."""


@dataclass
class Control:
    """The control plane of one process: settings, record, reservations and the door to the queues."""

    settings: Settings
    store: Store
    reservations: Reservations
    celery: Celery
    publisher: Publisher = field(init=False)

    def __post_init__(self) -> None:
        self.publisher = Publisher(self.celery, self.reservations)

    @classmethod
    def from_settings(cls, settings: Settings, celery: Celery) -> Control:
        return cls(settings, Store.from_settings(settings), Reservations.from_settings(settings), celery)

    @contextmanager
    def transaction(self) -> Iterator[Tx]:
        """One transaction and, after its commit, its messages. An integrity error is a Conflict.

        What the use case reserved in Redis is given back when the transaction fails (``Tx.undo``).
        """
        undo: list[Callable[[], object]] = []
        try:
            with self.store.session() as session:
                tx = Tx(session, self, undo)
                yield tx
        except BaseException as error:
            for action in reversed(undo):
                _guarded(action, "not given back; the next rebuild or hdcs doctor will")
            if not isinstance(error, IntegrityError):
                raise
            raise Conflict(
                "somebody else changed the same records at the same time", next="Look again and retry",
                details={"database": str(error.orig)},
            ) from error  # fmt: skip
        tx.committed()


def _guarded(action: Callable[[], object], if_it_fails: str) -> None:
    """Run one action of several: that it fails must hide neither the first error nor stop the others."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it was, the sweeps repair it
        log.warning(if_it_fails, error=repr(error))


def busy(blocking: Operation) -> Conflict:
    """A VM's one live operation is in the way of another."""
    return Conflict(
        f"VM {blocking.subject} is busy: operation {blocking.id} ({blocking.kind}, {blocking.phase})",
        next=f"Wait for it (hdcs op watch {blocking.id}) or cancel it (hdcs op cancel {blocking.id})",
        details={"operation": blocking.id},
    )


def another_request(first: Operation, kind: str, subject: str) -> Conflict:
    """An idempotency key was given with another request before."""
    same = (kind, subject) == (first.kind, first.subject)
    return Conflict(
        f"idempotency key {first.idempotency_key!r} belongs to operation {first.id} ({first.kind} {first.subject},"
        f" {first.state}); this is {'the same with other parameters' if same else f'{kind} {subject}'}",
        next=f"Give a new request a new key; what became of the first: hdcs op show {first.id}",
        details={"operation": first.id, "kind": first.kind, "subject": first.subject},
    )


class Tx:
    """A use case's transaction: the session, and what is to happen after the commit."""

    def __init__(self, session: Session, control: Control, undo: list[Callable[[], object]]) -> None:
        self.session = session
        self.control = control
        self._undo = undo
        self._to_publish: list[Step] = []
        self._digests: dict[str, str] = {}  # of the requests of this transaction, by idempotency key
        self._opened: set[str] = set()  # operations of this transaction that have no step yet
        self._locked: list[object] = []  # the session forgets, and reads again, what nobody holds
        self._after: list[Callable[[], object]] = []

    # --- opening

    def same_request(self, asked: Asked, kind: str, subject: str, **words: Any) -> Operation | None:
        """The operation this idempotency key was already answered with; asked twice at once, the second waits.

        ``kind``, ``subject`` and ``words`` (JSON-able) are the request as it was made. Conflict where the key came with
        another one before.
        """
        if not asked.idempotency_key:
            return None
        digest = self._digests[asked.idempotency_key] = request_digest(kind, subject, words)
        decide_alone(self.session, asked.idempotency_key)
        first = self.session.scalar(BY_KEY, {"key": asked.idempotency_key})
        if first is not None and first.request_digest != digest and not asked.key_says_all:
            raise another_request(first, kind, subject)
        return first

    def known_by(self, live: Operation, asked: Asked) -> bool:
        """Whether ``live``, which does what is asked for already, can be the answer also when the same is asked again:
        it takes the request's key. One that has another key cannot."""
        if asked.idempotency_key and live.idempotency_key is None:
            live.idempotency_key = asked.idempotency_key
            live.request_digest = self._digests[asked.idempotency_key]
        return not asked.idempotency_key or live.idempotency_key == asked.idempotency_key

    def open(
        self,
        kind: str,
        *,
        asked: Asked,
        vm: Vm | None = None,
        subject: str = "",
        request: dict[str, Any] | None = None,
        parent: Operation | None = None,
        supersede: bool = False,
        behind: bool = False,
    ) -> Operation:
        """Open an operation. With a VM it becomes that VM's one live operation; else Conflict names the one in the way.

        ``supersede``: cancel what is in the way and start when it has ended; ``behind``: let that end by itself.
        """
        blocking = self._in_the_way(vm, supersede) if vm is not None else None
        if blocking is not None and not supersede:
            raise busy(blocking)
        key = None if parent else asked.idempotency_key or None
        operation = Operation(
            kind=kind, state=OperationState.QUEUED, subject=subject or (vm.name if vm else ""),
            vm_id=vm.id if vm else None, live_vm=vm.id if vm and not blocking else None,
            parent_id=parent.id if parent else None, waits_for=blocking.id if blocking else None,
            idempotency_key=key, request_digest=self._digests[key] if key else None,  # same_request comes first
            requested_by=asked.by, reason=asked.reason,
            request=request or {}, id=new_id(), phase="queued", percent=0.0, cancel_asked=False, needs_operator=False,
            created_at=now(),  # not when it is flushed: one that is refused at once has ended by then
        )  # fmt: skip
        self.session.add(operation)
        self._opened.add(operation.id)
        if parent is None or blocking is not None:
            # The children of a bulk request go to the database together: one by one they would take most of its time.
            self.session.flush()
        if parent is not None and parent.state is OperationState.QUEUED:
            move(parent, OperationState.RUNNING)
            parent.started_at = now()
            parent.phase = "children at work"
        if blocking is not None:
            operation.phase = f"waits for {blocking.kind} {blocking.id} to end"
            self.session.flush()
            if not behind:
                ask_cancel(self, blocking)
        elif kind in ON_START:
            ON_START[kind](self, operation)
        return operation

    def live_operation(self, vm: Vm) -> Operation | None:
        return self.session.scalar(LIVE_ON, {"vm": vm.id})

    def _in_the_way(self, vm: Vm, lock: bool) -> Operation | None:
        """The VM's live operation; locked, so that it cannot end before the one that waits for it is recorded."""
        found = self.live_operation(vm)
        if found is None or not lock:
            return found
        self.lock_operation(found)
        return found if found.live_vm == vm.id else None

    def lock_operation(self, operation: Operation) -> None:
        """Lock parent, then operation: everybody in this order, else two that settle would deadlock on PostgreSQL."""
        self.session.flush()
        for key in filter(None, (operation.parent_id, operation.id)):
            # Read anew: what was read before the lock may have changed while waiting for it.
            self._locked.append(self.session.scalar(LOCKED_OPERATION, {"id": key}))

    def lock_step(self, step_id: str) -> Step | None:
        """The step, locked with the operations above it and read anew; None where there is none."""
        self._locked += self.session.scalars(LOCKED_ABOVE, {"step": step_id})
        return self.session.scalar(LOCKED_STEP, {"id": step_id})

    def step(
        self, operation: Operation, name: str, queue: str, spec: dict[str, Any], *, node: str | None = None,
        patience_s: float | None = None,
    ) -> Step:  # fmt: skip
        """Add the operation's next step; it is published after the commit.

        ``patience_s``: how long it may wait for room; ``park_deadline_s`` of the settings unless said otherwise.
        """
        wait_s = self.control.settings.park_deadline_s if patience_s is None else patience_s
        deadline = now() + timedelta(seconds=wait_s)
        step = Step(
            id=new_id(), operation=operation, operation_id=operation.id, seq=self._next_seq(operation), name=name,
            queue=queue, spec=spec, node=node, state=StepState.PENDING, attempt=0, history=[], deadline_at=deadline,
        )  # fmt: skip
        self.session.add(step)
        self.publish(step)
        return step

    def _next_seq(self, operation: Operation) -> int:
        if operation.id in self._opened:
            self._opened.remove(operation.id)  # from its second step on, the record is asked
            return 1
        return 1 + (self.session.scalar(LAST_SEQ, {"operation": operation.id}) or 0)

    def publish(self, step: Step, *, queue: str | None = None) -> None:
        """Issue the step's next attempt and send it after the commit, to its own queue or this time to another."""
        step.attempt += 1
        step.published_at = now()
        step.not_before = step.finished_seen_at = None
        step.sent_to = queue
        move(step, StepState.PUBLISHED)
        operation = step.operation
        if operation.state is OperationState.QUEUED:
            move(operation, OperationState.RUNNING)
            operation.started_at = now()
        if not operation.phase.startswith("cancelling"):
            operation.phase = step.name
        self._to_publish.append(step)

    def send_again(self, step: Step) -> None:
        """Send the present attempt once more: harmless, since only one claim of an attempt succeeds."""
        step.published_at = now()
        self._to_publish.append(step)

    def park(self, step: Step, delay_s: float, why: str) -> None:
        """Set the step aside for ``delay_s``; freed capacity may wake it earlier."""
        step.not_before = now() + timedelta(seconds=delay_s)
        move(step, StepState.PARKED)
        step.operation.phase = why[:255]

    # --- ending

    def finish(self, operation: Operation, result: dict[str, Any] | None = None) -> None:
        operation.percent = 100.0
        operation.phase = "done"
        operation.result = result or {}
        self._end(operation, OperationState.DONE)

    def fail(self, operation: Operation, error: HdcsError, *, needs_operator: bool = False) -> None:
        operation.error = error.to_dict()
        operation.needs_operator = needs_operator
        cancelled = error.code == "cancelled"
        operation.phase = "cancelled" if cancelled else "failed (needs operator)" if needs_operator else "failed"
        self._end(operation, OperationState.CANCELLED if cancelled else OperationState.FAILED)

    def _end(self, operation: Operation, state: OperationState) -> None:
        move(operation, state)
        operation.ended_at = now()
        operation.live_vm = None
        told = (operation.error or {}).get("message")
        log.info("operation ended", operation=operation.id, kind=operation.kind, vm=operation.subject,
                 state=state.value, error=told)  # fmt: skip
        self.session.flush()
        self.start_waiting(operation.id)
        if operation.parent_id:
            child_ended(self, operation.parent_id)

    def start_waiting(self, ended_id: str) -> None:
        """Begin what waited for an operation that has ended or let go of its VM: the oldest; others wait for that."""
        first: Operation | None = None
        for operation in self.session.scalars(WAITING_FOR, {"ended": ended_id}).all():
            if first is not None and first.state in OPERATION_LIVE:
                operation.waits_for = first.id
                operation.phase = f"waits for {first.kind} {first.id} to end"
                continue
            first = operation
            self._begin(operation)

    def _begin(self, operation: Operation) -> None:
        operation.waits_for = None
        operation.live_vm = operation.vm_id
        self.session.flush()
        if operation.cancel_asked:
            self.fail(operation, Cancelled("cancelled before it began"))
            return
        try:
            with self.part():
                ON_START[operation.kind](self, operation)
        except HdcsError as error:
            # It ends, not the one whose end it waited for.
            self.fail(operation, error)

    # --- after the commit

    @contextmanager
    def part(self) -> Iterator[None]:
        """A part of the transaction that may be refused: where the block raises, nothing of it stays, in the record, in
        Redis or among the messages, and the rest may still be committed by whoever catches the error."""
        held = [(kept, len(kept)) for kept in (self._to_publish, self._after)]
        begun = len(self._undo)
        try:
            with self.session.begin_nested():
                yield
        except BaseException:
            for action in reversed(self._undo[begun:]):
                _guarded(action, "not given back; the next rebuild or hdcs doctor will")
            del self._undo[begun:]
            for kept, length in held:
                del kept[length:]
            raise

    def undo(self, action: Callable[[], object]) -> None:
        """Run ``action`` if this transaction fails: give back what was reserved for it."""
        self._undo.append(action)

    def after(self, action: Callable[[], object]) -> None:
        """Run ``action`` after the commit, before the messages. It may fail: a sweep must be able to make up for it."""
        self._after.append(action)

    def event(self, kind: str, subject: str, message: str, **data: Any) -> None:
        self.session.add(Event(kind=kind, subject=subject, message=message, data=data))
        about = {"vm": subject} if kind.startswith("vm.") else {}
        log.info("event", kind=kind, subject=subject, message=message, **about)

    def event_hourly(self, kind: str, subject: str, message: str, **data: Any) -> None:
        """An event of something that lasts, and is seen by every sweep: told again after an hour."""
        told = select(Event.id).where(
            Event.kind == kind, Event.subject == subject, Event.at > now() - timedelta(hours=1)
        )
        if self.session.scalar(told.limit(1)) is None:
            self.event(kind, subject, message, **data)

    def committed(self) -> None:
        for action in self._after:
            _guarded(action, "not done after the commit; the sweeps make up for it")
        self.control.publisher.publish(self._to_publish)
