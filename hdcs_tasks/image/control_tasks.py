"""Celery edge of images on the control plane."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.image import control as images
from hdcs_tasks.image import control_copy, control_export, control_import, control_publish
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


@request_task("image.import")
def import_(
    name: str, path: str, format: str | None = None, disk: int | None = None, drivers: bool = False,
    profile: str | None = None, domain_nodes: tuple[str, ...] = (), node: str | None = None, by: str = "celery",
    reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    request = control_import.ImportRequest(name, path, format, disk, drivers, profile, domain_nodes, node)
    return view(control_import.import_(control(), request, asked_by_task(by, reason)))


@request_task("image.export")
def export(
    name: str, path: str, format: str | None = None, compress: bool = False, force: bool = False,
    domain_node: str | None = None, node: str | None = None, by: str = "celery", reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    request = control_export.ExportRequest(path, format, compress, force, domain_node, node)
    return view(control_export.export(control(), name, request, asked_by_task(by, reason)))


@request_task("image.publish")
def publish(
    name: str, version: int, domain_nodes: tuple[str, ...] = (), by: str = "celery", reason: str = ""
) -> dict[str, Any]:
    asked = asked_by_task(by, reason)
    return view(control_publish.publish(control(), name, version, asked, domain_nodes=domain_nodes))


@request_task("image.delete")
def delete(name: str, force: bool = False, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(images.delete(control(), name, asked_by_task(by, reason), force=force))
