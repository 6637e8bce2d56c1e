"""Pure decisions of monitoring: has a guest gone, is it as recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hdcs_tasks.states import VmState

FRESH_S = 5.0
"""A sample this much older than a VM's last change of state says nothing about it (clocks of nodes differ a little)."""


def has_gone(*, listed: bool, sampled_after_change_s: float) -> bool:
    """Whether a VM recorded as running has ended behind our back, as far as this sample can tell."""
    return not listed and sampled_after_change_s > FRESH_S


@dataclass(frozen=True)
class Drift:
    """A guest is in another state than its VM: what the record becomes, and how the event tells it."""

    to: VmState
    event: str
    message: str


_DRIFTS = {
    (VmState.RUNNING, "paused"): Drift(VmState.SUSPENDED, "vm.paused", "its guest was paused behind our back "
                                       "(by hand, or by a full storage)"),
    (VmState.SUSPENDED, "running"): Drift(VmState.RUNNING, "vm.resumed", "its guest was resumed behind our back"),
}  # fmt: skip


def drift_of(state: VmState, seen: str, *, sampled_after_change_s: float) -> Drift | None:
    """What a listed guest's state says against the record's; None: they agree, or the sample is too old to tell."""
    return _DRIFTS.get((state, seen)) if sampled_after_change_s > FRESH_S else None


@dataclass(frozen=True)
class Sighting:
    """A guest of a VM as a server node's sample has it: ``state`` running or paused."""

    node: str
    state: str


def settled_state(seen: Sequence[Sighting], server_node: str | None, *, all_looked: bool) -> VmState | None:
    """What a VM that failed is, by what the server nodes of its home saw after that; None: nothing may be concluded.

    A guest where the record has it is the VM's. None anywhere means stopped, if all have looked. A guest elsewhere, or
    two, is for an operator to look at.
    """
    if not seen:
        return VmState.STOPPED if all_looked else None
    if len(seen) > 1 or seen[0].node != server_node:
        return None
    return VmState.SUSPENDED if seen[0].state == "paused" else VmState.RUNNING
