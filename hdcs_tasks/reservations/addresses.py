"""Console port, MAC and IP of VMs on one server node, together in one call and without capacity.

A start takes them with its capacity (``pool.place``). This is for whoever has settled by other means where a VM goes,
and for many VMs at once: one script call takes those of a whole batch. A rebuild learns of IPs from claims: where
none follows, an IP taken here is forgotten when Redis is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hdcs_tasks.clock import random_hex
from hdcs_tasks.errors import NoCapacity
from hdcs_tasks.reservations.ips import ip_text
from hdcs_tasks.reservations.link import Link, check_token
from hdcs_tasks.reservations.names import format_mac
from hdcs_tasks.reservations.scripts import Call

_BATCH = 64  # VMs to a script call: Redis answers nobody else meanwhile
_TRIES = 64


class Addresses(NamedTuple):
    """What a VM is reached by: its port in the domain node, its MAC for good, its IP on the server node."""

    port: int
    mac: str
    ip: str


class AddressBook:
    """Ports, MACs and IPs, each VM's all three or none; asked again, the same ones."""

    def __init__(self, link: Link, mac_prefix: str) -> None:
        self._link = link
        self._mac_prefix = mac_prefix
        self._known: dict[tuple[str, str], Sequence[str]] = {}

    def take(self, domain_node: str, server_node: str, vm: str) -> Addresses:
        """Of one VM. NoCapacity: no port or IP is free, or no MAC was found. ``pool.release`` gives IP and port back,
        ``macs.release`` the MAC."""
        keys = self._keys(domain_node, server_node)
        check_token("VM", vm)
        for _ in range(_TRIES):
            answer = self._link.call("address_take", keys, vm, format_mac(self._mac_prefix, random_hex(3)))
            if answer != "mac":
                break
        if isinstance(answer, str):
            raise _refused(answer, domain_node, server_node, vm)
        return Addresses(answer[0], answer[2], ip_text(answer[1]))

    def take_many(self, domain_node: str, server_node: str, vms: Sequence[str]) -> list[Addresses | NoCapacity]:
        """``take`` for each (none of them twice), 64 to a script call; a refusal stands in its place."""
        keys = self._keys(domain_node, server_node)
        for vm in vms:
            check_token("VM", vm)
        found: dict[str, Addresses | NoCapacity] = {}
        waiting: Sequence[str] = vms
        for _ in range(_TRIES):
            again: list[str] = []
            batches = [waiting[at : at + _BATCH] for at in range(0, len(waiting), _BATCH)]
            answers = self._link.call_many("address_take_many", [self._call(keys, batch) for batch in batches])
            for batch, answer in zip(batches, answers, strict=True):
                for vm, port, ip, mac in zip(batch, answer[::3], answer[1::3], answer[2::3], strict=True):
                    if port:
                        found[vm] = Addresses(port, mac, ip_text(ip))
                    elif mac == "mac":
                        again.append(vm)
                    else:
                        found[vm] = _refused(mac, domain_node, server_node, vm)
            waiting = again
            if not waiting:
                break
        for vm in waiting:
            found[vm] = _refused("mac", domain_node, server_node, vm)
        return [found[vm] for vm in vms]

    def _keys(self, domain_node: str, server_node: str) -> Sequence[str]:
        keys = self._known.get((domain_node, server_node))
        if keys is None:
            key = self._link.key
            keys = (key("epoch", "run_id"), key("ports", domain_node), key("ips", server_node), key("mac", "all"),
                    key("claims", domain_node))  # fmt: skip
            self._known[domain_node, server_node] = keys
        return keys

    def _call(self, keys: Sequence[str], vms: Sequence[str]) -> Call:
        chance, prefix = random_hex(3 * len(vms)), self._mac_prefix
        args: list[str | int | float] = []
        for at, vm in enumerate(vms):
            args += (vm, format_mac(prefix, chance[6 * at : 6 * at + 6]))
        return keys, args


def _refused(why: str, domain_node: str, server_node: str, vm: str) -> NoCapacity:
    if why == "mac":
        return NoCapacity(f"no free MAC found for VM {vm}", next="Set HDCS_MAC_PREFIX to another prefix")
    if why == "port":
        return NoCapacity(
            f"domain node {domain_node} has no console port for VM {vm}: all are in use or cooling, or it has no range",
            next="Wait for ports to cool, or widen its range",
        )
    return NoCapacity(
        f"server node {server_node} has no IP for VM {vm}: all are in use or cooling, or it has no subnet",
        next="Wait for IPs to cool, or give it a larger subnet (HDCS_SUBNET_PREFIX)",
    )
