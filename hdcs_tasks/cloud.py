"""The service interface: everything HDCS does, for Python callers on the control plane.

    from hdcs_tasks import Cloud
    cloud = Cloud.from_env()
    cloud.vms.clone("mini", name="desk-{:03d}", count=30, start=True).result(timeout_s=600)

A call returns at once with an ``Operation``; the work is done by the server nodes' workers.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from hdcs_tasks.app import make_app
from hdcs_tasks.backup import control as backup_control
from hdcs_tasks.config import Settings, settings
from hdcs_tasks.errors import OperationFailed, WaitTimedOut, from_dict
from hdcs_tasks.image import control as image_control
from hdcs_tasks.monitor import control as monitor_control
from hdcs_tasks.operations import views
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.pool import capacity as pool_capacity
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool import profiles
from hdcs_tasks.store.migrate import upgrade
from hdcs_tasks.vm import control as vm_control
from hdcs_tasks.vm import control_clone, control_console, control_migrate, control_plan, control_replan  # noqa: F401

View: TypeAlias = dict[str, Any]
ENDED = frozenset({"done", "failed", "cancelled"})


class Operation:
    """A handle on an asked-for change: look, watch, wait, cancel."""

    def __init__(self, control: Control, operation_id: str) -> None:
        self._control = control
        self.id = operation_id

    def show(self) -> View:
        """The operation as it stands, with steps, attempts and children."""
        return views.show(self._control, self.id)

    @property
    def state(self) -> str:
        return str(self.show()["state"])

    @property
    def progress(self) -> View:
        """``percent`` (0 to 100), ``phase``, ``eta_s`` (seconds or None)."""
        seen = self.show()
        return {key: seen[key] for key in ("percent", "phase", "eta_s")}

    def watch(self, *, timeout_s: float | None = None, every_s: float = 0.25) -> Iterator[View]:
        """Every change of state, percent or phase, until it has ended. Raises WaitTimedOut; the operation goes on."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        last: tuple[Any, ...] | None = None
        while True:
            seen = self.show()
            now = (seen["state"], seen["percent"], seen["phase"], tuple(c["state"] for c in seen["children"]))
            if now != last:
                last = now
                yield seen
            if seen["state"] in ENDED:
                return
            if end is not None and time.monotonic() > end:
                raise WaitTimedOut(
                    f"operation {self.id} ({seen['kind']}) has not ended after {timeout_s:.0f} s: {seen['phase']}",
                    next=f"It goes on; watch it with: hdcs op watch {self.id}",
                )
            time.sleep(every_s)

    def result(self, *, timeout_s: float | None = 600.0) -> View:
        """Wait for the end and return the result. Raises what made it fail, Cancelled, or WaitTimedOut."""
        *_, seen = self.watch(timeout_s=timeout_s)
        if seen["state"] == "done":
            return dict(seen["result"] or {})
        error = seen["error"] or {"code": OperationFailed.code, "message": f"operation {self.id} {seen['state']}"}
        raise from_dict(error)

    def cancel(self) -> View:
        return views.cancel(self._control, self.id)


class _Part:
    def __init__(self, control: Control, by: str) -> None:
        self._control = control
        self._by = by

    def _asked(self, idempotency_key: str | None = None, reason: str = "") -> Asked:
        return Asked(by=self._by, reason=reason, idempotency_key=idempotency_key)

    def _op(self, record: Any) -> Operation:
        return Operation(self._control, record.id)


class Plan:
    """What a call would do (``dry_run=True``)."""

    def __init__(self, plan: View) -> None:
        self.plan = plan

    def explain(self) -> View:
        return self.plan


