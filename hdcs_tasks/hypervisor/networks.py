"""The virtual network of a server node and the addresses it hands out.

One network name on every server node, a different subnet on each. Its gateway is the subnet's first address;
every guest has a DHCP host entry, added live where it runs and removed with its claim. There is no dynamic range,
so nobody gets an address that was not reserved.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from hdcs_tasks.errors import Conflict, Invalid, NotFound
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.routing import check_name

FORWARD_MODES = ("open", "nat", "isolated")
LEASE_MIN_S = 120  # dnsmasq's own minimum
_BRIDGE_MAX = 15
_PLACEHOLDER = "hdcs-placeholder"
_LIVE = libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE


@dataclass(frozen=True)
class NetworkSpec:
    """A network to be. ``subnet``: IPv4 CIDR; ``forward``: open (the host filters), nat or isolated."""

    name: str
    subnet: str
    forward: str = "open"
    dhcp_lease_s: int = 3600

    def __post_init__(self) -> None:
        check_name("network", self.name)
        try:
            subnet = IPv4Network(self.subnet)
        except ValueError as error:
            raise Invalid(f"subnet {self.subnet!r}: {error}", next="Write it as 10.128.0.0/22") from None
        if subnet.prefixlen > 29:
            raise Invalid(f"subnet {self.subnet} has no room for guests", next="Use a prefix of 29 or less")
        if self.forward not in FORWARD_MODES:
            raise Invalid(f"forward mode {self.forward!r}", next=f"Use {', '.join(FORWARD_MODES)}")
        if self.dhcp_lease_s < LEASE_MIN_S:
            raise Invalid(f"DHCP lease of {self.dhcp_lease_s} s", next=f"Use {LEASE_MIN_S} s or more")

    @property
    def gateway(self) -> str:
        return str(IPv4Network(self.subnet)[1])

    @property
    def bridge(self) -> str:
        """Name of the bridge: at most 15 characters, the kernel's limit for interfaces."""
        plain = f"br-{self.name}"
        return plain if len(plain) <= _BRIDGE_MAX else f"br-{self.name[:3]}-{zlib.crc32(self.name.encode()):08x}"


@dataclass(frozen=True)
class DhcpHost:
    """One DHCP host entry: this MAC gets this IP."""

    mac: str
    ip: str
    name: str = ""


@dataclass(frozen=True)
class Lease:
    """A lease dnsmasq gave. ``expires_at``: seconds since the epoch."""

    mac: str
    ip: str
    hostname: str
    expires_at: int


def network_xml(spec: NetworkSpec) -> str:
    """The libvirt definition of ``spec``; valid with no DHCP host entry at all."""
    root = ET.Element("network")
    ET.SubElement(root, "name").text = spec.name
    if spec.forward != "isolated":
        ET.SubElement(root, "forward", mode=spec.forward)
    ET.SubElement(root, "bridge", name=spec.bridge, stp="off", delay="0")
    ET.SubElement(root, "domain", name=spec.name, localOnly="yes")
    subnet = IPv4Network(spec.subnet)
    ip = ET.SubElement(root, "ip", address=spec.gateway, prefix=str(subnet.prefixlen))
    dhcp = ET.SubElement(ip, "dhcp")
    # dnsmasq serves host entries only once it has any range or entry; this one is never used (its address is
    # the gateway's own) and spares a restart of dnsmasq with the first guest and after the last.
    dhcp.append(host_element(_placeholder(spec), spec.dhcp_lease_s))
    return ET.tostring(root, encoding="unicode")


def _placeholder(spec: NetworkSpec) -> DhcpHost:
    # Locally administered and outside every MAC prefix HDCS gives out.
    return DhcpHost("02:00:00:00:00:01", spec.gateway, _PLACEHOLDER)


def host_element(entry: DhcpHost, lease_s: int) -> ET.Element:
    element = ET.Element("host", mac=entry.mac, ip=entry.ip)
    if entry.name:
        element.set("name", entry.name)
    ET.SubElement(element, "lease", expiry=str(lease_s), unit="seconds")
    return element


def read_network(text: str) -> NetworkSpec | None:
    """The spec that libvirt's ``text`` fulfils; None when HDCS would not write such a network."""
    root = ET.fromstring(text)
    ip, forward = root.find("ip"), root.find("forward")
    expiry = root.find("ip/dhcp/host/lease")
    if ip is None or root.find("ip/dhcp/range") is not None:
        return None
    try:
        subnet = IPv4Network(f"{ip.get('address')}/{ip.get('prefix') or ip.get('netmask')}", strict=False)
        spec = NetworkSpec(
            name=root.findtext("name", ""),
            subnet=str(subnet),
            forward="isolated" if forward is None else forward.get("mode", ""),
            dhcp_lease_s=LEASE_MIN_S if expiry is None else int(expiry.get("expiry", "0")),
        )
    except (ValueError, Invalid):
        return None
    bridge = root.find("bridge")
    same = ip.get("address") == spec.gateway and bridge is not None and bridge.get("name") == spec.bridge
    return spec if same else None


