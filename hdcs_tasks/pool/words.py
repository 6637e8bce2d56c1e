"""Decisions about capacity in words. Pure."""

from __future__ import annotations

import math

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.pool.rules import Choice, Shape, need_of


def wanted_words(shape: Shape, settings: CapacitySettings) -> str:
    """What a VM of this shape claims, as it stands beside what is free: ``2 vCPU, 2303 MiB: 2048 guest + 255
    overhead``; where less than it has is claimed: ``1 of 2 vCPU, 1269 MiB: 1024 of 2048 guest + 245 overhead``."""
    need = need_of(shape, settings)
    own = math.ceil(shape.memory_mib / shape.memory_overcommit)
    vcpus = str(need.vcpus) if need.vcpus == shape.vcpus else f"{need.vcpus} of {shape.vcpus}"
    words = f"{vcpus} vCPU, {need.memory_mib} MiB"
    if need.memory_mib == shape.memory_mib == own:
        return words
    guest = str(own) if own == shape.memory_mib else f"{own} of {shape.memory_mib}"
    return f"{words}: {guest} guest + {need.memory_mib - own} overhead"


def explain(choice: Choice, shape: Shape, settings: CapacitySettings, profile: str = "") -> str:
    """The choice in words: why this pool, or why none, naming every server node."""
    name = f"profile {profile} " if profile else ""
    wanted = f"{name}({wanted_words(shape, settings)})"
    if choice.domain_node is None:
        refused = "; ".join(f"{v.domain_node}: {v.why}" for v in choice.verdicts)
        return f"no domain node fits {wanted}: {refused or 'there is none'}"
    best = choice.verdicts[0]
    image = "has the image" if best.has_image else "needs the image brought"
    others = "; ".join(f"{v.domain_node}: {v.why or f'{v.vms} fit, load {v.load:.0%}'}" for v in choice.verdicts[1:])
    return f"{best.domain_node} takes {wanted}: {best.vms} fit, {image}, load {best.load:.0%}" + (
        f". Others: {others}" if others else ""
    )
