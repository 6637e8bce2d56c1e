"""What belongs to a VM or server node by name: MACs, subnets, console ports, storage."""

from __future__ import annotations

import ipaddress

from hdcs_tasks.clock import random_hex
from hdcs_tasks.errors import Conflict, Invalid, NoCapacity, NotFound
from hdcs_tasks.reservations.link import Link, check_token
from hdcs_tasks.reservations.model import PortUsage
from hdcs_tasks.reservations.scripts import Value

_RECLAIM_BATCH = 500
SPAN_FACTS = 3  # fields of a span's hash that are the span's own: :first, :last, :next (span.lua)


def random_mac(prefix: str) -> str:
    """``prefix`` ("52:54:00") and three random bytes; whether it is free is decided in Redis."""
    return format_mac(prefix, random_hex(3))


def format_mac(prefix: str, text: str) -> str:
    """``prefix`` and three bytes given as six hex digits."""
    return f"{prefix}:{text[:2]}:{text[2:4]}:{text[4:]}"


class Macs:
    """A VM's MAC, for good: never another VM's while it is owned."""

    def __init__(self, link: Link, prefix: str) -> None:
        self._link = link
        self._prefix = prefix

    def propose(self) -> str:
        return random_mac(self._prefix)

    def take(self, vm: str) -> str:
        """The VM's MAC; the same one whenever asked."""
        link = self._link
        keys = [link.key("epoch", "run_id"), link.key("mac", "all")]
        check_token("VM", vm)
        for _ in range(64):
            mac: str = link.call("mac_take", keys, vm, self.propose())
            if mac:
                return mac
        raise NoCapacity(f"no free MAC found under {self._prefix}", next="Set HDCS_MAC_PREFIX to another prefix")

    def release(self, vm: str) -> bool:
        """For a deleted VM only. False where it had none."""
        return bool(self._link.call("mac_release", [self._link.key("mac", "all")], vm))

    def owner(self, mac: str) -> str | None:
        owner: str | None = self._link.do("HGET", self._link.key("mac", "all"), f":{mac}")
        return owner

    def all(self) -> dict[str, str]:
        """VM -> MAC."""
        return self._link.owners(self._link.key("mac", "all"))


def pack_subnet(cidr: str) -> str:
    network = ipaddress.IPv4Network(cidr)
    return f"{int(network.network_address)}/{network.prefixlen}"


def unpack_subnet(text: str) -> str:
    first, prefix = text.split("/")
    return f"{ipaddress.IPv4Address(int(first))}/{prefix}"


class Subnets:
    """The virtual subnet of each server node, cut out of one supernet."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._key = link.key("subnet", "of_node")

    def take(self, server_node: str, supernet: str, prefix: int) -> str:
        """The node's subnet ("10.128.0.0/22"); the lowest free one at first, the same from then on."""
        try:
            whole = ipaddress.IPv4Network(supernet)
        except ValueError as e:
            raise Invalid(f"{supernet!r} is no IPv4 network: {e}", next="Set HDCS_SUPERNET like 10.128.0.0/12") from e
        if not whole.prefixlen <= prefix <= 30:
            raise Invalid(f"no /{prefix} lies in {supernet}", next="Set HDCS_SUBNET_PREFIX")
        keys = [self._link.key("epoch", "run_id"), self._key]
        first, size = int(whole.network_address), 2 ** (32 - prefix)
        check_token("server node", server_node)
        text = self._link.call("subnet_take", keys, server_node, first, whole.num_addresses, prefix, size)
        if not text:
            raise NoCapacity(f"no /{prefix} is free in {supernet}", next="Remove server nodes, or widen HDCS_SUPERNET")
        return unpack_subnet(text)

    def release(self, server_node: str) -> bool:
        """For a removed server node only. False where it had none."""
        return bool(self._link.do("HDEL", self._key, server_node))

    def all(self) -> dict[str, str]:
        """Server node -> CIDR."""
        return {n: unpack_subnet(t) for n, t in self._link.pairs(self._link.do("HGETALL", self._key)).items()}


