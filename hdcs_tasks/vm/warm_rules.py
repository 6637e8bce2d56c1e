"""What a warm pool needs next, so that it holds as many ready desktops as it should. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hdcs_tasks.states import VmState

_COMING = frozenset(
    {VmState.CREATING, VmState.STARTING, VmState.SAVING, VmState.STOPPED, VmState.RUNNING, VmState.SAVED}
)


@dataclass(frozen=True, slots=True)
class Member:
    """A desktop of the pool. ``fresh``: of the image's newest version; ``answers``: its agent did since its start;
    ``busy``: an operation is at work on it."""

    vm: str
    fresh: bool
    state: VmState
    answers: bool
    busy: bool


class WarmPlan(NamedTuple):
    """``clone``: how many; ``start``, ``save``, ``delete``: VMs."""

    clone: int
    start: tuple[str, ...]
    save: tuple[str, ...]
    delete: tuple[str, ...]


def is_ready(member: Member, saved: bool) -> bool:
    """Whether somebody could take it now: started and answering, or with its memory saved."""
    if not member.fresh or member.busy:
        return False
    return member.state is VmState.SAVED if saved else member.state is VmState.RUNNING and member.answers


def plan(members: Sequence[Member], *, size: int, saved: bool) -> WarmPlan:
    """Members that are of an older version, or broken, go; those too many go too, those least ready first. What is at
    work is left alone until it has ended."""
    kept = [m for m in members if m.fresh and m.state in _COMING]
    gone = [
        m.vm for m in members if not (m.fresh and m.state in _COMING) and not m.busy and m.state is not VmState.DELETING
    ]
    by_use = sorted(kept, key=lambda m: (is_ready(m, saved), m.busy, m.vm))
    surplus = [m for m in by_use[: max(0, len(kept) - size)] if not m.busy]
    rest = [m for m in kept if m not in surplus and not m.busy]
    start = [m.vm for m in rest if m.state is VmState.STOPPED or (m.state is VmState.SAVED and not saved)]
    save = [m.vm for m in rest if saved and m.state is VmState.RUNNING and m.answers]
    return WarmPlan(max(0, size - len(kept)), tuple(start), tuple(save), tuple([*gone, *(m.vm for m in surplus)]))
