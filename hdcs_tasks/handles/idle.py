"""Idle policies: which desktops are taken back when nobody uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hdcs_tasks.handles.operation import Part, View
from hdcs_tasks.monitor import control_idle, control_idle_policy


class Idle(Part):
    def create(self, name: str, *, selector: Mapping[str, Any] | None = None, **more: Any) -> View:
        """``more``: seconds of disuse for the rungs warn, suspend, save, stop, delete; limits cpu_percent,
        disk_bytes_s, net_bytes_s; rank, inside, force, message: see ``monitor.control_idle_policy.create``."""
        return control_idle_policy.create(self._control, name, selector=selector or {}, **more)

    def show(self, name: str) -> View:
        return control_idle_policy.show(self._control, name)

    def enable(self, name: str, enabled: bool = True) -> View:
        return control_idle_policy.enable(self._control, name, enabled)

    def delete(self, name: str) -> None:
        control_idle_policy.delete(self._control, name)

    def preview(self, *, names: Sequence[str] = (), policy: str | None = None) -> list[View]:
        """Every desktop that is an idle policy's: its signals, and what would happen when."""
        return control_idle.preview(self._control, names=names, policy=policy)

    def sweep(self) -> list[str]:
        """Sweep now, as beat does all the time; names of the desktops whose next rung is due."""
        return control_idle.idle_sweep(self._control)

    def list(self) -> list[View]:
        return control_idle_policy.list_policies(self._control)
