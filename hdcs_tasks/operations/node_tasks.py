"""Celery edge of the operations machinery on a server node: how a feature declares the task of a step."""

from __future__ import annotations

import os
from typing import Any

from celery import Task

from hdcs_tasks.app import app
from hdcs_tasks.config import settings
from hdcs_tasks.operations.node import Handler, NodeContext, execute

_contexts: dict[int, NodeContext] = {}


def node_context() -> NodeContext:
    """This process's server-node context (neither Redis nor libvirt connections survive a fork)."""
    pid = os.getpid()
    if pid not in _contexts:
        _contexts[pid] = NodeContext.from_settings(settings(), app)
    return _contexts[pid]


def step_task(name: str, handler: Handler) -> Task[..., None]:
    """Register the Celery task of step ``name``; ``handler(run, spec) -> result`` does the work."""

    def run(self: Task[..., None], step: str, attempt: int, operation: str, spec: dict[str, Any]) -> None:
        def on_progress(text: str) -> None:
            self.send_event("task-progress", result=text)

        queue = str((self.request.delivery_info or {})["routing_key"])
        execute(
            node_context(), name, handler, on_progress, step=step, attempt=attempt, operation=operation, spec=spec,
            queue=queue,
        )  # fmt: skip

    run.__name__ = name.replace(".", "_")
    task: Task[..., None] = app.task(name=name, bind=True)(run)
    return task
