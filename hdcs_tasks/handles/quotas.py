"""Quotas."""

from __future__ import annotations

from hdcs_tasks.handles.operation import Part, View
from hdcs_tasks.vm import control_quota


class Quotas(Part):
    def list(self) -> list[View]:
        """Every quota with what its owner has in use."""
        return control_quota.list_quotas(self._control)

    def set(self, owner: str, **limits: int | None) -> View:
        """Limits on ``vms``, ``running_vms``, ``vcpus``, ``memory_mib``, ``disk_bytes``; None: no limit. Owner ``*``:
        whoever has no quota of their own."""
        return control_quota.set_quota(self._control, owner, **limits)

    def drop(self, owner: str) -> None:
        control_quota.drop_quota(self._control, owner)
