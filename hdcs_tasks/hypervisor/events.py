"""What libvirt tells by itself: a guest ended, a guest's agent came up. No polling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libvirt

from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors

Told = Callable[["GuestEvent"], None]

_ENDED = (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_CRASHED)


@dataclass(frozen=True)
class GuestEvent:
    """``kind``: agent_up | ended. ``vm_id``: the guest's UUID, which is the VM's id."""

    kind: str
    vm_id: str


class Watch:
    """Events of one connection, from ``open`` to ``close``. ``told`` runs on libvirt's event thread: be quick."""

    def __init__(self, host: Host, told: Told) -> None:
        self._host = host
        self._told = told
        self._ids: list[int] = []

    def open(self) -> None:
        with libvirt_errors("watch guests"):
            register = self._host.conn.domainEventRegisterAny
            self._ids = [
                register(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None),
                register(None, libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, self._on_agent, None),
            ]

    def close(self) -> None:
        """Forget the registrations; a connection that is gone has none."""
        for number in self._ids:
            try:
                self._host.conn.domainEventDeregisterAny(number)
            except libvirt.libvirtError:
                break
        self._ids = []

    def _on_lifecycle(self, _conn: Any, guest: Any, event: int, _detail: int, _opaque: Any) -> None:
        if event in _ENDED:
            self._told(GuestEvent("ended", guest.UUIDString()))

    def _on_agent(self, _conn: Any, guest: Any, state: int, _reason: int, _opaque: Any) -> None:
        if state == libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED:
            self._told(GuestEvent("agent_up", guest.UUIDString()))
