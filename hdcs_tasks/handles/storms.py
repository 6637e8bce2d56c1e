"""Scheduled storms and warm pools: desktops that are ready before somebody asks."""

from __future__ import annotations

from hdcs_tasks.handles.operation import Part, View
from hdcs_tasks.vm import control_storm, control_warm


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


class WarmPools(Part):
    """Desktops of an image and profile kept ready, to be taken by ``vms.clone(..., warm=True)``."""

    def create(
        self, name: str, *, image: str, size: int, profile: str = "small", saved: bool = False,
        domain_node: str | None = None,
    ) -> View:  # fmt: skip
        """``size`` desktops of the image's newest version: started, or ``saved`` with their memory."""
        return control_warm.create(
            self._control, name, image=image, profile=profile, size=size, saved=saved, domain_node=domain_node
        )

    def list(self) -> list[View]:
        return control_warm.list_pools(self._control)

    def show(self, name: str) -> View:
        return control_warm.show(self._control, name)

    def set(self, name: str, *, size: int | None = None, saved: bool | None = None) -> View:
        return control_warm.change(self._control, name, size=size, saved=saved)

    def delete(self, name: str) -> None:
        """Its desktops that nobody has taken are deleted too."""
        control_warm.delete(self._control, name)
