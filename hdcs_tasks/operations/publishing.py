"""Sending steps: first the attempt into Redis, then the message. What cannot be sent is the sweep's business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError

from hdcs_tasks.errors import Unreachable
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.sending import batch, send
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.store.models import Step

log = logger(__name__)


class Publisher:
    """Issues attempts and sends their messages."""

    def __init__(self, celery: Celery, reservations: Reservations) -> None:
        self.celery = celery
        self.reservations = reservations

    def publish(self, steps: Sequence[Step]) -> None:
        """Send the present attempt of each step. Never raises for a broker that is away: the ledger remembers."""
        if not steps:
            return
        try:
            self.reservations.steps.issue_many((step.id, step.attempt, step.node or "") for step in steps)
            with batch(self.celery) as producer:
                for step in steps:
                    self._send(step, producer)
        except (Unreachable, KombuError) as error:
            log.warning("steps not sent; the recovery sweep will", steps=[s.id for s in steps], error=str(error))

    def _send(self, step: Step, producer: Any) -> None:
        message = {"step": step.id, "attempt": step.attempt, "operation": step.operation_id, "spec": step.spec}
        queue = step.sent_to or step.queue
        send(self.celery, step.name, message, queue, task_id=f"{step.id}.{step.attempt}", producer=producer)
