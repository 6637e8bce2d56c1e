"""Tabs of HDCS in Flower: Data center, Desktops, Operations. Read-only faces on ``Cloud``, behind Flower's login."""

from __future__ import annotations


def install() -> None:
    """Add the tabs to the Flower that is about to start; to be called from its configuration file."""
    from hdcs_tasks.dashboards import handlers, templates_of

    templates_of.install()
    handlers.install()
