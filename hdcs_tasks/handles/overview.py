"""What dashboards show."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.handles.operation import Part, View
from hdcs_tasks.monitor import control_overview
from hdcs_tasks.operations import pages


class Overview(Part):
    """Pages of the record, ``{total, found, rows}``; ``offset`` and ``limit`` say which."""

    def desktops(self, **page: Any) -> View:
        """offset, limit, search, state, order, descending: see ``monitor.control_overview.desktops``."""
        return control_overview.desktops(self._control, **page)

    def operations(self, **page: Any) -> View:
        """offset, limit, search, show, order, descending: see ``operations.pages.page``."""
        return pages.page(self._control, **page)

    def data_center(self, profile: str | None = None) -> View:
        """The data center on one sheet: counts, domain nodes, server nodes, capacity, events."""
        return control_overview.data_center(self._control, profile)
