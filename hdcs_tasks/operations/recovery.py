"""Settling what nodes report, and the sweep that finds what lost its executor. No outcome is guessed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import bindparam, func, select

from hdcs_tasks.clock import monotonic_s, now_s, random_hex
from hdcs_tasks.errors import Cancelled, HdcsError, NoCapacity, OutcomeUnknown, Unreachable, from_dict
from hdcs_tasks.logs import bound_contextvars, logger
from hdcs_tasks.operations.cancelling import gives_way, request_cancel
from hdcs_tasks.operations.control import Control, Tx
from hdcs_tasks.operations.handlers import ON_NO_ROOM
from hdcs_tasks.operations.rules import (
    REPUBLISH_AFTER_S,
    StepFacts,
    Verdict,
    attempts_spent,
    awaits_its_node,
    backoff_s,
    bears_loss_s,
    ends_with_its_node,
    is_binding,
    is_retryable,
    is_touched,
    is_waiting,
    judge,
)
from hdcs_tasks.operations.settling import advance, settle_done, settle_failed
from hdcs_tasks.reservations import StepStatus
from hdcs_tasks.routing import direct_queue, quick_queue, server_node_of
from hdcs_tasks.states import IN_POOL, OPERATION_LIVE, STEP_LIVE, OperationState, ServerNodeState, StepState
from hdcs_tasks.store import metering
from hdcs_tasks.store.models import Operation, ServerNode, Step, now
from hdcs_tasks.store.transitions import move

log = logger(__name__)

KEPT_OF_REFUSAL = ("counts", "best", "pool_why")
"""Of a refusal's details, what its operation keeps as the decision; the error has the rest."""


def settle(control: Control, report: dict[str, Any]) -> None:
    """Settle one outcome: ``{step, attempt, node, started_at, ended_at, result | error}``. Safe to repeat.

    An outcome of an older attempt is kept in the step's history and changes nothing: a newer attempt observes.
    """
    with control.transaction() as tx:
        step = tx.lock_step(report["step"])
        if step is None:
            log.warning("outcome of an unknown step", step=report["step"])
        else:
            with bound_contextvars(operation=step.operation_id, vm=step.operation.subject):
                _settle_known(tx, step, report)
        tx.after(lambda: control.reservations.steps.ack(report["step"], report["attempt"]))


def _settle_known(tx: Tx, step: Step, report: dict[str, Any]) -> None:
    _remember(step, report)
    if step.state is not StepState.PUBLISHED or report["attempt"] != step.attempt:
        return
    step.node = report["node"]
    step.started_at = datetime.fromtimestamp(report["started_at"], UTC)
    # A server node's clock may be wrong; nothing ended before it was asked for.
    ended_at = max(datetime.fromtimestamp(report["ended_at"], UTC), step.published_at or step.created_at)
    metering.happened_at(tx.session, ended_at)
    error = report.get("error")
    if error is None:
        settle_done(tx, step, report.get("result") or {})
        return
    step.error = error
    if step.operation.state is OperationState.RUNNING:
        advance(step.operation, report.get("percent", 0.0))  # was told, and the next attempt begins below it
    # A cancelled operation may end before its next attempt, but never with an outcome nobody knows.
    wanted = not _is_cancelled(step) or error["code"] == OutcomeUnknown.code
    if not wanted or not is_retryable(error):
        settle_failed(tx, step, from_dict(error))
    else:
        _retry_later(tx, step, error)


def _is_cancelled(step: Step) -> bool:
    return step.operation.cancel_asked and not is_binding(step.spec)


def _remember(step: Step, report: dict[str, Any]) -> None:
    entry = {key: report.get(key) for key in ("attempt", "node", "started_at", "ended_at", "error")}
    if entry in step.history:
        return
    kept = list(step.history)
    if is_waiting(entry["error"]) and kept and is_waiting(kept[-1].get("error")):
        # A step may wait for an hour: the newest refusal says it all.
        kept.pop()
    step.history = [*kept, entry]


