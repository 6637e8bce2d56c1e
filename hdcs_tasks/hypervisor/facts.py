"""What a server node is: processors, memory, versions, and whether KVM really works."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree as ET

import libvirt

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import HdcsError, HypervisorRefused
from hdcs_tasks.hypervisor import processes
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.hypervisor.xml import MACHINE

KVM_PROBE_S = 3.0
# A boot sector that counts 2^24 down to 0, then writes 0x2A to port 0xF4, where QEMU's debug-exit device ends QEMU
# with (0x2A << 1) | 1: nothing but running guest code gives that exit code. The counting takes milliseconds on KVM
# and 0.1 s on TCG. Without it a KVM on which no system ever boots (it crawls through the firmware in 2.7 s and does
# not end the loop in 12 s; seen in a nested set-up) would pass for one that works.
_BOOT_SECTOR = (
    bytes.fromhex(
        "6631c9"  # xor ecx, ecx
        "6681c100000001"  # add ecx, 1 << 24
        "664975fc"  # dec ecx; jnz back to it
        "b02ae6f4f4"  # mov al, 0x2a; out 0xf4, al; hlt
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)
_BOOTED = (0x2A << 1) | 1


@dataclass(frozen=True)
class HostFacts:
    """A server node's hardware and software. ``cpu_mhz`` is the clock now; ``max_vcpus`` of one guest of
    ``virt_type`` ("kvm" or "qemu"); versions are "9.0.0"."""

    hostname: str
    cpu_mhz: int
    sockets: int
    cores_per_socket: int
    threads_per_core: int
    max_vcpus: int
    memory_mib: int
    virt_type: str
    kvm_usable: bool
    libvirt_version: str
    emulator_version: str


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def facts(host: Host, settings: Settings) -> HostFacts:
    """The facts of the host this process runs on, as libvirt tells them; ``settings.host_memory_mib`` overrides.

    Raises HypervisorRefused when ``settings.virt_type`` asks for KVM and no guest boots on it, Unreachable.
    """
    with libvirt_errors("read the host's facts"):
        _, _, _cpus, mhz, numa_nodes, sockets, cores, threads = host.conn.getInfo()
        # Not getInfo's memory: that adds up NUMA nodes, which lack memory plugged in later (4.8 of 24 GiB seen).
        memory_mib = host.conn.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)["total"] // 1024
        hostname = host.conn.getHostname()
        libvirt_version = _version(host.conn.getLibVersion())
        emulator_version = _version(host.conn.getVersion())
    usable = settings.virt_type != "qemu" and kvm_usable(_emulator(host))
    if settings.virt_type == "kvm" and not usable:
        raise HypervisorRefused(
            "HDCS_VIRT_TYPE is kvm, but no guest boots on KVM here",
            next="Check /dev/kvm and nested virtualisation, or set HDCS_VIRT_TYPE=qemu (slow)",
        )
    virt_type = "kvm" if usable else "qemu"
    with libvirt_errors("read the host's facts"):
        max_vcpus = host.conn.getMaxVcpus(virt_type)
    return HostFacts(
        hostname=hostname, cpu_mhz=mhz, sockets=sockets * numa_nodes, cores_per_socket=cores,
        threads_per_core=threads, max_vcpus=max_vcpus, memory_mib=settings.host_memory_mib or memory_mib,
        virt_type=virt_type, kvm_usable=usable, libvirt_version=libvirt_version, emulator_version=emulator_version,
    )  # fmt: skip


def _emulator(host: Host) -> str:
    """The QEMU binary libvirt would run."""
    with libvirt_errors("ask which emulator libvirt runs"):
        text = host.conn.getDomainCapabilities(None, "x86_64", MACHINE, "qemu", 0)
    return ET.fromstring(text).findtext("path", "")


@lru_cache(maxsize=4)
def kvm_usable(emulator: str) -> bool:
    """Whether a throwaway guest boots on KVM within 3 s; asked once per process.

    That /dev/kvm opens and libvirt lists "kvm" says little: under some hypervisors no guest ever gets to run.
    """
    with tempfile.NamedTemporaryFile(prefix="hdcs-kvm-probe-") as disk:
        Path(disk.name).write_bytes(boot_sector())
        return boots(emulator, "kvm", disk.name, KVM_PROBE_S)


def boot_sector() -> bytes:
    """The 512 bytes the probe boots."""
    return _BOOT_SECTOR


def boots(emulator: str, accelerator: str, disk: str, timeout_s: float) -> bool:
    """Whether the boot sector in ``disk`` gets to run under ``accelerator``."""
    argv = [
        emulator, "-accel", accelerator, "-machine", MACHINE, "-m", "16", "-display", "none", "-nodefaults",
        "-no-user-config", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x01",
        "-drive", f"file={disk},format=raw,if=ide,readonly=off", "-boot", "c",
    ]  # fmt: skip
    try:
        return processes.run(argv, timeout_s=timeout_s, ok=(_BOOTED,)).exit_code == _BOOTED
    except HdcsError:
        return False


__all__ = ["HostFacts", "boot_sector", "boots", "facts", "kvm_usable"]
