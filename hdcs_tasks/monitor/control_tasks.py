"""Celery edge of monitoring on the control plane."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.app import app
from hdcs_tasks.monitor import (
    control_alarms,
    control_idle,
    control_notices,
    control_retention,
    control_samples,
    control_usage,
    usage_rules,
)
from hdcs_tasks.operations.control_tasks import control
from hdcs_tasks.operations.recovery import sweep_once
from hdcs_tasks.operations.requests import request_task


@app.task(name="monitor.sampled")
def sampled(sample: dict[str, Any]) -> None:
    control_samples.take_sample(control(), sample)


@app.task(name="monitor.guest_event")
def guest_event(event: dict[str, Any]) -> None:
    control_samples.take_event(control(), event)


@app.task(name="monitor.sample_sweep")
def sample_sweep(period_s: float) -> None:
    sweep_once(control(), "sample", period_s, control_samples.sample_sweep)


@app.task(name="monitor.idle_sweep")
def idle_sweep(period_s: float) -> None:
    sweep_once(control(), "idle", period_s, control_idle.idle_sweep)


@app.task(name="monitor.retention_sweep")
def retention_sweep(period_s: float) -> None:
    sweep_once(control(), "retention", period_s, control_retention.retention_sweep)


@app.task(name="monitor.looked")
def looked(report: dict[str, Any]) -> None:
    control_idle.take_looks(control(), report)


@request_task("monitor.idle_preview")
def idle_preview(vms: list[str] | None = None, policy: str | None = None) -> dict[str, Any]:
    return {"vms": control_idle.preview(control(), names=vms or (), policy=policy)}


@app.task(name="monitor.alarm_sweep")
def alarm_sweep(period_s: float) -> None:
    sweep_once(control(), "alarms", period_s, control_alarms.alarm_sweep)


@app.task(name="monitor.notice_sweep")
def notice_sweep(period_s: float) -> None:
    sweep_once(control(), "notices", period_s, control_notices.notice_sweep)


@request_task("monitor.acknowledge")
def acknowledge(alarm: str, by: str = "", note: str = "") -> dict[str, Any]:
    return control_alarms.acknowledge(control(), alarm, by, note)


@request_task("monitor.alarms")
def alarms() -> dict[str, Any]:
    return {"alarms": control_alarms.list_alarms(control())}


@request_task("monitor.usage")
def usage(
    owner: str | None = None, tag: str | None = None, vm: str | None = None, month: str | None = None,
    by: usage_rules.By = "vm",
) -> dict[str, Any]:  # fmt: skip
    return control_usage.usage(control(), owner=owner, tag=tag, vm=vm, month=month, by=by)