class Vm(_Part):
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

    def delete(self, *, idempotency_key: str | None = None, reason: str = "") -> Operation:
        return self._op(vm_control.delete(self._control, self.name, self._asked(idempotency_key, reason)))

    def migrate(
        self, to: str | None = None, *, live: bool = True, dry_run: bool = False, idempotency_key: str | None = None,
        reason: str = "",
    ) -> Any:  # fmt: skip
        """Move it; an Operation, or with ``dry_run`` a Plan."""
        if dry_run:
            return Plan(control_plan.plan_migrate(self._control, self.name, to=to))
        asked = self._asked(idempotency_key, reason)
        return self._op(control_migrate.migrate(self._control, self.name, asked, to=to, live=live))

    def set_usb(self, policy: str) -> View:
        """``on``, ``off`` or a SPICE filter; takes effect at the next start."""
        return vm_control.set_usb(self._control, self.name, policy)

    def set_idle(self, after_s: float | None) -> View:
        """Stop it once unused for ``after_s`` seconds; 0 never, None as ``HDCS_IDLE_AFTER_S`` says."""
        return vm_control.set_idle(self._control, self.name, after_s)

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


class Vms(_Part):
    """The desktops of the data center."""

    def __getitem__(self, name: str) -> Vm:
        return Vm(self._control, self._by, name)

    def list(self, **filters: Any) -> list[View]:
        """Views; filters: state, home, server_node, owner, profile, tag, names."""
        return vm_control.list_vms(self._control, **filters)

    def that_can(self, verb: str, **filters: Any) -> Sequence[View]:
        """The listed VMs that ``verb`` (start, stop, …, backup) can be given to as they are; filters as in ``list``."""
        return vm_control.list_given(self._control, verb, **filters)

    def clone(
        self, image: str, *, name: str, count: int = 1, profile: str = "small", domain_node: str | None = None,
        start: bool = False, owner: str = "", tags: Sequence[str] = (), rules: Mapping[str, Any] | None = None,
        dry_run: bool = False, idempotency_key: str | None = None, reason: str = "",
    ) -> Any:  # fmt: skip
        """Clone ``count`` VMs as derived images; an Operation, or a Plan with ``dry_run``. ``rules``: fields of
        ``pool.policy.VmPolicy`` (pin, together, apart, node_tags, …) that go before the profile's."""
        request = control_clone.CloneRequest(
            image, name, count, profile, domain_node, start, owner or self._by, tuple(tags), rules or {}
        )
        if dry_run:
            return Plan(control_clone.plan_clone(self._control, request))
        return self._op(control_clone.clone(self._control, request, self._asked(idempotency_key, reason)))

    def start_all(
        self, names: Sequence[str] = (), *, dry_run: bool = False, idempotency_key: str | None = None,
        reason: str = "", **selector: Any,
    ) -> Any:  # fmt: skip
        """Start every named or selected VM: one parent operation, or with ``dry_run`` a Plan."""
        chosen = list(names) or [v["name"] for v in self.list(**(selector | {"state": "stopped"}))]
        if dry_run:
            return Plan(control_plan.plan_start(self._control, chosen))
        return self._op(vm_control.start_many(self._control, chosen, self._asked(idempotency_key, reason)))


class Images(_Part):
    def add(
        self, name: str, path: str, *, domain_nodes: Sequence[str] = (), idempotency_key: str | None = None
    ) -> Operation:
        asked = self._asked(idempotency_key)
        return self._op(image_control.add(self._control, name, path, asked, domain_nodes=domain_nodes))

    def delete(self, name: str) -> Operation:
        return self._op(image_control.delete(self._control, name, self._asked()))

    def list(self) -> list[View]:
        return image_control.list_images(self._control)


class Backups(_Part):
    def create(self, vm: str, *, full: bool = False, idempotency_key: str | None = None, reason: str = "") -> Operation:
        asked = self._asked(idempotency_key, reason)
        return self._op(backup_control.create(self._control, vm, asked, full=full))

    def restore(
        self, backup_id: str, *, name: str, domain_node: str | None = None, start: bool = True,
        idempotency_key: str | None = None,
    ) -> Operation:  # fmt: skip
        asked = self._asked(idempotency_key)
        return self._op(
            backup_control.restore(self._control, backup_id, asked, name=name, domain_node=domain_node, start=start)
        )

    def verify(self, backup_id: str) -> Operation:
        return self._op(backup_control.verify(self._control, backup_id, self._asked()))

    def delete(self, backup_id: str) -> Operation:
        return self._op(backup_control.delete(self._control, backup_id, self._asked()))

    def list(self, vm: str | None = None) -> list[View]:
        return backup_control.list_backups(self._control, vm)

    def show(self, backup_id: str) -> View:
        """One backup by its id or a unique prefix of at least 6 characters."""
        return backup_control.show(self._control, backup_id)