def _retry_later(tx: Tx, step: Step, error: dict[str, Any]) -> None:
    """Back off. No capacity costs no attempt and ends at the deadline; anything else ends at the attempts' cap."""
    waiting = is_waiting(error)
    if waiting and now() < step.deadline_at:
        if error["code"] == NoCapacity.code or not attempts_spent(step.history):
            # Nothing was touched, or is any more: any server node may try next.
            step.node = None
        if error["code"] == NoCapacity.code:
            _wait_for_room(tx, step, error)
            return
        tx.park(step, 2.0 if error["code"] == "rebuild_pending" else 10.0, f"waits: {error['message']}")
    elif waiting or attempts_spent(step.history) >= tx.control.settings.attempts_max:
        settle_failed(tx, step, from_dict(error), needs_operator=not waiting)
    else:
        tx.park(step, backoff_s(attempts_spent(step.history)), f"retries: {error['message']}")


def _wait_for_room(tx: Tx, step: Step, error: dict[str, Any]) -> None:
    """Wait in line until freed capacity wakes the step (pool/waiting.py), at most until its deadline; unless its
    feature knows another way at once. What layer two does not place is tried again now and then."""
    operation = step.operation
    operation.decision = {key: error["details"][key] for key in KEPT_OF_REFUSAL if key in error.get("details", {})}
    other_way = ON_NO_ROOM.get(step.name)
    if other_way is not None and other_way(tx, operation, step, from_dict(error)):
        step.ended_at = now()
        move(step, StepState.FAILED)
        return
    if operation.cancel_asked and gives_way(tx, step):
        settle_failed(tx, step, Cancelled("cancelled: another operation waits for the VM"))
        return
    placed = "need" in step.spec
    delay_s = (step.deadline_at - now()).total_seconds() if placed else 10.0
    tx.park(step, delay_s, f"waits for room: {error['message']}")


def recovery_sweep(control: Control) -> dict[str, int]:
    """Publish what is due and find published steps whose executor is gone. Returns counts by verdict."""
    counts = {verdict.value: 0 for verdict in Verdict} | {"woken": 0}
    if not control.reservations.epoch.is_open():
        return counts  # Nothing may be claimed before the rebuild; attempts would be spent for nothing.
    stranded, due, published = _found(control)
    for ended_id in stranded:
        with control.transaction() as tx:
            tx.start_waiting(ended_id)
    counts["woken"] = _each(control, due, _wake)
    ids = [row.id for row in published]
    statuses = dict(zip(ids, control.reservations.steps.statuses(ids), strict=True))
    well = {row.id for row in published if _is_well(row, statuses[row.id])}
    counts[Verdict.LEAVE.value] += len(well)

    def recover(tx: Tx, step: Step) -> None:
        verdict = _recover(tx, step, statuses.get(step.id))
        counts[verdict.value] += 1

    _each(control, [step_id for step_id in ids if step_id not in well], recover)
    return counts


def _is_well(row: Any, status: StepStatus | None) -> bool:
    """Whether this attempt is in its executor's hands, or still on its way to one, and there is nothing to record of
    it: so it is with most, and to lock each of them would take a storm's sweep longer than its period."""
    if status is None or status.attempt != row.attempt or status.done or status.percent is not None:
        return False
    if status.holder is not None:
        return status.leased and status.node == row.node and (status.cancel or not row.cancel_asked)
    on_its_way = row.published_at is not None and (now() - row.published_at).total_seconds() <= REPUBLISH_AFTER_S
    return on_its_way and row.node is None and not (status.cancel or row.cancel_asked)


def wake(control: Control, step_ids: Sequence[str]) -> int:
    """Publish these parked steps; how many of them still were parked."""
    woken: list[str] = []

    def publish(tx: Tx, step: Step) -> None:
        if step.state is StepState.PARKED:
            _wake(tx, step)
            woken.append(step.id)

    _each(control, list(step_ids), publish)
    return len(woken)


def send_unheld_again(control: Control, queues: Sequence[str], since: datetime) -> int:
    """Send once more what was sent to these queues since then and nobody has taken; how many steps. The broker may have
    given it to a server node that was just cut off: the sweep would wait a minute, as a message may be on its way."""
    sent_to = func.coalesce(Step.sent_to, Step.queue).in_(queues)
    with control.store.read() as session:
        query = select(Step.id).where(Step.state == StepState.PUBLISHED, Step.published_at >= since, sent_to)
        ids = list(session.scalars(query.order_by(Step.created_at)))
    known = zip(ids, control.reservations.steps.statuses(ids), strict=True)
    unheld = [step_id for step_id, status in known if status is not None and status.holder is None]

    def send(tx: Tx, step: Step) -> None:
        if step.state is StepState.PUBLISHED:
            tx.send_again(step)

    return _each(control, unheld, send)


