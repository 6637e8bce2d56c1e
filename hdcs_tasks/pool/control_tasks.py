"""Celery edge of the pool on the control plane."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.app import app
from hdcs_tasks.operations.control_tasks import control
from hdcs_tasks.operations.recovery import sweep_once
from hdcs_tasks.operations.requests import request_task
from hdcs_tasks.pool import admission, rebuild, tidy, waiting
from hdcs_tasks.pool import control as pool
from hdcs_tasks.pool.proof import JoinRequest


@request_task("pool.join")
def join(request: dict[str, Any]) -> dict[str, Any]:
    return pool.join(control(), JoinRequest(**request))


@app.task(name="pool.leave")
def leave(server_node: str, instance: str) -> None:
    pool.leave(control(), server_node, instance)


@app.task(name="pool.node_report")
def node_report(report: dict[str, Any]) -> None:
    rebuild.take_report(control(), report)


@app.task(name="pool.lease_sweep")
def lease_sweep(period_s: float) -> None:
    sweep_once(control(), "leases", period_s, pool.lease_sweep)


@app.task(name="pool.reservation_sweep")
def reservation_sweep(period_s: float) -> None:
    sweep_once(control(), "reservations", period_s, rebuild.reservation_sweep)


@app.task(name="pool.dhcp_sweep")
def dhcp_sweep(period_s: float) -> None:
    sweep_once(control(), "dhcp", period_s, tidy.dhcp_sweep)


@app.task(name="pool.waiting_sweep")
def waiting_sweep(period_s: float) -> None:
    sweep_once(control(), "waiting", period_s, waiting.waiting_sweep)
    sweep_once(control(), "storages", period_s, admission.storage_sweep)


@app.task(name="pool.tidy_sweep")
def tidy_sweep(period_s: float) -> None:
    sweep_once(control(), "tidy", period_s, tidy.tidy_sweep)
