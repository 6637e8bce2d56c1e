"""Pure: does what an owner asks for stay within the quota."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Amounts:
    """What an owner has, or asks for. ``running_vms``, ``vcpus``, ``memory_mib``: of VMs that run or are about to;
    ``vms``, ``disk_bytes``: of all there are."""

    vms: int = 0
    running_vms: int = 0
    vcpus: int = 0
    memory_mib: int = 0
    disk_bytes: int = 0


NAMES = tuple(field.name for field in fields(Amounts))
_WORDS = {"vms": "VMs", "running_vms": "running VMs", "vcpus": "vCPUs of running VMs",
          "memory_mib": "MiB of memory of running VMs", "disk_bytes": "bytes of disk"}  # fmt: skip


def refusals(limits: Mapping[str, int | None], used: Amounts, asked: Amounts) -> list[str]:
    """Every limit that would be passed, in words; empty: all is well. What is not asked for is never refused."""
    found = []
    for name in NAMES:
        limit, has, more = limits.get(name), getattr(used, name), getattr(asked, name)
        if limit is not None and more > 0 and has + more > limit:
            found.append(f"{more} more {_WORDS[name]} with {has} in use, {limit} allowed")
    return found
