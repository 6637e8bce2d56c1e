"""Celery app of test_operations_workers: real control tasks, and one step whose work is the test's.

ROLE=control settles; ROLE=node executes ``test.work``, which does what its spec says and writes down when it did it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from celery.signals import worker_ready

from hdcs_tasks.app import app
from hdcs_tasks.errors import HdcsError

__all__ = ["app"]


def note(spec: dict[str, Any], run: Any, what: str) -> None:
    line = json.dumps({"what": what, "step": run.step, "attempt": run.attempt, "pid": os.getpid(), "at": time.time()})
    with Path(spec["log"]).open("a") as file:
        file.write(line + "\n")


def work(run: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Wait for the file ``spec["until"]``, asking the fence and telling the progress that the file ``spec["percent"]``
    holds all the while, then do the one side effect."""
    note(spec, run, "begin")
    try:
        until = spec.get("until")
        while until and not Path(until).exists():
            if spec.get("fence", True):
                run.check()
            if spec.get("percent"):
                run.progress(float(Path(spec["percent"]).read_text() or 0), "disk 12/27 GiB", 95)
            time.sleep(0.02)
        if spec.get("fence", True):
            run.check()
        note(spec, run, "effect")
        return {"attempt": run.attempt}
    finally:
        note(spec, run, "end")


if os.environ["ROLE"] == "control":
    import hdcs_tasks.operations.control_tasks  # noqa: F401 - registers operations.outcome
else:
    from hdcs_tasks.operations.node import resend_spooled
    from hdcs_tasks.operations.node_tasks import node_context, step_task

    step_task("test.work", work)

    @worker_ready.connect
    def resend(**_: Any) -> None:
        def forever() -> None:
            while True:
                time.sleep(0.5)
                try:
                    resend_spooled(node_context())
                except HdcsError:
                    continue  # Redis is away: that is what this test is about
                except Exception:
                    continue

        threading.Thread(target=forever, daemon=True).start()
