"""Alarms."""

from __future__ import annotations

from hdcs_tasks.handles.operation import Part, View
from hdcs_tasks.monitor import control_alarms, control_notices


class Alarms(Part):
    def history(self, limit: int = 50) -> list[View]:
        """Alarms of all times, that which changed last first."""
        return control_alarms.history(self._control, limit)

    def show(self, alarm_id: str) -> View:
        """One alarm by its id or a unique prefix of at least 6 characters, with its ``notices``."""
        return control_alarms.show(self._control, alarm_id)

    def acknowledge(self, alarm_id: str, *, note: str = "") -> View:
        """Say that somebody looks after it; WrongState once it is cleared."""
        return control_alarms.acknowledge(self._control, alarm_id, self._by, note)

    def test(self) -> list[View]:
        """Send a test notice to every target now: ``{target, ok, message}`` each."""
        return control_notices.try_targets(self._control, self._by)

    def list(self) -> list[View]:
        """Every alarm that is raised or acknowledged; critical ones and the newest first."""
        return control_alarms.list_alarms(self._control)
