"""Executing one attempt of a step on a server node: claim, lease, fence, outcome.

claim  → the attempt is ours, or we return            (Redis, one conditional write)
lease  → a thread renews it until the step's deadline
check  → before each side effect: still ours?          (a lost lease stops the executor)
spool  → the outcome is on disk before it is sent, and is sent until control acknowledged
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery import Celery

from hdcs_tasks.clock import monotonic_s, now_s, random_hex, start_thread, wait
from hdcs_tasks.config import Settings
from hdcs_tasks.errors import Cancelled, ClaimLost, HdcsError, OutcomeUnknown, Unreachable
from hdcs_tasks.hypervisor.connection import Host, HostPool
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.sending import send
from hdcs_tasks.operations.spool import Spool
from hdcs_tasks.reservations import ClaimAnswer, Reservations
from hdcs_tasks.routing import CONTROL, direct_queue

log = logger(__name__)

OUTCOME_TASK = "operations.outcome"

Handler = Callable[["Run", dict[str, Any]], dict[str, Any]]


class HandOver(Exception):
    """Raised by a handler: another server node is to do this step. ``spec`` replaces the message's spec."""

    def __init__(self, server_node: str, spec: dict[str, Any]) -> None:
        super().__init__(server_node)
        self.server_node = server_node
        self.spec = spec


@dataclass
class NodeContext:
    """What the work of one server node process leans on."""

    settings: Settings
    celery: Celery
    reservations: Reservations
    hosts: HostPool
    spool: Spool
    pid: int = field(default_factory=os.getpid)

    @classmethod
    def from_settings(cls, settings: Settings, celery: Celery) -> NodeContext:
        spool = Spool(settings.state_dir / "spool")
        return cls(settings, celery, Reservations.from_settings(settings), HostPool(settings.libvirt_uri), spool)

    @property
    def server_node(self) -> str:
        return self.settings.server_node

    @property
    def domain_node(self) -> str:
        return self.settings.domain_node

    def host(self) -> Host:
        """The process's living connection to libvirt."""
        return self.hosts.get()

    def is_stopping(self) -> bool:
        """Whether this server node's worker was told to stop, and the time its work had to end in is over."""
        return self.settings.stopping_file.exists()


