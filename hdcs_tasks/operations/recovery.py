"""Settling what nodes report, and the sweep that finds what lost its executor. No outcome is guessed."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from hdcs_tasks.errors import HdcsError, from_dict
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.control import Control, Tx, settle_done, settle_failed
from hdcs_tasks.operations.rules import StepFacts, Verdict, backoff_s, is_retryable, judge
from hdcs_tasks.reservations import StepStatus
from hdcs_tasks.routing import direct_queue, quick_queue
from hdcs_tasks.states import OPERATION_LIVE, STEP_LIVE, OperationState, StepState
from hdcs_tasks.store.models import Operation, ServerNode, Step, now

log = logger(__name__)


def settle(control: Control, report: dict[str, Any]) -> None:
    """Settle one outcome: ``{step, attempt, node, started_at, ended_at, result | error}``. Safe to repeat.

    An outcome of an older attempt is kept in the step's history and changes nothing: a newer attempt observes.
    """
    with control.transaction() as tx:
        step = tx.session.get(Step, report["step"], with_for_update=True)
        if step is None:
            log.warning("outcome of an unknown step", step=report["step"])
        else:
            _settle_known(tx, step, report)
        tx.after(lambda: control.reservations.steps.ack(report["step"], report["attempt"]))


def _settle_known(tx: Tx, step: Step, report: dict[str, Any]) -> None:
    _remember(step, report)
    if step.state is not StepState.PUBLISHED or report["attempt"] != step.attempt:
        return
    step.node = report["node"]
    step.started_at = datetime.fromtimestamp(report["started_at"], UTC)
    error = report.get("error")
    if error is None:
        settle_done(tx, step, report.get("result") or {})
        return
    step.error = error
    if step.operation.cancel_asked or not is_retryable(error):
        settle_failed(tx, step, from_dict(error))
    else:
        _retry_later(tx, step, error)


def _remember(step: Step, report: dict[str, Any]) -> None:
    entry = {key: report.get(key) for key in ("attempt", "node", "started_at", "ended_at", "error")}
    if entry not in step.history:
        step.history = [*step.history, entry]


def _retry_later(tx: Tx, step: Step, error: dict[str, Any]) -> None:
    """Back off. No capacity costs no attempt and ends at the deadline; anything else ends at the attempts' cap."""
    waiting = error["code"] in ("no_capacity", "rebuild_pending")
    if waiting and now() < step.deadline_at:
        # Nothing was touched: any server node may try next.
        step.node = None
        tx.park(step, 2.0 if error["code"] == "rebuild_pending" else 10.0, f"waits: {error['message']}")
    elif waiting or len(step.history) >= tx.control.settings.attempts_max:
        settle_failed(tx, step, from_dict(error), needs_operator=not waiting)
    else:
        tx.park(step, backoff_s(step.attempt), f"retries: {error['message']}")


def recovery_sweep(control: Control) -> dict[str, int]:
    """Publish what is due and find published steps whose executor is gone. Returns counts by verdict."""
    counts = {verdict.value: 0 for verdict in Verdict} | {"woken": 0}
    if not control.reservations.epoch.is_open():
        return counts  # Nothing may be claimed before the rebuild; attempts would be spent for nothing.
    counts["woken"] = _each(control, _due_ids(control), _wake)
    ids = _published_ids(control)
    statuses = dict(zip(ids, control.reservations.steps.statuses(ids), strict=True))

    def recover(tx: Tx, step: Step) -> None:
        verdict = _recover(tx, step, statuses.get(step.id))
        counts[verdict.value] += 1

    _each(control, ids, recover)
    return counts


def wake_parked(control: Control, domain_node: str) -> None:
    """Freed capacity: publish the oldest step of this domain node that waits for room."""
    with control.transaction() as tx:
        query = (
            select(Step)
            .where(Step.state == StepState.PARKED, Step.queue == domain_node, Step.node.is_(None))
            .order_by(Step.created_at)
            .limit(4)
        )
        for step in tx.session.scalars(query).all():
            tx.publish(step)


def _each(control: Control, ids: list[str], action: Callable[[Tx, Step], None]) -> int:
    for step_id in ids:
        try:
            with control.transaction() as tx:
                step = tx.session.get(Step, step_id, with_for_update=True)
                if step is not None and step.state in STEP_LIVE:
                    action(tx, step)
        except HdcsError as error:
            log.warning("step not recovered this time", step=step_id, error=str(error))
    return len(ids)


