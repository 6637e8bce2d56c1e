"""Sending one task message: both sides of the house do it the same way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from celery import Celery
from celery.utils import uuid

from hdcs_tasks.app import describe
from hdcs_tasks.errors import from_dict


@contextmanager
def batch(celery: Celery) -> Iterator[Any]:
    """A producer whose messages leave together at the end of the block, in one round trip. Raises kombu's errors;
    which of the messages were delivered is not known then, so they must be safe to send again."""
    with celery.producer_pool.acquire(block=True, timeout=10) as found:
        producer: Any = found  # the stubs are older than batch()
        with producer.batch():
            yield producer


def send(
    celery: Celery, name: str, message: dict[str, Any], queue: str, *, task_id: str | None = None,
    expires_s: float | None = None, producer: Any = None,
) -> None:  # fmt: skip
    """Send one task message to a queue of ``routing``, described for Flower; ``producer`` is a ``batch``'s, else the
    message makes a batch with its event. Raises kombu's OperationalError."""
    if producer is None:
        with batch(celery) as producer:
            send(celery, name, message, queue, task_id=task_id, expires_s=expires_s, producer=producer)
        return
    made = celery.amqp.as_task_v2(
        task_id or uuid(), name, kwargs=message, expires=expires_s, ignore_result=True, argsrepr="",
        kwargsrepr=describe(message), create_sent_event=True,
    )  # fmt: skip
    # Straight to the queue of that name (the unnamed exchange): send_task would route, bind and declare anew each time.
    producer.publish(
        made.body, exchange="", routing_key=queue, serializer="json", headers=made.headers, delivery_mode=2,
        retry=False, expiration=expires_s, **made.properties,
    )  # fmt: skip
    sent = (made.sent_event or {}) | {"queue": queue, "exchange": "", "routing_key": queue}
    _dispatcher(celery).publish("task-sent", sent, producer, retry=False)


@cache
def _dispatcher(celery: Celery) -> Any:
    """Events go out by the batch's producer, so the dispatcher needs no connection of its own."""
    return celery.events.Dispatcher(enabled=False)


def broadcast(celery: Celery, name: str, message: dict[str, Any], queues: Iterable[str], expires_s: float) -> None:
    """The same short-lived message to several queues."""
    with batch(celery) as producer:
        for queue in queues:
            send(celery, name, message, queue, expires_s=expires_s, producer=producer)


def unwrap(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a request task, or the error it carries, raised."""
    if "error" in answer and isinstance(answer["error"], dict) and "code" in answer["error"] and len(answer) == 1:
        raise from_dict(answer["error"])
    return answer
