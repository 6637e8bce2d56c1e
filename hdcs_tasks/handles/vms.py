"""Desktops."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hdcs_tasks.errors import WaitTimedOut
from hdcs_tasks.handles.images import look
from hdcs_tasks.handles.operation import Operation, Part, Plan, View
from hdcs_tasks.image.control_export import ExportRequest
from hdcs_tasks.operations.control import Control
from hdcs_tasks.vm import control as vm_control
from hdcs_tasks.vm import (
    control_clone,
    control_console,
    control_delete,
    control_export,
    control_list,
    control_migrate,
    control_plan,
    control_refresh,
    control_shape,
)
from hdcs_tasks.vm.control_select import check_filters
from hdcs_tasks.vm.move_rules import MoveOptions


class Vm(Part):
    """One desktop."""

    def __init__(self, control: Control, by: str, name: str) -> None:
        super().__init__(control, by)
        self.name = name

    def show(self) -> View:
        return vm_control.show(self._control, self.name)

    def start(
        self, *, node: str | None = None, dry_run: bool = False, idempotency_key: str | None = None, reason: str = ""
    ) -> Any:
        """Start it; an Operation, or with ``dry_run`` a Plan."""
        if dry_run:
            return Plan(control_plan.plan_start(self._control, [self.name], pin=node))
        asked = self._asked(idempotency_key, reason)
        return self._op(vm_control.start(self._control, self.name, asked, pin=node))

    restore = start

    def _command(self, verb: str, key: str | None, reason: str, **options: Any) -> Operation:
        asked = self._asked(key, reason)
        return self._op(vm_control.command(self._control, verb, self.name, asked, **options))

    def stop(
        self, *, force: bool = False, timeout_s: float = 60.0, idempotency_key: str | None = None, reason: str = ""
    ) -> Operation:
        return self._command("stop", idempotency_key, reason, force=force, timeout_s=timeout_s)

    def suspend(self, *, idempotency_key: str | None = None, reason: str = "") -> Operation:
        return self._command("suspend", idempotency_key, reason)

    def resume(self, *, idempotency_key: str | None = None, reason: str = "") -> Operation:
        return self._command("resume", idempotency_key, reason)

    def reboot(self, *, force: bool = False, idempotency_key: str | None = None, reason: str = "") -> Operation:
        return self._command("reboot", idempotency_key, reason, force=force)

    def save(self, *, idempotency_key: str | None = None, reason: str = "") -> Operation:
        return self._command("save", idempotency_key, reason)

    def rename(self, new: str) -> Vm:
        """Give the stopped VM another name; the handle of it under that name."""
        control_shape.rename(self._control, self.name, new)
        return Vm(self._control, self._by, new)

    def grow(self, disk_bytes: int, *, idempotency_key: str | None = None, reason: str = "") -> Operation:
        """Make its disk that large, running or stopped; the guest grows its own file system."""
        asked = self._asked(idempotency_key, reason)
        return self._op(control_shape.grow(self._control, self.name, disk_bytes, asked))

    def delete(self, *, idempotency_key: str | None = None, reason: str = "") -> Operation:
        return self._op(control_delete.delete(self._control, self.name, self._asked(idempotency_key, reason)))

    def migrate(
        self, to: str | None = None, *, live: bool = True, bandwidth_mib_s: int | None = None, postcopy: bool = False,
        auto_converge: bool = True, dry_run: bool = False, idempotency_key: str | None = None, reason: str = "",
    ) -> Any:  # fmt: skip
        """Move it to a server node or to another domain node; an Operation, or with ``dry_run`` a Plan.

        ``live`` False: a running VM is saved and goes on at the target. The rest is of ``move_rules.MoveOptions``.
        """
        options = MoveOptions(live, bandwidth_mib_s, postcopy, auto_converge)
        if dry_run:
            return Plan(control_plan.plan_migrate(self._control, self.name, to=to, options=options))
        asked = self._asked(idempotency_key, reason)
        return self._op(control_migrate.migrate(self._control, self.name, asked, to=to, options=options))

    def refresh(
        self, *, discard: bool = False, dry_run: bool = False, idempotency_key: str | None = None, reason: str = ""
    ) -> Any:
        """Give the stopped VM an empty disk on the published version of its image; an Operation, or with ``dry_run`` a
        Plan. ``discard``: also where it is not disposable: what it has written is gone."""
        if dry_run:
            return Plan(control_refresh.plan(self._control, self.name))
        asked = self._asked(idempotency_key, reason)
        return self._op(control_refresh.refresh(self._control, self.name, asked, discard=discard))

    def export(
        self, path: str, *, format: str | None = None, compress: bool = False, force: bool = False,
        node: str | None = None, dry_run: bool = False, idempotency_key: str | None = None, reason: str = "",
    ) -> Any:  # fmt: skip
        """Its disk, flattened, to a file or a block device of ``node``; an Operation whose result is the manifest, or
        with ``dry_run`` a Plan. A running VM goes on: the disk of one moment leaves."""
        request = ExportRequest(path, format, compress, force, node=node)
        asked = self._asked(None if dry_run else idempotency_key, reason)
        operation = self._op(control_export.export(self._control, self.name, request, asked, dry_run=dry_run))
        return Plan({"vm": self.name, "path": path} | look(operation)) if dry_run else operation

    def set_usb(self, policy: str) -> View:
        """``on``, ``off`` or a SPICE filter; takes effect at the next start."""
        return vm_control.set_usb(self._control, self.name, policy)

    def console(self, *, ttl_s: float = 60.0) -> str:
        """A virt-viewer ``.vv`` text whose ticket expires after ``ttl_s`` seconds."""
        operation_id, text = control_console.console(self._control, self.name, self._asked(), ttl_s=ttl_s)
        Operation(self._control, operation_id).result(timeout_s=30)
        return text

    def wait_ready(self, *, timeout_s: float = 120.0) -> View:
        """Wait until the guest's agent has answered since the last start; the VM's view. Raises WaitTimedOut."""
        end = time.monotonic() + timeout_s
        while not (seen := self.show())["ready_at"]:
            if time.monotonic() > end:
                raise WaitTimedOut(
                    f"the guest agent of VM {self.name} has not answered for {timeout_s:.0f} s (VM is {seen['state']})",
                    next="Is qemu-guest-agent installed in its image? Look at its console",
                )
            time.sleep(0.2)
        return seen


class Vms(Part):
    """The desktops of the data center."""

    def __getitem__(self, name: str) -> Vm:
        return Vm(self._control, self._by, name)

    def list(self, **filters: Any) -> list[View]:
        """Views; filters: state, home, server_node, owner, profile, tag, names. NotFound for a home, server node or
        profile that there is not."""
        check_filters(self._control, filters)
        return control_list.list_vms(self._control, **filters)

    def that_can(self, verb: str, **filters: Any) -> Sequence[View]:
        """The listed VMs that ``verb`` (start, stop, …, backup) can be given to as they are; filters as in ``list``."""
        check_filters(self._control, filters)
        return control_list.list_given(self._control, verb, **filters)

    def clone(
        self, image: str, *, name: str, count: int = 1, profile: str = "small", domain_node: str | None = None,
        start: bool = False, owner: str = "", tags: Sequence[str] = (), rules: Mapping[str, Any] | None = None,
        warm: bool = False, dry_run: bool = False, idempotency_key: str | None = None, reason: str = "",
    ) -> Any:  # fmt: skip
        """Clone ``count`` VMs as derived images; an Operation, or a Plan with ``dry_run``. ``rules``: fields of
        ``pool.policy.VmPolicy`` (pin, together, apart, node_tags, …) that go before the profile's. ``warm``: take
        ready ones out of a warm pool as far as there are any, and start the others."""
        request = control_clone.CloneRequest(
            image, name, count, profile, domain_node, start, owner or self._by, tuple(tags), rules or {}, warm
        )
        if dry_run:
            return Plan(control_plan.plan_clone(self._control, request))
        return self._op(control_clone.clone(self._control, request, self._asked(idempotency_key, reason)))

    def start_all(
        self, names: Sequence[str] = (), *, dry_run: bool = False, idempotency_key: str | None = None,
        reason: str = "", chosen_by: Mapping[str, Any] | None = None, **selector: Any,
    ) -> Any:  # fmt: skip
        """Start every named or selected VM: one parent operation, or with ``dry_run`` a Plan. ``chosen_by``: what the
        names were found by, where the caller looked; an idempotency key stands for that then, not for the names."""
        chosen = list(names) or [vm["name"] for vm in self.that_can("start", **selector)]
        if dry_run:
            return Plan(control_plan.plan_start(self._control, chosen))
        asked = self._asked(idempotency_key, reason)
        if chosen_by is None and not names:
            chosen_by = selector
        return self._op(vm_control.start_many(self._control, chosen, asked, chosen_by=chosen_by))