@dataclass
class Run:
    """One attempt of one step, in the hands of its executor."""

    ctx: NodeContext
    step: str
    attempt: int
    operation: str
    holder: str
    on_progress: Callable[[str], None]
    deadline: float
    queue: str
    """Where its message came from, and goes when this worker stops."""
    renewed: float
    """When the lease was last asked for and granted (s, monotonic)."""
    _stopped: threading.Event = field(default_factory=threading.Event)
    _lost: bool = False
    _cancel: bool = False
    _hand_back: bool = False
    _sent: tuple[float, float, str] = (0.0, -1.0, "")

    def check(self) -> None:
        """The fence, asked before each side effect: ClaimLost or Cancelled unless this attempt is ours right now.

        A lease that ran out by our own clock is lost, whatever Redis says: a newer attempt may have come and gone, and
        a Redis that lost its last second may know of neither.
        """
        self._lost = self._lost or self._is_overdue()
        try:
            answer = self.ctx.reservations.steps.check(self.step, self.attempt, self.holder)
        except Unreachable as error:
            raise ClaimLost(f"the claim of step {self.step} cannot be checked: {error}") from error
        if not self._lost and answer == "cancel":
            self._cancel = True
            raise Cancelled("cancelled by request")
        if self._lost or answer != "ok" or monotonic_s() > self.deadline:
            self._lost = True
            raise ClaimLost(f"step {self.step} attempt {self.attempt} is no longer ours")
        if self._hand_back:
            raise Cancelled("handed back: this worker stops")

    def cancelled(self) -> bool:
        """Whether long work should stop: cancelled, to be handed back, or the claim was lost. For callbacks; cheap."""
        return self._cancel or self._hand_back or self._lost

    def is_cancelled(self) -> bool:
        """Whether the step is to be undone: it is cancelled or handed back, and the claim is still ours."""
        return (self._cancel or self._hand_back) and not self._lost

    def progress(self, percent: float, phase: str, eta_s: float | None = None) -> None:
        """Tell how far the step is, and never less than was told before (a guest writes, and what is left of its memory
        grows); at most about twice a second reaches Redis and Flower."""
        at, last, old_phase = self._sent
        percent = max(percent, last)
        if phase == old_phase and (monotonic_s() - at < 0.5 or abs(percent - last) < 0.5):
            return
        self._sent = (monotonic_s(), percent, phase)
        try:
            self.ctx.reservations.steps.progress(self.step, self.attempt, self.holder, percent, phase, eta_s)
        except Unreachable as error:
            log.debug("progress not written", error=str(error))
        try:
            self.on_progress(f"{percent:.0f}% {phase}" + (f" (about {eta_s:.0f} s left)" if eta_s else ""))
        except Exception as error:  # noqa: BLE001 - broker errors come in many classes, and none may end the work it is about
            log.debug("progress not sent to Flower", error=str(error))

    def renew_forever(self) -> None:
        """Body of the lease thread: renew until stopped, lost, or past the deadline (a hung call must end somewhen)."""
        ttl = self.ctx.settings.lease_ttl_s
        while not wait(self._stopped, min(1.0, ttl / 6)) and monotonic_s() < self.deadline:
            self._hand_back = self._hand_back or self.ctx.is_stopping()
            self._lost = self._lost or self._is_overdue()
            if self._lost:
                return
            try:
                if monotonic_s() - self.renewed > ttl / 3:
                    self._renew(ttl)
                else:
                    self._watch()
            except Unreachable:
                continue  # until it is overdue

    def _is_overdue(self) -> bool:
        return monotonic_s() - self.renewed > self.ctx.settings.lease_ttl_s

    def _renew(self, ttl_s: float) -> None:
        asked = monotonic_s()
        if self.ctx.reservations.steps.renew(self.step, self.attempt, self.holder, ttl_s):
            self.renewed = asked
        else:
            self._lost = True

    def _watch(self) -> None:
        answer = self.ctx.reservations.steps.check(self.step, self.attempt, self.holder)
        self._cancel = self._cancel or answer == "cancel"
        self._lost = self._lost or answer == "lost"

    def stop_renewing(self) -> None:
        self._stopped.set()


def execute(
    ctx: NodeContext, name: str, handler: Handler, on_progress: Callable[[str], None],
    *, step: str, attempt: int, operation: str, spec: dict[str, Any], queue: str,
) -> str:  # fmt: skip
    """Run one message that came by ``queue``.

    Returns what became of it, for the log: claimed work ends as done, failed, handed or lost; what was not claimed is
    taken, done before, stale, missing or cancelled.
    """
    holder = f"{ctx.server_node}:{os.getpid()}:{random_hex(4)}"
    began = monotonic_s()
    answer = ctx.reservations.steps.claim(step, attempt, holder, ctx.server_node, ctx.settings.lease_ttl_s)
    if answer is ClaimAnswer.CANCELLED:
        report = _report(ctx, step, attempt, now_s(), operation, spec) | {
            "error": Cancelled("cancelled before it began").to_dict()
        }
        deliver(ctx, report)
        return "cancelled"
    if answer is not ClaimAnswer.CLAIMED:
        log.info("message without a claim: nothing to do", step=step, attempt=attempt, answer=str(answer))
        return "done before" if answer is ClaimAnswer.DONE else str(answer)
    deadline = began + min(ctx.settings.step_deadline_s, spec.get("within_s", ctx.settings.step_deadline_s))
    run = Run(ctx, step, attempt, operation, holder, on_progress, deadline, queue, renewed=began)
    start_thread(run.renew_forever, f"lease-{step[:8]}")
    log.info("step begins", step_name=name)
    ended = "without an outcome"
    try:
        ended = _work(run, name, handler, spec)
        return ended
    finally:
        run.stop_renewing()
        log.info("step ended", step_name=name, outcome=ended, took_s=round(monotonic_s() - began, 3))


