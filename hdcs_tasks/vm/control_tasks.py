"""Celery edge of VMs on the control plane: requests of callers without a database. The task id is the key."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.app import app
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.control_tasks import control
from hdcs_tasks.operations.recovery import sweep_once
from hdcs_tasks.operations.requests import asked_by_task, request_task
from hdcs_tasks.operations.views import view
from hdcs_tasks.vm import control as vm_control
from hdcs_tasks.vm import control_clone, control_migrate, control_replan, control_storm  # noqa: F401 - replan registers itself


@request_task("vm.clone")
def clone(
    image: str, name: str, count: int = 1, profile: str = "small", domain_node: str | None = None, start: bool = False,
    owner: str = "", tags: tuple[str, ...] = (), by: str = "celery", reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    request = control_clone.CloneRequest(image, name, count, profile, domain_node, start, owner, tuple(tags))
    return view(control_clone.clone(control(), request, asked_by_task(by, reason)))


@request_task("vm.start")
def start(vm: str, node: str | None = None, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(vm_control.start(control(), vm, asked_by_task(by, reason), pin=node))


@request_task("vm.start_all")
def start_all(vms: list[str], by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(vm_control.start_many(control(), vms, asked_by_task(by, reason)))


def _command(verb: str, vm: str, asked: Asked, **options: Any) -> dict[str, Any]:
    return view(vm_control.command(control(), verb, vm, asked, **options))


@request_task("vm.stop")
def stop(vm: str, force: bool = False, timeout_s: float = 60.0, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return _command("stop", vm, asked_by_task(by, reason), force=force, timeout_s=timeout_s)


@request_task("vm.suspend")
def suspend(vm: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return _command("suspend", vm, asked_by_task(by, reason))


@request_task("vm.resume")
def resume(vm: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return _command("resume", vm, asked_by_task(by, reason))


@request_task("vm.reboot")
def reboot(vm: str, force: bool = False, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return _command("reboot", vm, asked_by_task(by, reason), force=force)


@request_task("vm.save")
def save(vm: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return _command("save", vm, asked_by_task(by, reason))


@request_task("vm.delete")
def delete(vm: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(vm_control.delete(control(), vm, asked_by_task(by, reason)))


@request_task("vm.migrate")
def migrate(vm: str, to: str | None = None, live: bool = True, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(control_migrate.migrate(control(), vm, asked_by_task(by, reason), to=to, live=live))


@request_task("storm.run")
def storm_run(storm: str) -> dict[str, Any]:
    return control_storm.run(control(), storm)


@app.task(name="vm.storm_sweep")
def storm_sweep(period_s: float) -> None:
    sweep_once(control(), "storms", period_s, control_storm.storm_sweep)
