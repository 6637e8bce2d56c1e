"""Request tasks: how a Celery caller without a database asks. Only these keep a result: the request as accepted.

An error of ours travels as ``{"error": {code, message, next, details}}`` instead of a pickled exception, so that any
caller can read it. No result at all means: not acknowledged, send again with the same task id (the idempotency key).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from celery import Task, current_task
from pydantic import ValidationError, validate_call

from hdcs_tasks.app import app
from hdcs_tasks.errors import HdcsError, Invalid, Unreachable
from hdcs_tasks.operations.control import Asked


def request_task(name: str) -> Callable[[Callable[..., dict[str, Any]]], Task[..., Any]]:
    """Register a request task. Its function returns a JSON-able dict and may raise HdcsError.

    Its arguments come from strangers: they are held against the function's annotations first.
    """

    def register(function: Callable[..., dict[str, Any]]) -> Task[..., Any]:
        checked = validate_call(function)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
            try:
                return checked(*args, **kwargs)
            except ValidationError as error:
                if error.title != checked.__name__:
                    raise  # not of these arguments
                return {"error": _bad_arguments(name, function, error).to_dict()}
            except Unreachable:
                raise  # not acknowledged: the caller asks again
            except HdcsError as error:
                return {"error": error.to_dict()}

        task: Task[..., Any] = app.task(name=name, ignore_result=False)(run)
        return task

    return register


def _bad_arguments(name: str, function: Callable[..., Any], error: ValidationError) -> Invalid:
    """The same error as an HdcsError, without pydantic's addresses and the values' own text."""
    wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
    takes = ", ".join(map(str, inspect.signature(function, eval_str=True).parameters.values()))
    return Invalid(f"{name} was asked with wrong arguments: {wrong}", next=f"It takes: {takes}")


def asked_by_task(by: str, reason: str) -> Asked:
    """Who asks, with the running task's id as idempotency key: sent again with the same id, done once."""
    return Asked(by=by, reason=reason, idempotency_key=f"task:{current_task.request.id}")
