"""IPs as the scripts count them: numbers, of a server node's subnet."""

from __future__ import annotations

import ipaddress

from hdcs_tasks.errors import Invalid


def ip_text(number: int) -> str:
    """Dotted text of an address as a number; '' for 0."""
    if not number:
        return ""
    return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def ip_number(text: str) -> int:
    return int(ipaddress.IPv4Address(text)) if text else 0


def guest_span(subnet: str) -> tuple[int, int]:
    """First and last address a guest may have, as numbers: .1 is the gateway, the highest is for broadcast."""
    if not subnet:
        return 0, 0
    try:
        network = ipaddress.IPv4Network(subnet)
    except ValueError as e:
        raise Invalid(f"{subnet!r} is no IPv4 subnet: {e}", next="Take one: reservations.subnets.take") from e
    first = int(network.network_address)
    return first + 2, first + network.num_addresses - 2
