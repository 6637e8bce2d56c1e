"""Celery edge of images on the control plane."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.image import control as images
from hdcs_tasks.image import control_copy
from hdcs_tasks.operations.control_tasks import control
from hdcs_tasks.operations.requests import asked_by_task, request_task
from hdcs_tasks.operations.views import view


@request_task("image.add")
def add(
    name: str, path: str, domain_nodes: tuple[str, ...] = (), by: str = "celery", reason: str = ""
) -> dict[str, Any]:
    return view(images.add(control(), name, path, asked_by_task(by, reason), domain_nodes=domain_nodes))


@request_task("image.copy")
def copy(name: str, to: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(control_copy.copy(control(), name, to, asked_by_task(by, reason)))


@request_task("image.delete")
def delete(name: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(images.delete(control(), name, asked_by_task(by, reason)))
