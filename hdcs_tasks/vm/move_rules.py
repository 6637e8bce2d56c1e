"""Pure decisions about moves: which way a VM goes, and where a stopped one goes when its domain node is emptied."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from hdcs_tasks.errors import Invalid
from hdcs_tasks.states import VmState

MOVABLE = frozenset({VmState.RUNNING, VmState.SUSPENDED, VmState.STOPPED, VmState.SAVED})
ALIVE = frozenset({VmState.RUNNING, VmState.SUSPENDED})


class Way(StrEnum):
    """How a VM moves.

    ``live``: inside its domain node, running. ``saved``: inside it, its memory by way of the shared storage.
    ``move``: to another domain node, running, its own disk layer with it. ``carry``: to another domain node, its files
    copied while it does not run (a running one is saved before and goes on there). ``nothing``: it needs no move.
    """

    LIVE = "live"
    SAVED = "saved"
    MOVE = "move"
    CARRY = "carry"
    NOTHING = "nothing"


@dataclass(frozen=True)
class MoveOptions:
    """``bandwidth_mib_s``: None as fast as it goes. ``postcopy``: let the guest go on at the target before all of its
    memory is there (inside a domain node only). ``auto_converge``: slow a guest down that writes faster than it moves.
    """

    live: bool = True
    bandwidth_mib_s: int | None = None
    postcopy: bool = False
    auto_converge: bool = True

    def __post_init__(self) -> None:
        if self.bandwidth_mib_s is not None and not 1 <= self.bandwidth_mib_s <= 1_000_000:
            raise Invalid(f"a bandwidth of {self.bandwidth_mib_s} MiB/s", next="Give 1 or more, or none for no limit")
        if self.postcopy and not self.live:
            raise Invalid("post-copy is a way of moving live", next="Leave one of the two out")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def way_of(state: VmState, *, same_home: bool, live: bool) -> Way:
    """How a VM in ``state`` moves: inside its domain node (``same_home``) or to another one."""
    if state in ALIVE:
        if same_home:
            return Way.LIVE if live else Way.SAVED
        return Way.MOVE if live else Way.CARRY
    return Way.NOTHING if same_home else Way.CARRY


@dataclass(frozen=True)
class Shelf:
    """A domain node as a VM that does not run sees it: its storage. ``free_disk_bytes``: what it may still promise."""

    domain_node: str
    free_disk_bytes: int
    has_image: bool


def choose_shelf(shelves: Sequence[Shelf], disk_bytes: int, exclude: Collection[str] = ()) -> str | None:
    """Where a stopped VM's disk goes: where its image is already, then where most may still be promised."""
    fitting = [s for s in shelves if s.domain_node not in exclude and s.free_disk_bytes >= disk_bytes]
    fitting.sort(key=lambda s: (not s.has_image, -s.free_disk_bytes, s.domain_node))
    return fitting[0].domain_node if fitting else None


def may_begin(limit: int, running: int, waiting: int) -> int:
    """How many more moves of a drain begin now."""
    return max(0, min(limit - running, waiting))
