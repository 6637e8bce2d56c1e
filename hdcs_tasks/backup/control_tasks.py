"""Celery edge of backups on the control plane."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.app import app
from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup import control_adopt, control_copy, control_drill, control_policy, control_prune, control_restore
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.operations.control_tasks import control
from hdcs_tasks.operations.recovery import sweep_once
from hdcs_tasks.operations.requests import asked_by_task, request_task
from hdcs_tasks.operations.views import view


@request_task("backup.create")
def create(
    vm: str, full: bool = False, bandwidth_mib_s: int | None = None, by: str = "celery", reason: str = ""
) -> dict[str, Any]:
    asked = asked_by_task(by, reason)
    return view(backups.create(control(), vm, asked, full=full, bandwidth_mib_s=bandwidth_mib_s))


@request_task("backup.restore")
def restore(
    backup: str, name: str | None = None, in_place: bool = False, domain_node: str | None = None, start: bool = True,
    by: str = "celery", reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    asked = asked_by_task(by, reason)
    return view(
        control_restore.restore(
            control(), backup, asked, name=name, in_place=in_place, domain_node=domain_node, start=start
        )
    )


@request_task("backup.verify")
def verify(backup: str, domain_node: str | None = None, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(backups.verify(control(), backup, asked_by_task(by, reason), domain_node=domain_node))


@request_task("backup.extract")
def extract(
    backup: str, name: str, domain_node: str | None = None, by: str = "celery", reason: str = ""
) -> dict[str, Any]:
    asked = asked_by_task(by, reason)
    return view(control_restore.extract(control(), backup, name, asked, domain_node=domain_node))


@request_task("backup.copy")
def copy(
    backup: str, to: str, bandwidth_mib_s: int | None = None, by: str = "celery", reason: str = ""
) -> dict[str, Any]:
    asked = asked_by_task(by, reason)
    return view(control_copy.copy(control(), backup, to, asked, bandwidth_mib_s=bandwidth_mib_s))


@request_task("backup.delete")
def delete(backup: str | list[str], by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(backups.delete(control(), backup, asked_by_task(by, reason)))


@request_task("backup.drill")
def drill(
    backup: str, timeout_s: float = control_drill.AGENT_TIMEOUT_S, by: str = "celery", reason: str = ""
) -> dict[str, Any]:
    return view(control_drill.drill(control(), backup, asked_by_task(by, reason), timeout_s=timeout_s))


@request_task("backup.adopt")
def adopt(domain_node: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(control_adopt.adopt(control(), domain_node, asked_by_task(by, reason)))


@request_task("backup.prune")
def prune(vm: str, keep: dict[str, int], merge: bool = False, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(control_prune.prune(control(), vm, asked_by_task(by, reason), Keep(**keep), merge=merge))


@app.task(name="backup.policy_sweep")
def policy_sweep(period_s: float) -> None:
    sweep_once(control(), "policies", period_s, control_policy.policy_sweep)


@app.task(name="backup.open_pending")
def open_pending() -> None:
    control_policy.open_pending(control())