def _work(run: Run, name: str, handler: Handler, spec: dict[str, Any]) -> str:
    started = now_s()
    report = _report(run.ctx, run.step, run.attempt, started, run.operation, spec)
    try:
        report["result"] = handler(run, spec)
        json.dumps(report)  # what cannot travel is the handler's error, here and now
    except HandOver as to:
        return _hand_over(run, name, to)
    except ClaimLost as error:
        log.warning("claim lost: stopped without an outcome", step=run.step, error=str(error))
        return "lost"
    except HdcsError as error:
        if run._lost:
            return "lost"
        # What a cancelled step fails with is its cancelling, unless nobody knows what it left behind.
        stopped = not isinstance(error, OutcomeUnknown) and run.is_cancelled()
        if stopped and not run._cancel:
            return _hand_back(run, name, spec)
        report["error"] = (Cancelled("cancelled by request") if stopped else error).to_dict()
        log.info("step failed", step=run.step, name=name, error=str(error))
    except Exception as error:  # the last line: an unforeseen error must end the step visibly
        log.exception("step failed unexpectedly", step=run.step, name=name)
        report.pop("result", None)
        unforeseen = HdcsError(f"{name} failed unexpectedly: {error!r}", next="See the server node's log")
        report["error"] = unforeseen.to_dict()
    report["ended_at"] = now_s()
    report["percent"] = max(0.0, run._sent[1])
    deliver(run.ctx, report, holder=run.holder)
    return "failed" if "error" in report else "done"


def _report(
    ctx: NodeContext, step: str, attempt: int, started: float, operation: str, spec: dict[str, Any]
) -> dict[str, Any]:
    """What control settles by; ``operation`` and ``vm`` are for whoever reads the logs and Flower."""
    return {
        "step": step, "attempt": attempt, "node": ctx.server_node, "started_at": started, "ended_at": now_s(),
        "operation": operation, "vm": (spec.get("shown") or {}).get("vm", ""),
    }  # fmt: skip


def deliver(ctx: NodeContext, report: dict[str, Any], holder: str | None = None) -> None:
    """Outcome to disk, claim closed, outcome sent. What fails after the first is repeated by the spool's thread."""
    try:
        ctx.spool.write(report)
    except OSError as error:
        log.error("outcome not kept: the spool takes no writes", step=report["step"], error=str(error))
    try:
        if holder is not None:
            ctx.reservations.steps.finish(report["step"], report["attempt"], holder)
        send(ctx.celery, OUTCOME_TASK, {"report": report}, CONTROL)
    except Exception as error:  # noqa: BLE001 - broker errors come in many classes, and the spool sends again
        log.warning("outcome kept in the spool", step=report["step"], error=str(error))


def _hand_over(run: Run, name: str, to: HandOver) -> str:
    return _pass_on(run, name, to.spec, direct_queue(run.ctx.domain_node, to.server_node), to.server_node)


def _hand_back(run: Run, name: str, spec: dict[str, Any]) -> str:
    """This worker stops, and what was half made is undone: who listens to the step's queue next goes on with it."""
    log.info("work handed back", step=run.step, name=name, queue=run.queue)
    return _pass_on(run, name, spec, run.queue, run.queue)


def _pass_on(run: Run, name: str, spec: dict[str, Any], queue: str, to: str) -> str:
    """Give the attempt up unworked, for whoever claims it next."""
    if not run.ctx.reservations.steps.hand_over(run.step, run.attempt, run.holder):
        return "lost"
    message = {"step": run.step, "attempt": run.attempt, "operation": run.operation, "spec": spec}
    try:
        send(run.ctx.celery, name, message, queue, task_id=f"{run.step}.{run.attempt}")
    except Exception as error:  # noqa: BLE001 - as above; control sends the unclaimed attempt once more
        log.warning("not passed on", step=run.step, to=to, error=str(error))
    return f"handed to {to}"


def resend_spooled(ctx: NodeContext) -> int:
    """Send outcomes that control has not acknowledged; drop those it has. Returns how many are left.

    To be called every few seconds; each outcome is sent less and less often while control does not answer. Raises
    Unreachable (Redis) or kombu's OperationalError.
    """
    reports = ctx.spool.pending()
    if not reports:
        return 0
    acked = ctx.reservations.steps.acked([(r["step"], r["attempt"]) for r in reports])
    for report, is_acked in zip(reports, acked, strict=True):
        if is_acked:
            ctx.spool.drop(report)
        elif ctx.spool.is_due(report):
            send(ctx.celery, OUTCOME_TASK, {"report": report}, CONTROL)
    return len(reports) - sum(acked)
