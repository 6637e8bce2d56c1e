"""Celery app of the dispatch bench. ROLE=control settles, ROLE=node runs ``bench.step`` as a server node runs any step,
ROLE=bare runs a plain task of a plain app with the same settings. Both tell when their code ran to a socket.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from celery import Celery

from hdcs_tasks.app import app as hdcs
from hdcs_tasks.app import celery_config
from hdcs_tasks.config import settings

__all__ = ["app"]


def tell(spec: dict[str, Any]) -> None:
    """Send the present time (monotonic, ns, one clock for all processes) to the bench."""
    at = time.monotonic_ns()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(f"{spec['number']} {at}".encode(), spec["socket"])


if os.environ.get("ROLE") == "bare":
    app = Celery("bare")
    app.conf.update(celery_config(settings()))

    @app.task(name="bench.bare")
    def bare(step: str, attempt: int, operation: str, spec: dict[str, Any]) -> None:
        tell(spec)

else:
    app = hdcs
    if os.environ.get("ROLE") == "control":
        import hdcs_tasks.operations.control_tasks  # noqa: F401 - registers operations.outcome
    else:
        from hdcs_tasks.operations.node_tasks import step_task

        def work(run: Any, spec: dict[str, Any]) -> dict[str, Any]:
            tell(spec)
            return {}

        step_task("bench.step", work)
