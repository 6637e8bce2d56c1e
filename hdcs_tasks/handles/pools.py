"""Domain nodes, server nodes and profiles."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hdcs_tasks.handles.operation import Part, Plan, View
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool import profiles
from hdcs_tasks.vm import control_drain
from hdcs_tasks.vm.move_rules import MoveOptions


class Profiles(Part):
    def list(self) -> list[View]:
        return profiles.list_profiles(self._control)

    def create(self, name: str, **shape: Any) -> View:
        """``vcpus``, ``memory_mib``, ``disk_bytes`` (optional), ``usb``, ``disk_key`` (a key's name), ``rules``
        (``pool.policy.VmPolicy``)."""
        return profiles.create(self._control, name, **shape)

    def delete(self, name: str) -> None:
        profiles.delete(self._control, name)


class DomainNodes(Part):
    def list(self) -> list[View]:
        return pool_control.list_domain_nodes(self._control)

    def show(self, name: str) -> View:
        return pool_control.show_domain_node(self._control, name)

    def set(self, name: str, **rules: Any) -> View:
        """Change placement rules (fields of ``pool.policy.PoolPolicy``; None: back to the default)."""
        return pool_control.set_domain_rules(self._control, name, **rules)

    def create(self, name: str, token: str | None = None) -> pool_control.NewDomainNode:
        return pool_control.create_domain_node(self._control, name, token)

    def drain(
        self, name: str, *, concurrency: int = control_drain.CONCURRENCY, bandwidth_mib_s: int | None = None,
        dry_run: bool = False, idempotency_key: str | None = None, reason: str = "",
    ) -> Any:  # fmt: skip
        """Close it and move all its VMs, stopped ones too, to other domain nodes; an Operation, or with ``dry_run`` a
        Plan."""
        if dry_run:
            return Plan(control_drain.plan_drain(self._control, control_drain.DOMAIN, name))
        asked, options = self._asked(idempotency_key, reason), MoveOptions(bandwidth_mib_s=bandwidth_mib_s)
        return self._op(
            control_drain.drain_domain_node(self._control, name, asked, concurrency=concurrency, options=options)
        )

    def resume(self, name: str) -> View:
        """Open it again; a drain under way begins no more moves."""
        return control_drain.resume_domain_node(self._control, name)

    def new_token(self, name: str) -> str:
        return pool_control.new_token(self._control, name)


class ServerNodes(Part):
    def list(self) -> list[View]:
        return pool_control.list_server_nodes(self._control)

    def show(self, name: str) -> View:
        return pool_control.show_server_node(self._control, name)

    def set(self, name: str, **rules: Any) -> View:
        """Change placement rules (fields of ``pool.policy.NodePolicy``; None: back to the default)."""
        return pool_control.set_node_rules(self._control, name, **rules)

    def drain(
        self, name: str, *, move: bool = True, concurrency: int = control_drain.CONCURRENCY,
        bandwidth_mib_s: int | None = None, dry_run: bool = False, idempotency_key: str | None = None, reason: str = "",
        also: Collection[str] = (),
    ) -> Any:  # fmt: skip
        """Let no new VM start on it and move its running ones to others of its domain node, ``concurrency`` at once;
        an Operation, or with ``dry_run`` a Plan. ``move`` False: only close it. ``also``: others you are about to
        drain, closed with it so that nothing moves there; a Plan is of all of them together."""
        if dry_run:
            return Plan(control_drain.plan_drain(self._control, control_drain.NODE, name, *also))
        asked, options = self._asked(idempotency_key, reason), MoveOptions(bandwidth_mib_s=bandwidth_mib_s)
        return self._op(control_drain.drain_node(
            self._control, name, asked, moving=move, concurrency=concurrency, options=options, also=also
        ))  # fmt: skip

    def resume(self, name: str) -> View:
        """Let VMs start on it again; a drain under way begins no more moves."""
        return control_drain.resume_node(self._control, name)

    def remove(self, name: str) -> None:
        pool_control.remove(self._control, name)
