"""Celery edge of the pool on a server node."""

from __future__ import annotations

from hdcs_tasks.app import app
from hdcs_tasks.operations.node_tasks import node_context
from hdcs_tasks.pool import node


@app.task(name="pool.report_on_node")
def report(run_id: str) -> None:
    node.report(node_context(), run_id)


@app.task(name="pool.tidy_on_node")
def tidy() -> None:
    ctx = node_context()
    try:
        node.free_cut_off(ctx)
    finally:  # neither keeps the other from its work
        node.tidy(ctx)
