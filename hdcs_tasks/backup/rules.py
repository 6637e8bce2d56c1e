"""Pure decisions about backups: full or increment, and which point an increment follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hdcs_tasks.states import BackupState


@dataclass(frozen=True)
class Point:
    """One point of a VM's chain as the record has it."""

    id: str
    chain: str
    seq: int
    state: BackupState
    domain_node: str
    checkpoint: str | None


@dataclass(frozen=True)
class Plan:
    """What the next backup is; ``parent`` is None for a full one, and ``why`` says why it is full."""

    kind: str
    seq: int
    parent: Point | None
    why: str


def next_point(points: Sequence[Point], *, home: str, full: bool, chain_max: int = 64) -> Plan:
    """The next backup of a VM whose points are given oldest first.

    An increment follows the newest point if that is ready, has its checkpoint and lies in the VM's own domain node.
    """
    newest = points[-1] if points else None
    if full:
        return Plan("full", 1, None, "asked for")
    if newest is None:
        return Plan("full", 1, None, "the first of this VM")
    if newest.state is not BackupState.READY or newest.checkpoint is None:
        return Plan("full", 1, None, f"the chain is broken: its newest point is {newest.state}")
    if newest.domain_node != home:
        return Plan("full", 1, None, f"the chain lies in {newest.domain_node}")
    if newest.seq >= chain_max:
        return Plan("full", 1, None, f"the chain has {newest.seq} points")
    return Plan("increment", newest.seq + 1, newest, "follows the newest point")