def _due_ids(control: Control) -> list[str]:
    with control.store.read() as session:
        parked = select(Step.id).where(Step.state == StepState.PARKED, Step.not_before <= now())
        return list(session.scalars(parked.order_by(Step.created_at)))


def _published_ids(control: Control) -> list[str]:
    with control.store.read() as session:
        return list(session.scalars(select(Step.id).where(Step.state == StepState.PUBLISHED)))


def _wake(tx: Tx, step: Step) -> None:
    if step.state is not StepState.PARKED:
        return
    if step.operation.cancel_asked:
        settle_failed(tx, step, from_dict({"code": "cancelled", "message": "cancelled while it waited"}))
        return
    _publish_where_touched(tx, step)


def _recover(tx: Tx, step: Step, status: StepStatus | None) -> Verdict:
    if step.state is not StepState.PUBLISHED or step.published_at is None:
        return Verdict.LEAVE
    known = status is not None and status.attempt == step.attempt
    if status is not None and known:
        _observe(step, status)
        if status.cancel and status.holder is None and not status.done:
            settle_failed(tx, step, from_dict({"code": "cancelled", "message": "cancelled before it began"}))
            return Verdict.LEAVE
    verdict = judge(
        StepFacts(
            attempt=step.attempt, attempts_max=tx.control.settings.attempts_max, known=known,
            holder=bool(known and status and status.holder), leased=bool(known and status and status.leased),
            done=bool(known and status and status.done), age_s=(now() - step.published_at).total_seconds(),
            lease_ttl_s=tx.control.settings.lease_ttl_s,
        )
    )  # fmt: skip
    if verdict is Verdict.SEND_AGAIN:
        tx.send_again(step)
    elif verdict is Verdict.NEW_ATTEMPT:
        _new_attempt(tx, step)
    elif verdict is Verdict.GIVE_UP:
        error = from_dict({
            "code": "outcome_unknown",
            "message": f"{step.name} was tried {step.attempt} times and its executor was lost each time",
            "next": f"Look at server node {step.node or '?'} and its log, then: hdcs op show {step.operation_id}",
        })  # fmt: skip
        settle_failed(tx, step, error, needs_operator=True)
    return verdict


def _observe(step: Step, status: StepStatus) -> None:
    if status.node and status.holder:
        step.node = status.node
    if step.operation.state is OperationState.RUNNING and status.percent is not None:
        steps = len(step.operation.steps)
        step.operation.percent = min(99.0, (100.0 * (step.seq - 1) + status.percent) / max(steps, 1))
        step.operation.phase = status.phase or step.name


def _new_attempt(tx: Tx, step: Step) -> None:
    error = {"code": "outcome_unknown", "message": "executor lost"}
    step.history = [*step.history, {"attempt": step.attempt, "node": step.node, "error": error}]
    _publish_where_touched(tx, step)
    log.info("step published again", step=step.id, name=step.name, attempt=step.attempt, queue=step.queue)


def _publish_where_touched(tx: Tx, step: Step) -> None:
    """Where an attempt may have touched a server node, only that node tries again: it observes first."""
    node = tx.session.get(ServerNode, step.node) if step.node else None
    if node is None:
        tx.publish(step)
        return
    make = quick_queue if ".quick@" in step.queue else direct_queue
    tx.publish(step, queue=make(node.domain_node, node.name))


def sweep_once(control: Control, name: str, period_s: float, sweep: Callable[[Control], Any]) -> Any:
    """Run a sweep if nobody ran it in this slot: two beats, or a beat that repeats, are harmless."""
    slot = int(time.time() / period_s)
    holder = f"{time.time_ns()}"
    if not control.reservations.leases.grant("sweep", f"{name}:{slot}", holder, 2 * period_s):
        return None
    return sweep(control)


def live_operations(control: Control) -> list[Operation]:
    """Every operation that has not ended, oldest first."""
    with control.store.read() as session:
        query = select(Operation).where(Operation.state.in_(OPERATION_LIVE)).order_by(Operation.created_at)
        return list(session.scalars(query))
