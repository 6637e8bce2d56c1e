"""What a guest is to be (``GuestSpec``) and what it is seen to be (``GuestInfo``). Values only, JSON-able."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from ipaddress import ip_address
from typing import Any
from uuid import UUID

from hdcs_tasks.errors import Invalid
from hdcs_tasks.routing import check_name

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_USB_RULE = re.compile(r"(0x[0-9a-fA-F]{1,2}|-1),(0x[0-9a-fA-F]{1,4}|-1),(0x[0-9a-fA-F]{1,4}|-1),-1,([01])")
CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")


def _require(ok: bool, what: str, advice: str) -> None:
    if not ok:
        raise Invalid(f"guest spec: {what}", next=advice)


@dataclass(frozen=True)
class UsbRule:
    """One line of a USB policy; None matches everything."""

    usb_class: int | None
    vendor: int | None
    product: int | None
    allow: bool


def usb_rules(policy: str) -> tuple[UsbRule, ...]:
    """The rules of a USB policy other than "on" and "off", first match wins.

    ``policy`` is SPICE's own filter text: ``class,vendor,product,-1,allow`` joined by ``|``, for example
    ``0x08,-1,-1,-1,1|-1,-1,-1,-1,0`` (mass storage only). Raises Invalid.
    """
    rules = []
    for text in policy.split("|"):
        match = _USB_RULE.fullmatch(text.strip())
        if match is None:
            raise Invalid(
                f"{policy!r} is not a USB policy: {text!r} cannot be read",
                next="Use on, off, or class,vendor,product,-1,0|1 joined by '|', e.g. 0x08,-1,-1,-1,1|-1,-1,-1,-1,0",
            )
        numbers = [None if part == "-1" else int(part, 16) for part in match.groups()[:3]]
        rules.append(UsbRule(numbers[0], numbers[1], numbers[2], match.group(4) == "1"))
    return tuple(rules)


@dataclass(frozen=True)
class GuestSpec:
    """Everything a server node needs to start a guest. Travels in messages: no secrets.

    ``disks``: absolute paths of qcow2 files, the first one boots. ``usb``: "on", "off" or a policy (``usb_rules``).
    ``virt_type``: "kvm" or "qemu". ``operation``, ``step``, ``attempt``: who asked, kept in the guest's metadata.
    ``disk_cache``: QEMU's cache mode; only "none" migrates safely on storage libvirt does not know.
    ``serial_log``: file that receives the serial console; empty gives a pty. ``kernel``, ``initrd``, ``cmdline``:
    boot this kernel instead of the disk's boot loader. ``network`` empty: no network card. ``disk_key``: name of the
    key the disks are encrypted with. Raises Invalid when made of nonsense.
    """

    vm_id: str
    name: str
    vcpus: int
    memory_mib: int
    disks: tuple[str, ...]
    mac: str
    network: str
    console_port: int
    virt_type: str = "qemu"
    console_listen: str = "0.0.0.0"
    usb: str = "off"
    operation: str = ""
    step: str = ""
    attempt: int = 0
    disk_cache: str = "none"
    serial_log: str = ""
    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    disk_key: str = ""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "vm_id", str(UUID(self.vm_id)))
            ip_address(self.console_listen)
        except (ValueError, AttributeError, TypeError) as error:
            raise Invalid(f"guest spec: {error}", next="vm_id is a UUID, console_listen an IP address") from None
        object.__setattr__(self, "disks", tuple(self.disks))
        object.__setattr__(self, "mac", str(self.mac).lower())
        check_name("VM", self.name)
        if self.network:
            check_name("network", self.network)
        if self.disk_key:
            check_name("key", self.disk_key)
        _require(self.virt_type in ("kvm", "qemu"), f"virt type {self.virt_type!r}", "Use kvm or qemu")
        _require(self.vcpus >= 1, f"{self.vcpus} vCPUs", "Give at least one")
        _require(self.memory_mib >= 16, f"{self.memory_mib} MiB of memory", "Give at least 16")
        _require(_MAC.fullmatch(self.mac) is not None, f"MAC {self.mac!r}", "Write it as 52:54:00:12:34:56")
        _require(1 <= self.console_port <= 65535, f"console port {self.console_port}", "Use 1 to 65535")
        _require(self.disk_cache in CACHE_MODES, f"disk cache {self.disk_cache!r}", f"Use {', '.join(CACHE_MODES)}")
        for path in (*self.disks, *filter(None, (self.serial_log, self.kernel, self.initrd))):
            plain = path.startswith("/") and ".." not in path.split("/") and path.isprintable()
            _require(plain, f"path {path!r}", "Paths are absolute, printable and free of '..'")
        if self.usb not in ("on", "off"):
            usb_rules(self.usb)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "disks": list(self.disks)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GuestSpec:
        """The spec ``to_dict`` gave; keys of a newer version are left aside. Raises Invalid."""
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{key: value for key, value in data.items() if key in known})
        except TypeError as error:
            raise Invalid(f"guest spec: {error}", next="Send it as GuestSpec.to_dict() gave it") from None


@dataclass(frozen=True)
class GuestInfo:
    """A guest as observed. ``state``: running | paused | shutoff | crashed. ``addresses``: IPs by DHCP lease."""

    vm_id: str
    name: str
    state: str
    memory_mib: int
    vcpus: int
    mac: str = ""
    network: str = ""
    console_port: int = 0
    disks: tuple[str, ...] = ()
    operation: str = ""
    step: str = ""
    attempt: int = 0
    addresses: tuple[str, ...] = ()

    @property
    def active(self) -> bool:
        return self.state in ("running", "paused")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "disks": list(self.disks), "addresses": list(self.addresses)}