class Profiles(_Part):
    def list(self) -> list[View]:
        return profiles.list_profiles(self._control)

    def create(self, name: str, **shape: Any) -> View:
        """``vcpus``, ``memory_mib``, ``disk_bytes`` (optional), ``usb``, ``rules`` (``pool.policy.VmPolicy``)."""
        return profiles.create(self._control, name, **shape)

    def delete(self, name: str) -> None:
        profiles.delete(self._control, name)


class DomainNodes(_Part):
    def list(self) -> list[View]:
        return pool_control.list_domain_nodes(self._control)

    def show(self, name: str) -> View:
        return pool_control.show_domain_node(self._control, name)

    def set(self, name: str, **rules: Any) -> View:
        """Change placement rules (fields of ``pool.policy.PoolPolicy``; None: back to the default)."""
        return pool_control.set_domain_rules(self._control, name, **rules)

    def create(self, name: str, token: str | None = None) -> pool_control.NewDomainNode:
        return pool_control.create_domain_node(self._control, name, token)

    def new_token(self, name: str) -> str:
        return pool_control.new_token(self._control, name)


class ServerNodes(_Part):
    def list(self) -> list[View]:
        return pool_control.list_server_nodes(self._control)

    def show(self, name: str) -> View:
        return pool_control.show_server_node(self._control, name)

    def set(self, name: str, **rules: Any) -> View:
        """Change placement rules (fields of ``pool.policy.NodePolicy``; None: back to the default)."""
        return pool_control.set_node_rules(self._control, name, **rules)

    def drain(self, name: str) -> View:
        return pool_control.drain(self._control, name)

    def resume(self, name: str) -> View:
        return pool_control.resume(self._control, name)

    def remove(self, name: str) -> None:
        pool_control.remove(self._control, name)


class Operations(_Part):
    def __getitem__(self, operation_id: str) -> Operation:
        return Operation(self._control, str(views.show(self._control, operation_id)["id"]))

    def list(self, **filters: Any) -> list[View]:
        """Newest first; filters: live, vm, kind, limit."""
        return views.list_operations(self._control, **filters)


class Cloud:
    """The data center, from the control plane."""

    def __init__(self, control: Control, by: str = "") -> None:
        self.control = control
        by = by or f"{getpass.getuser()}@{socket.gethostname()}"
        self.vms = Vms(control, by)
        self.images = Images(control, by)
        self.backups = Backups(control, by)
        self.profiles = Profiles(control, by)
        self.domain_nodes = DomainNodes(control, by)
        self.server_nodes = ServerNodes(control, by)
        self.operations = Operations(control, by)

    @classmethod
    def from_env(cls) -> Cloud:
        """A cloud by the ``HDCS_*`` environment variables."""
        return cls.from_settings(settings())

    @classmethod
    def from_settings(cls, config: Settings) -> Cloud:
        """A cloud by these settings; brings the database's schema up to date."""
        upgrade(config.database_url)
        return cls(Control.from_settings(config, make_app(config)))

    def capacity(
        self, profile: str | None = None, *, without: Sequence[str] = (), with_nodes: Sequence[Mapping[str, Any]] = (),
        mix: Mapping[str, int] | None = None,
    ) -> View:  # fmt: skip
        """How many more VMs of a profile fit: per server node, per domain node and in all, also with one server node
        kept free (``n_plus_one``); as things are, or as ``pool.capacity`` tells the what-ifs."""
        return pool_capacity.capacity(self.control, profile, without=without, with_nodes=with_nodes, mix=mix)

    def events(self, limit: int = 50) -> list[View]:
        return monitor_control.list_events(self.control, limit)

    def doctor(self) -> list[View]:
        """Checks of the control plane, each ``{check, ok, message, next}``."""
        return monitor_control.doctor(self.control)
