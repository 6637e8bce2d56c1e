"""Pure decisions of monitoring: is a desktop idle, has its guest gone."""

from __future__ import annotations

from dataclasses import dataclass

from hdcs_tasks.states import VmState

EXEMPT_TAG = "always-on"
FRESH_S = 5.0
"""A sample this much older than a VM's last change of state says nothing about it (clocks of nodes differ a little)."""


@dataclass(frozen=True)
class Activity:
    """What one sample shows of a running guest. ``cpu_percent``: share of one vCPU since the sample before, or None."""

    cpu_percent: float | None
    console_clients: int


def is_active(seen: Activity, *, cpu_limit_percent: float) -> bool:
    """Whether somebody seems to use the desktop. A first sample, with no rate yet, counts as use: fail closed."""
    return seen.console_clients > 0 or seen.cpu_percent is None or seen.cpu_percent > cpu_limit_percent


def is_idle(idle_s: float, *, idle_after_s: float, tags: list[str]) -> bool:
    """Whether a desktop unused for ``idle_s`` is to be taken back; 0 turns reclamation off."""
    return idle_after_s > 0 and idle_s >= idle_after_s and EXEMPT_TAG not in tags


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