def read_dhcp_hosts(text: str) -> list[DhcpHost]:
    found = (
        DhcpHost(e.get("mac", "").lower(), e.get("ip", ""), e.get("name", ""))
        for e in ET.fromstring(text).findall("ip/dhcp/host")
    )
    return [entry for entry in found if entry.name != _PLACEHOLDER]


def _lookup(host: Host, name: str) -> Any | None:
    try:
        return host.conn.networkLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
            return None
        raise


def _network(host: Host, name: str) -> Any:
    found = _lookup(host, name)
    if found is None:
        raise NotFound(f"no network {name} on this server node", next="It is made when the server node joins")
    return found


def ensure_network(host: Host, spec: NetworkSpec) -> bool:
    """Make the network exist and run as ``spec`` says; True if something had to change.

    One that differs is replaced when no guest is plugged into it; else Conflict. Its DHCP host entries go with it.
    """
    with libvirt_errors(f"set up network {spec.name}"):
        current = _lookup(host, spec.name)
        if current is not None and read_network(current.XMLDesc(0)) == spec:
            if current.isActive():
                return False
            current.create()
            return True
        if current is not None:
            _remove(current, spec.name)
        made = host.conn.networkDefineXMLFlags(network_xml(spec), libvirt.VIR_NETWORK_DEFINE_VALIDATE)
        try:
            made.create()
            made.setAutostart(1)
        except libvirt.libvirtError:
            made.undefine()
            raise
    return True


def _remove(network: Any, name: str) -> None:
    if network.isActive():
        ports = network.listAllPorts(0)
        if ports:
            raise Conflict(
                f"network {name} must change, but {len(ports)} guests are plugged into it",
                next="Move or stop the guests of this server node, then restart its worker",
            )
        network.destroy()
    if network.isPersistent():
        network.undefine()


def remove_network(host: Host, name: str) -> bool:
    """Remove the network; True if there was one. Raises Conflict when guests are plugged into it."""
    with libvirt_errors(f"remove network {name}"):
        current = _lookup(host, name)
        if current is None:
            return False
        _remove(current, name)
    return True


def add_dhcp_host(host: Host, network: str, mac: str, ip: str, name: str = "") -> bool:
    """Give ``mac`` the address ``ip`` by DHCP from now on; True if something had to change.

    An older entry with the same MAC, IP or name is stale and goes. Live only: a rebooted host has no guests and
    starts with none. Raises NotFound (no such network), Invalid (IP not of the subnet).
    """
    wanted = DhcpHost(mac.lower(), ip, name)
    with libvirt_errors(f"add DHCP host {mac} {ip} to network {network}"):
        handle = _network(host, network)
        text = handle.XMLDesc(0)
        spec = read_network(text)
        _check_ip(spec, network, ip)
        entries = read_dhcp_hosts(text)
        if wanted in entries:
            return False
        for entry in entries:
            if entry.mac == wanted.mac or entry.ip == wanted.ip or (name and entry.name == name):
                _update(handle, libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, host_element(entry, LEASE_MIN_S))
        lease_s = LEASE_MIN_S if spec is None else spec.dhcp_lease_s
        _update(handle, libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, host_element(wanted, lease_s))
    return True


def _check_ip(spec: NetworkSpec | None, network: str, ip: str) -> None:
    try:
        fits = spec is None or (ip_address(ip) in IPv4Network(spec.subnet) and ip != spec.gateway)
    except ValueError:
        fits = False
    if not fits:
        subnet = spec.subnet if spec else "?"
        raise Invalid(f"{ip!r} is no guest address of network {network} ({subnet})", next="Reserve one of its subnet")


def _update(network: Any, command: int, element: ET.Element) -> None:
    text = ET.tostring(element, encoding="unicode")
    network.update(command, libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST, -1, text, _LIVE)


def remove_dhcp_host(host: Host, network: str, mac: str) -> bool:
    """Forget the DHCP host entry of ``mac``; True if there was one. An absent network is a success (False)."""
    with libvirt_errors(f"remove DHCP host {mac} from network {network}"):
        handle = _lookup(host, network)
        if handle is None or not handle.isActive():
            return False
        found = [entry for entry in read_dhcp_hosts(handle.XMLDesc(0)) if entry.mac == mac.lower()]
        for entry in found:
            _update(handle, libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, host_element(entry, LEASE_MIN_S))
    return bool(found)


def dhcp_hosts(host: Host, network: str) -> list[DhcpHost]:
    """The DHCP host entries of a network. Raises NotFound."""
    with libvirt_errors(f"read network {network}"):
        return read_dhcp_hosts(_network(host, network).XMLDesc(0))


def leases(host: Host, network: str) -> list[Lease]:
    """The DHCP leases in force. Raises NotFound."""
    with libvirt_errors(f"read the leases of network {network}"):
        found = _network(host, network).DHCPLeases()
    return [Lease(e["mac"], e["ipaddr"], e.get("hostname") or "", int(e["expirytime"])) for e in found]
