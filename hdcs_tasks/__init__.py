"""HDCS: a distributed task-queue orchestrator for virtual desktops on KVM/QEMU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdcs_tasks.cloud import Cloud

__all__ = ["Cloud"]


def __getattr__(name: str) -> Any:
    # Lazy: a server node imports this package and must never load the store.
    if name == "Cloud":
        from hdcs_tasks.cloud import Cloud

        return Cloud
    raise AttributeError(name)