def _each(control: Control, ids: list[str], action: Callable[[Tx, Step], None]) -> int:
    for step_id in ids:
        try:
            with control.transaction() as tx:
                step = tx.lock_step(step_id)
                if step is not None and step.state in STEP_LIVE:
                    with bound_contextvars(operation=step.operation_id, vm=step.operation.subject):
                        action(tx, step)
        except HdcsError as error:
            log.warning("step not recovered this time", step=step_id, error=str(error))
        except Exception:  # one step that cannot be recovered must not keep the sweep from the others
            log.exception("step not recovered", step=step_id)
    return len(ids)


_WAITED_FOR = (
    select(Operation.waits_for)
    .where(Operation.waits_for.in_(select(Operation.id).where(Operation.state.not_in(OPERATION_LIVE))))
    .distinct()
)
_AT_WORK_OR_DUE = (
    select(Step.id, Step.state, Step.attempt, Step.node, Step.published_at, Operation.cancel_asked)
    .join(Operation)
    .where(
        (Step.state == StepState.PUBLISHED)
        | ((Step.state == StepState.PARKED) & (Step.not_before <= bindparam("now", type_=Step.not_before.type)))
    )
    .order_by(Step.created_at)
)


def _found(control: Control) -> tuple[list[str], list[str], list[Any]]:
    """Ended operations that others wait for still (nothing else would begin these), parked steps that are due, oldest
    first, and published steps: (id, state, attempt, node, published_at, cancel_asked)."""
    with control.store.read() as session:
        stranded = [found for found in session.scalars(_WAITED_FOR) if found is not None]
        rows = session.execute(_AT_WORK_OR_DUE, {"now": now()}).all()
    return (
        stranded, [row.id for row in rows if row.state is StepState.PARKED],
        [row for row in rows if row.state is StepState.PUBLISHED],
    )  # fmt: skip


def _wake(tx: Tx, step: Step) -> None:
    if step.state is not StepState.PARKED:
        return
    unknown = step.error is not None and step.error.get("code") == OutcomeUnknown.code
    if _is_cancelled(step) and not unknown:
        settle_failed(tx, step, Cancelled("cancelled while it waited"))
        return
    if step.error is not None and is_waiting(step.error) and now() >= step.deadline_at:
        settle_failed(tx, step, _waited_too_long(step, step.error))
        return
    _publish_where_touched(tx, step)


def _waited_too_long(step: Step, error: dict[str, Any]) -> HdcsError:
    waited = f"waited {(step.deadline_at - step.created_at).total_seconds():.0f} s for room: "
    return from_dict(error | {"message": waited + error["message"].removeprefix(waited)})


def _recover(tx: Tx, step: Step, status: StepStatus | None, *, looked_now: bool = False) -> Verdict:
    if step.state is not StepState.PUBLISHED or step.published_at is None:
        return Verdict.LEAVE
    known = status is not None and status.attempt == step.attempt
    if not looked_now and not (known and status is not None and status.leased):
        # What was read before the sweep came to this step may be long over.
        return _recover(tx, step, tx.control.reservations.steps.status(step.id), looked_now=True)
    if status is not None and known:
        _observe(step, status)
        if status.cancel and status.holder is None and not status.done:
            settle_failed(tx, step, Cancelled("cancelled before it began"))
            return Verdict.LEAVE
        if _is_cancelled(step) and not status.cancel:
            # The flag was set while Redis was away, or was lost with it or with the last attempt.
            request_cancel(tx.control.reservations, step.id, step.attempt, is_touched(step.attempt, step.node))
    leased = known and status is not None and status.leased
    if ends_with_its_node(step.spec) and not leased and _is_lost(tx, step):
        where = f"server node {step.node}" if step.node else f"every server node of domain node {step.queue}"
        words = f"{where} was lost before {step.name} had ended"
        step_id, attempt = step.id, step.attempt
        # Before what comes instead is published: an executor that comes to again finds its claim gone.
        tx.after(lambda: tx.control.reservations.steps.close(step_id, attempt))
        settle_failed(tx, step, Unreachable(words, next="Bring it back: hdcs node list"))
        return Verdict.LEAVE
    if not leased:
        _tell_whom_it_waits_for(tx, step)
    verdict = judge(_facts(tx, step, status if known else None))
    if verdict is Verdict.SEND_AGAIN:
        tx.send_again(step)
    elif verdict is Verdict.NEW_ATTEMPT:
        _new_attempt(tx, step)
    elif verdict is Verdict.GIVE_UP:
        error = from_dict({
            "code": OutcomeUnknown.code,
            "message": f"{step.name} was tried {attempts_spent(step.history) + 1} times; each ended without an outcome",
            "next": f"Look at server node {step.node or '?'} and its log, then: hdcs op show {step.operation_id}",
        })  # fmt: skip
        settle_failed(tx, step, error, needs_operator=True)
    return verdict


