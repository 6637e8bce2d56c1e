"""Domain nodes, server nodes and profiles."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.handles.operation import Part, View
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool import profiles


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

    def drain(self, name: str) -> View:
        return pool_control.drain(self._control, name)

    def resume(self, name: str) -> View:
        return pool_control.resume(self._control, name)

    def remove(self, name: str) -> None:
        pool_control.remove(self._control, name)
