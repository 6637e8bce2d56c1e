"""What beat runs and how often: data only. Every sweep claims its slot, so a second beat is harmless."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.config import Settings
from hdcs_tasks.routing import CONTROL


def schedule(config: Settings) -> dict[str, dict[str, Any]]:
    """Celery's ``beat_schedule``: sweep name → task, period (s) and expiry, all on the control queue."""

    def every(task: str, period_s: float) -> dict[str, Any]:
        # beat knows no task, and would subscribe to the result of each message it sends
        options = {"queue": CONTROL, "expires": max(period_s, 1.0), "ignore_result": True}
        return {"task": task, "schedule": period_s, "kwargs": {"period_s": period_s}, "options": options}

    return {
        "recovery": every("operations.recovery_sweep", config.sweep_s),
        "leases": every("pool.lease_sweep", config.sweep_s),
        "reservations": every("pool.reservation_sweep", config.sweep_s),
        "dhcp": every("pool.dhcp_sweep", 4 * config.sweep_s),
        "waiting": every("pool.waiting_sweep", config.sweep_s),
        "drains": every("vm.drain_sweep", config.sweep_s),
        "tidy": every("pool.tidy_sweep", 4 * config.sweep_s),
        "monitor": every("monitor.sample_sweep", config.sample_s),
        "policies": every("backup.policy_sweep", config.policy_sweep_s),
        "warm": every("vm.warm_sweep", config.policy_sweep_s),
        "storms": every("vm.storm_sweep", config.policy_sweep_s),
        "alarms": every("monitor.alarm_sweep", config.alarm.period_s),
        "notices": every("monitor.notice_sweep", config.alarm.period_s),
        "retention": every("monitor.retention_sweep", config.keep.period_s),
        "idle": every("monitor.idle_sweep", config.sample_s),
    }
