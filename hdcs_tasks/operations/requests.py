"""Request tasks: how a Celery caller without a database asks. Only these keep a result: the request as accepted.

An error of ours travels as ``{"error": {code, message, next, details}}`` instead of a pickled exception, so that any
caller can read it. No result at all means: not acknowledged, send again with the same task id (the idempotency key).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from celery import Task, current_task

from hdcs_tasks.app import app
from hdcs_tasks.errors import HdcsError, Unreachable
from hdcs_tasks.operations.control import Asked


def request_task(name: str) -> Callable[[Callable[..., dict[str, Any]]], Task[..., Any]]:
    """Register a request task. Its function returns a JSON-able dict and may raise HdcsError."""

    def register(function: Callable[..., dict[str, Any]]) -> Task[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
            try:
                return function(*args, **kwargs)
            except Unreachable:
                raise  # not acknowledged: the caller asks again
            except HdcsError as error:
                return {"error": error.to_dict()}

        task: Task[..., Any] = app.task(name=name, ignore_result=False)(run)
        return task

    return register


def asked_by_task(by: str, reason: str) -> Asked:
    """Who asks, with the running task's id as idempotency key: sent again with the same id, done once."""
    return Asked(by=by, reason=reason, idempotency_key=f"task:{current_task.request.id}")