def _is_lost(tx: Tx, step: Step) -> bool:
    """Whether nobody may be waited for any longer: the step's server node is lost, or was removed from the record; or
    nobody took it in time, and of its domain node no server node is up."""
    name = step.node or server_node_of(step.queue)
    if name is None:
        up = select(ServerNode.name).where(ServerNode.domain_node == step.queue, ServerNode.state.in_(IN_POOL)).limit(1)
        return now() >= step.deadline_at and tx.session.scalar(up) is None
    node = tx.session.get(ServerNode, name)
    if node is None:
        return True
    borne_s = 0.0 if step.operation.cancel_asked else bears_loss_s(step.spec)
    lost = node.state is ServerNodeState.LOST and (now() - node.state_at).total_seconds() >= borne_s
    return lost and not awaits_its_node(step.spec)


def _tell_whom_it_waits_for(tx: Tx, step: Step) -> None:
    """An operation whose server node is away says so, instead of how far it had come."""
    node = tx.session.get(ServerNode, step.node) if step.node else None
    if node is not None and node.state not in IN_POOL and not step.operation.phase.startswith("cancelling"):
        step.operation.phase = f"waits for server node {node.name} ({node.state.value})"


def _facts(tx: Tx, step: Step, status: StepStatus | None) -> StepFacts:
    at = now()
    done = status is not None and status.done
    if done and step.finished_seen_at is None:
        step.finished_seen_at = at
    return StepFacts(
        spent=attempts_spent(step.history) + 1, attempts_max=tx.control.settings.attempts_max,
        known=status is not None, holder=bool(status and status.holder), leased=bool(status and status.leased),
        done=done, age_s=(at - (step.published_at or at)).total_seconds(),
        done_s=(at - (step.finished_seen_at or at)).total_seconds(), lease_ttl_s=tx.control.settings.lease_ttl_s,
    )  # fmt: skip


def _observe(step: Step, status: StepStatus) -> None:
    if status.node and status.holder:
        step.node = status.node
    if step.operation.state is OperationState.RUNNING and status.percent is not None:
        advance(step.operation, status.percent)
        step.operation.phase = (status.phase or step.name)[:255]


def _new_attempt(tx: Tx, step: Step) -> None:
    error = {"code": OutcomeUnknown.code, "message": "executor lost"}
    lost = {"attempt": step.attempt, "node": step.node, "ended_at": now_s(), "error": error}
    step.history = [*step.history, lost]
    _publish_where_touched(tx, step)
    queue = step.sent_to or step.queue
    log.info("step published again", step=step.id, name=step.name, attempt=step.attempt, queue=queue)


def _publish_where_touched(tx: Tx, step: Step) -> None:
    """Where an attempt may have touched a server node, only that node tries again: it observes first."""
    node = tx.session.get(ServerNode, step.node) if step.node else None
    if node is None:
        tx.publish(step)
        return
    make = quick_queue if ".quick@" in step.queue else direct_queue
    tx.publish(step, queue=make(node.domain_node, node.name))


def sweep_once(
    control: Control, name: str, period_s: float, sweep: Callable[[Control], Any], *, periodic: bool = True
) -> Any:
    """Run a sweep if nobody began it just now: two beats, or a beat that repeats, are harmless. ``periodic`` False:
    it runs when something asks for it, and is never late."""
    # Of two beats one comes within this share of the period whatever lies between them; a single one that is early by
    # less than the rest loses no turn.
    if not control.reservations.leases.grant("sweep", name, random_hex(8), 0.6 * period_s):
        return None
    began_s = monotonic_s()
    answer = sweep(control)
    if periodic:
        # What has not run to its end is late, whatever the reason.
        control.reservations.samples.swept(name, now_s(), monotonic_s() - began_s, period_s)
    return answer


def live_operations(control: Control) -> list[Operation]:
    """Every operation that has not ended, oldest first."""
    with control.store.read() as session:
        query = select(Operation).where(Operation.state.in_(OPERATION_LIVE)).order_by(Operation.created_at)
        return list(session.scalars(query))
