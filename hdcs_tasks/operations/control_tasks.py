"""Celery edge of the operations machinery on the control plane."""

from __future__ import annotations

import os
from typing import Any

from hdcs_tasks.app import app
from hdcs_tasks.config import settings
from hdcs_tasks.operations import recovery
from hdcs_tasks.operations.control import Control

_contexts: dict[int, Control] = {}


def control() -> Control:
    """This process's control-plane context (connections do not survive a fork)."""
    pid = os.getpid()
    if pid not in _contexts:
        _contexts[pid] = Control.from_settings(settings(), app)
    return _contexts[pid]


@app.task(name="operations.outcome")
def outcome(report: dict[str, Any]) -> None:
    recovery.settle(control(), report)


@app.task(name="operations.recovery_sweep")
def recovery_sweep(period_s: float) -> None:
    recovery.sweep_once(control(), "recovery", period_s, recovery.recovery_sweep)
