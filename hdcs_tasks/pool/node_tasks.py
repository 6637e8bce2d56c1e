"""Celery edge of the pool on a server node."""

from __future__ import annotations

from contextlib import ExitStack

from hdcs_tasks.app import app
from hdcs_tasks.operations.node_tasks import node_context
from hdcs_tasks.pool import node, node_cables


@app.task(name="pool.report_on_node")
def report(run_id: str) -> None:
    node.report(node_context(), run_id)


@app.task(name="pool.tidy_on_node")
def tidy() -> None:
    ctx = node_context()
    with ExitStack() as work:  # none keeps the others from theirs; the last one first
        work.callback(node_cables.renew_all_noted, ctx)
        work.callback(node.tidy, ctx)
        work.callback(node.free_cut_off, ctx)
