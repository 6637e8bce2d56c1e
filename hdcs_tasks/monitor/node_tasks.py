"""Celery edge of monitoring on a server node."""

from __future__ import annotations

from typing import Any

from celery.signals import worker_shutting_down

from hdcs_tasks.app import app
from hdcs_tasks.monitor import node, node_idle
from hdcs_tasks.operations.node_tasks import node_context


@app.task(name="monitor.sample_on_node")
def sample() -> None:
    node.sample(node_context())


@app.task(name="monitor.look_on_node")
def look(wanted: list[dict[str, Any]]) -> None:
    node_idle.look_and_tell(node_context(), wanted)


@worker_shutting_down.connect
def _stop_looking(**_: Any) -> None:
    node_idle.looker.stop()
