"""Celery edge of monitoring on a server node."""

from __future__ import annotations

from hdcs_tasks.app import app
from hdcs_tasks.monitor import node
from hdcs_tasks.operations.node_tasks import node_context


@app.task(name="monitor.sample_on_node")
def sample() -> None:
    node.sample(node_context())