class Ports:
    """Console ports: a range per domain node out of one global range; a VM keeps its port within its domain node."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._epoch, self._ranges = link.key("epoch", "run_id"), link.key("port_ranges", "all")

    def _ports(self, domain_node: str) -> str:
        return self._link.key("ports", domain_node)

    def set_range(self, domain_node: str, first: int, last: int) -> None:
        """Give the domain node exactly this range; Conflict where another's overlaps. Ports in use outside it stay
        with their VMs until these give them back."""
        if not 0 < first <= last <= 65535:
            raise Invalid(f"{first} to {last} is no range of ports", next="Use 1 ≤ first ≤ last ≤ 65535")
        keys = [self._epoch, self._ranges, self._ports(domain_node)]
        answer = self._link.call("port_range", keys, domain_node, "set", first, last, 0)
        if int(answer[0]) < 0:
            raise Conflict(
                f"ports {first} to {last} overlap those of domain node {answer[2]}", next="Choose a range of its own"
            )

    def allot_range(self, domain_node: str, first: int, last: int, size: int) -> tuple[int, int]:
        """The domain node's range (first, last): the one it has, else the lowest free ``size`` ports of the global
        range ``first`` to ``last``."""
        if not 0 < first <= last <= 65535 or size < 1:
            raise Invalid(f"{size} ports of {first} to {last} cannot be allotted", next="Check HDCS_PORT_* settings")
        keys = [self._epoch, self._ranges, self._ports(domain_node)]
        answer = self._link.call("port_range", keys, domain_node, "allot", first, last, size)
        if not int(answer[0]):
            raise NoCapacity(
                f"no {size} console ports in a row are free between {first} and {last}",
                next="Widen HDCS_PORT_FIRST..HDCS_PORT_LAST or lower HDCS_PORTS_PER_DOMAIN_NODE",
            )
        return int(answer[0]), int(answer[1])

    def ranges(self) -> dict[str, tuple[int, int]]:
        pairs = self._link.pairs(self._link.do("HGETALL", self._ranges))
        return {name: (int(text.split("-")[0]), int(text.split("-")[1])) for name, text in pairs.items()}

    def take(self, domain_node: str, vm: str) -> int:
        """The VM's port in this domain node: its own where it has one, cooling or not; else a free one."""
        link = self._link
        keys = [self._epoch, self._ports(domain_node), link.key("claims", domain_node)]
        port = int(link.call("port_take", keys, check_token("VM", vm)))
        if port < 0:
            raise NotFound(f"domain node {domain_node} has no range of console ports", next="Join a server node to it")
        if port == 0:
            raise NoCapacity(
                f"no console port is free in domain node {domain_node}",
                next="Wait for ports to cool, or widen its range",
            )
        return port

    def cool(self, domain_node: str, vm: str, cooling_s: float) -> bool:
        """The VM stopped: its port may go to another VM after ``cooling_s``. False where it has none."""
        keys = [self._ports(domain_node)]
        return bool(self._link.call("port_cool", keys, vm, round(cooling_s * 1000)))

    def keep(self, domain_node: str, vm: str) -> bool:
        """The VM may come back: its port cools no longer. False where it did not (or is another VM's by now)."""
        return bool(self._link.do("ZREM", f"{self._ports(domain_node)}:cooling", vm))

    def reclaim(self, domain_node: str) -> int:
        """Sweep: return ports that cooled long enough to the free ones; how many."""
        keys = [self._ports(domain_node), self._link.key("claims", domain_node)]
        total = 0
        while count := int(self._link.call("port_reclaim", keys, _RECLAIM_BATCH)):
            total += count
        return total

    def usage(self, domain_node: str) -> PortUsage:
        ports = self._ports(domain_node)
        commands: list[list[Value]] = [
            ["HLEN", ports], ["ZCARD", f"{ports}:cooling"], ["LLEN", f"{ports}:free"],
            ["HMGET", ports, ":next", ":last"],
        ]  # fmt: skip
        fields, cooling, listed, (highest, last) = self._link.commands(commands)
        if last is None:
            return PortUsage(0, 0, 0)
        owned, unused = int(fields) - SPAN_FACTS, int(last) - int(highest)
        return PortUsage(used=owned - int(cooling), cooling=int(cooling), free=int(listed) + unused)

    def all(self, domain_node: str) -> dict[str, int]:
        """VM -> port, owned or cooling."""
        return {vm: int(port) for vm, port in self._link.owners(self._ports(domain_node)).items()}

    def cooling(self, domain_node: str) -> set[str]:
        """VMs whose port cools."""
        return set(self._link.do("ZRANGE", f"{self._ports(domain_node)}:cooling", 0, -1))


class Disks:
    """Bytes of a domain node's storage promised to VMs, within a limit the caller derives from size and overcommit."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def _keys(self, domain_node: str) -> list[str]:
        return [self._link.key("disk", domain_node), self._link.key("disk", domain_node, "used")]

    def claim(self, domain_node: str, vm: str, disk_bytes: int, limit_bytes: int) -> None:
        """Promise the VM ``disk_bytes`` in all (asked again, the promise changes); NoCapacity past the limit."""
        keys = [self._link.key("epoch", "run_id"), *self._keys(domain_node)]
        answer = self._link.call("disk_claim", keys, check_token("VM", vm), int(disk_bytes), int(limit_bytes))
        if not int(answer[0]):
            used = int(answer[1])
            raise NoCapacity(
                f"storage of domain node {domain_node} cannot promise VM {vm} {disk_bytes} bytes: "
                f"{used} of {limit_bytes} bytes are promised",
                next="Delete VMs, add storage, or raise HDCS_CAPACITY_DISK_OVERCOMMIT",
                details={"used_bytes": used, "limit_bytes": int(limit_bytes), "disk_bytes": int(disk_bytes)},
            )

    def release(self, domain_node: str, vm: str) -> bool:
        """False where nothing was promised."""
        return bool(self._link.call("disk_release", self._keys(domain_node), vm))

    def used(self, domain_node: str) -> int:
        """Bytes promised in all."""
        return int(self._link.do("GET", self._keys(domain_node)[1]) or 0)

    def all(self, domain_node: str) -> dict[str, int]:
        """VM -> bytes."""
        pairs = self._link.pairs(self._link.do("HGETALL", self._keys(domain_node)[0]))
        return {vm: int(size) for vm, size in pairs.items()}
