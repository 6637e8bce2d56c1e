"""The line of a domain node: who wants to start there, in which order they come, and when they may be through.

Who has its message in the queue, or a clone in its way, stands before those that were refused and wait for room. Who is
at work is not in line any more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from hdcs_tasks.operations.control import Control
from hdcs_tasks.operations.rules import is_waiting, line_eta_s
from hdcs_tasks.states import StepState
from hdcs_tasks.store.models import Operation, Step, now

STARTS = ("vm.start_on_node", "vm.migrate_prepare_on_node")
CLONES = ("vm.clone_on_node",)
RATE_WINDOW_S = 300.0
"""How far back the line's pace is looked at."""
MEASURED = 3
"""From so many starts on, the present line's own pace counts."""
LOOKED_AT = 1000
TAKEN_WITHIN_S = 5.0
"""A move's message that lies in the queue for longer than this has a place in line."""


@dataclass(frozen=True, slots=True)
class Place:
    """One that waits. ``parked``: it was refused and waits for room, and ``why``; else its message waits in the queue.
    ``eta_s``: seconds until it may be through, by the pace of the line; None where there is nothing to go by, as for
    who waits for room."""

    operation: str
    kind: str
    subject: str
    domain_node: str
    place: int
    of: int
    parked: bool
    why: str
    since: datetime
    eta_s: float | None
    is_taken_soon: bool = False
    """A move whose message was sent just now: it is no start, and does not wait for the starts before it."""

    def shown(self) -> dict[str, Any]:
        """As an operation's view shows it."""
        what = "for room in" if self.parked else "to start in"
        return {
            "line": {"domain_node": self.domain_node, "place": self.place, "of": self.of}, "eta_s": self.eta_s,
            "phase": f"{self.place} of {self.of} in line {what} {self.domain_node}",
        }  # fmt: skip

    def row(self) -> dict[str, Any]:
        """As the line itself is listed."""
        return {
            "domain_node": self.domain_node, "place": self.place, "of": self.of, "subject": self.subject,
            "kind": self.kind, "waits_for": "room" if self.parked else "its turn", "why": self.why,
            "since_at": self.since.isoformat(), "eta_s": self.eta_s, "operation": self.operation,
        }  # fmt: skip


def line(control: Control, domain_node: str | None = None) -> list[dict[str, Any]]:
    """Who waits in this domain node, or in all of them, in order of their places."""
    with control.store.read() as session:
        queues = [domain_node] if domain_node else sorted(session.scalars(_live(select(Step.queue)).distinct()))
        return [place.row() for queue in queues for place in _places(control, session, queue)]


def places_of(control: Control, session: Session, operation_ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """Of those operations that wait: ``line``, ``eta_s`` and a ``phase`` that tells them."""
    mine = _live(select(Step.queue)).where(Step.operation_id.in_(operation_ids)).distinct()
    return {
        place.operation: place.shown()
        for queue in session.scalars(mine).all() for place in _places(control, session, queue)
        if place.operation in operation_ids and not place.is_taken_soon
    }  # fmt: skip


def _live(query: Any) -> Any:
    return query.where(
        Step.state.in_((StepState.PUBLISHED, StepState.PARKED)),
        Step.name.in_((*STARTS, *CLONES)),
        Step.sent_to.is_(None),
    )


def _places(control: Control, session: Session, queue: str) -> list[Place]:
    query = _live(select(Step, Operation)).join(Operation, Step.operation_id == Operation.id)
    found = session.execute(query.where(Step.queue == queue).order_by(Step.created_at).limit(LOOKED_AT)).all()
    waiting = [(step, operation) for step, operation in found if _wants_to_start(step, operation)]
    published = [step.id for step, _ in waiting if step.state is StepState.PUBLISHED]
    statuses = dict(zip(published, control.reservations.steps.statuses(published), strict=True)) if published else {}
    at_work = {step for step, status in statuses.items() if status is not None and (status.holder or status.done)}
    waiting = [row for row in waiting if row[0].id not in at_work]
    waiting.sort(key=lambda row: (_rank(row[0]), row[0].created_at, row[1].subject))
    pace = _pace(session, queue, [operation.created_at for _, operation in waiting])
    return [
        Place(
            operation.id, operation.kind, operation.subject, queue, number, len(waiting),
            step.state is StepState.PARKED, (step.error or {}).get("message", ""), operation.created_at,
            line_eta_s(number, *pace) if _keeps_pace(step) else None, _is_taken_soon(step),
        )
        for number, (step, operation) in enumerate(waiting, 1)
    ]  # fmt: skip


def _wants_to_start(step: Step, operation: Operation) -> bool:
    if step.name in CLONES:
        return bool(operation.request.get("start"))
    return step.state is StepState.PUBLISHED or is_waiting(step.error)


def _is_taken_soon(step: Step) -> bool:
    sent_s = (now() - (step.published_at or now())).total_seconds()
    return step.state is StepState.PUBLISHED and step.name == "vm.migrate_prepare_on_node" and sent_s < TAKEN_WITHIN_S


def _keeps_pace(step: Step) -> bool:
    """Whether it comes in at the pace of those before it: with its message in the queue, or waiting for a start to end.
    When somebody gives up room nobody knows."""
    if step.state is not StepState.PARKED:
        return True
    why = (step.error or {}).get("details", {})
    return why.get("ports") == "starts" or "starts" in why.get("counts", {})


def _rank(step: Step) -> int:
    if step.state is StepState.PARKED:
        return 2
    return 1 if step.name in CLONES else 0


def _pace(session: Session, queue: str, since: Sequence[datetime]) -> tuple[int, float]:
    """How many found room here, and in how many seconds: since the present line began, or of late."""
    at = now()
    began = min(since, default=at)
    of_late = at - timedelta(seconds=RATE_WINDOW_S)
    if began > of_late and (through := _through(session, queue, began)) >= MEASURED:
        return through, max(1.0, (at - began).total_seconds())
    return _through(session, queue, of_late), RATE_WINDOW_S


def _through(session: Session, queue: str, since: datetime) -> int:
    query = select(func.count()).select_from(Step).where(
        Step.queue == queue, Step.name == "vm.start_on_node", Step.state == StepState.DONE, Step.ended_at >= since
    )  # fmt: skip
    return int(session.scalar(query) or 0)
