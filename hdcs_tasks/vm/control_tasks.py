"""Celery edge of VMs on the control plane: requests of callers without a database. The task id is the key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hdcs_tasks.app import app
from hdcs_tasks.image.control_export import ExportRequest
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.control_tasks import control
from hdcs_tasks.operations.recovery import sweep_once
from hdcs_tasks.operations.requests import asked_by_task, request_task
from hdcs_tasks.operations.views import view
from hdcs_tasks.vm import control as vm_control
from hdcs_tasks.vm import (
    control_clone,
    control_delete,
    control_drain,
    control_export,
    control_migrate,
    control_quota,
    control_rebalance,
    control_refresh,
    control_shape,
    control_storm,
    control_warm,
)
from hdcs_tasks.vm import control_replan as control_replan  # registers itself
from hdcs_tasks.vm.move_rules import MoveOptions


@request_task("vm.clone")
def clone(
    image: str, name: str, count: int = 1, profile: str = "small", domain_node: str | None = None, start: bool = False,
    owner: str = "", tags: tuple[str, ...] = (), warm: bool = False, by: str = "celery", reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    request = control_clone.CloneRequest(image, name, count, profile, domain_node, start, owner, tuple(tags), warm=warm)
    return view(control_clone.clone(control(), request, asked_by_task(by, reason)))


@request_task("vm.start")
def start(vm: str, node: str | None = None, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(vm_control.start(control(), vm, asked_by_task(by, reason), pin=node))


@request_task("vm.grow")
def grow(vm: str, disk_bytes: int, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(control_shape.grow(control(), vm, disk_bytes, asked_by_task(by, reason)))


@request_task("vm.rename")
def rename(vm: str, new: str, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return control_shape.rename(control(), vm, new)


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
    return view(control_delete.delete(control(), vm, asked_by_task(by, reason)))


@request_task("vm.migrate")
def migrate(
    vm: str, to: str | None = None, live: bool = True, bandwidth_mib_s: int | None = None, postcopy: bool = False,
    auto_converge: bool = True, by: str = "celery", reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    options = MoveOptions(live, bandwidth_mib_s, postcopy, auto_converge)
    return view(control_migrate.migrate(control(), vm, asked_by_task(by, reason), to=to, options=options))


@request_task("pool.drain")
def drain(
    node: str, move: bool = True, concurrency: int = control_drain.CONCURRENCY, by: str = "celery", reason: str = "",
    also: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    asked = asked_by_task(by, reason)
    return view(control_drain.drain_node(control(), node, asked, moving=move, concurrency=concurrency, also=also))


@request_task("pool.drain_domain")
def drain_domain(
    domain_node: str, concurrency: int = control_drain.CONCURRENCY, by: str = "celery", reason: str = ""
) -> dict[str, Any]:
    asked = asked_by_task(by, reason)
    return view(control_drain.drain_domain_node(control(), domain_node, asked, concurrency=concurrency))


@request_task("pool.resume")
def resume_node(node: str) -> dict[str, Any]:
    return control_drain.resume_node(control(), node)


@request_task("pool.resume_domain")
def resume_domain(domain_node: str) -> dict[str, Any]:
    return control_drain.resume_domain_node(control(), domain_node)


@app.task(name="vm.drain_sweep")
def drain_sweep(period_s: float) -> None:
    sweep_once(control(), "drains", period_s, control_drain.drain_sweep)


@request_task("pool.rebalance")
def rebalance(
    domain_node: str, max_moves: int = control_rebalance.MOVES, concurrency: int = control_rebalance.AT_ONCE,
    by: str = "celery", reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    asked = asked_by_task(by, reason)
    return view(
        control_rebalance.rebalance(control(), domain_node, asked, max_moves=max_moves, concurrency=concurrency)
    )


@request_task("quota.list")
def list_quotas() -> dict[str, Any]:
    return {"quotas": control_quota.list_quotas(control())}


@request_task("quota.set")
def set_quota(owner: str, limits: dict[str, int | None]) -> dict[str, Any]:
    return control_quota.set_quota(control(), owner, **limits)


@request_task("quota.drop")
def drop_quota(owner: str) -> dict[str, Any]:
    control_quota.drop_quota(control(), owner)
    return {"owner": owner}


@request_task("storm.run")
def storm_run(storm: str) -> dict[str, Any]:
    return control_storm.run(control(), storm)


@app.task(name="vm.storm_sweep")
def storm_sweep(period_s: float) -> None:
    sweep_once(control(), "storms", period_s, control_storm.storm_sweep)


@app.task(name="vm.warm_sweep")
def warm_sweep(period_s: float) -> None:
    sweep_once(control(), "warm", period_s, control_warm.warm_sweep)


@app.task(name="vm.top_up_warm")
def top_up_warm() -> None:
    # Under the slot of a short sweep: many that take at once make one top-up.
    sweep_once(control(), "top-up", 1.0, control_warm.warm_sweep, periodic=False)


@request_task("vm.refresh")
def refresh(vm: str, discard: bool = False, by: str = "celery", reason: str = "") -> dict[str, Any]:
    return view(control_refresh.refresh(control(), vm, asked_by_task(by, reason), discard=discard))


@request_task("vm.export")
def export(
    vm: str, path: str, format: str | None = None, compress: bool = False, force: bool = False,
    node: str | None = None, by: str = "celery", reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    request = ExportRequest(path, format, compress, force, node=node)
    return view(control_export.export(control(), vm, request, asked_by_task(by, reason)))
