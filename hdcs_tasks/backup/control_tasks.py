"""Celery edge of backups on the control plane."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.backup import control as backups
from hdcs_tasks.operations.control_tasks import control
from hdcs_tasks.operations.requests import asked_by_task, request_task
from hdcs_tasks.operations.views import view


@request_task("backup.create")
def create(vm: str, full: bool = False, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(backups.create(control(), vm, asked_by_task(by, reason), full=full))


@request_task("backup.restore")
def restore(
    backup: str, name: str, domain_node: str | None = None, start: bool = True, by: str = "celery", reason: str = ""
) -> dict[str, Any]:
    asked = asked_by_task(by, reason)
    return view(backups.restore(control(), backup, asked, name=name, domain_node=domain_node, start=start))


@request_task("backup.verify")
def verify(backup: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(backups.verify(control(), backup, asked_by_task(by, reason)))


@request_task("backup.delete")
def delete(backup: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(backups.delete(control(), backup, asked_by_task(by, reason)))
