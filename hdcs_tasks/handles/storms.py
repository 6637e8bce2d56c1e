"""Scheduled storms and warm pools: desktops that are ready before somebody asks."""

from __future__ import annotations

from hdcs_tasks.handles.operation import Part, View
from hdcs_tasks.vm import control_storm


class Storms(Part):
    """Desktops that are to be ready at a time."""

    def create(
        self, name: str, *, schedule: str, selector: View | None = None, clone: View | None = None,
        lead_s: float | None = None,
    ) -> View:  # fmt: skip
        """``selector``: names, tag, owner, home, profile; or ``clone``: image, count, name, profile, domain_node,
        owner, tag. ``lead_s``: begin so long before; None: as measured."""
        return control_storm.create(
            self._control, name, schedule=schedule, selector=selector, clone=clone, lead_s=lead_s
        )

    def list(self) -> list[View]:
        return control_storm.list_storms(self._control)

    def show(self, name: str) -> View:
        """The storm with its runs: what was ready when."""
        return control_storm.show(self._control, name)

    def run(self, name: str) -> View:
        """Run it now, besides its schedule."""
        return control_storm.run(self._control, name)

    def enable(self, name: str, enabled: bool = True) -> View:
        return control_storm.enable(self._control, name, enabled)

    def delete(self, name: str) -> None:
        """Its desktops stay."""
        control_storm.delete(self._control, name)
