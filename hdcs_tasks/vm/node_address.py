"""A guest's address on a server node: given by DHCP from the start on, and never while another guest has it."""

from __future__ import annotations

from hdcs_tasks.errors import Unavailable
from hdcs_tasks.hypervisor import guests, networks
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.operations.node import NodeContext


def give_address(ctx: NodeContext, mac: str, ip: str, name: str) -> None:
    """Tell this node's DHCP of a VM, whose claim says ``ip``.

    Raises Unavailable while a guest here has that address: Redis was lost when it was just starting on a server node
    that could not report, so neither record nor rebuild knew of it. The claim is given back, and its address cools.
    """
    host, network = ctx.host(), ctx.settings.network_name
    others = {entry.mac for entry in networks.dhcp_hosts(host, network) if entry.ip == ip} - {mac.lower()}
    if others and (holder := _active(host, others)) is not None:
        raise Unavailable(
            f"address {ip} is that of guest {holder} on {ctx.server_node}, which the reservations do not know",
            next="The start is tried again with another address",
        )
    networks.add_dhcp_host(host, network, mac, ip, name)


def _active(host: Host, macs: set[str]) -> str | None:
    return next((seen.name for seen in guests.list_guests(host) if seen.active and seen.mac.lower() in macs), None)
