"""What each feature registers with the ledger: how a kind of operation begins, and how each step's end is settled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.store.models import Operation, Step

if TYPE_CHECKING:
    from hdcs_tasks.operations.control import Tx

Done = Callable[["Tx", Operation, Step, dict[str, Any]], None]
Failed = Callable[["Tx", Operation, Step, HdcsError], None]
ON_DONE: dict[str, Done] = {}
ON_FAILED: dict[str, Failed] = {}
NoRoom = Callable[["Tx", Operation, Step, HdcsError], bool]
ON_NO_ROOM: dict[str, NoRoom] = {}
ChildEnded = Callable[["Tx", Operation, list[Operation]], int | None]
ON_CHILD_ENDED: dict[str, ChildEnded] = {}
Start = Callable[["Tx", Operation], None]
ON_START: dict[str, Start] = {}

PLANS: dict[str, Mapping[str, float]] = {}


def plan_steps(kind: str, weights: Mapping[str, float]) -> None:
    """The steps an operation of this kind usually takes, and what each is of the whole (any unit), for its progress;
    ``a|b``: one of these. A kind without a plan is taken for one step."""
    PLANS[kind] = weights


def on_start(kind: str) -> Callable[[Start], Start]:
    """Register what adds the first step of this kind of operation, from the records as they are when it begins."""

    def register(function: Start) -> Start:
        ON_START[kind] = function
        return function

    return register


def on_done(*steps: str) -> Callable[[Done], Done]:
    """Register what settles these steps when they succeeded.

    ``kind:step`` is asked after ``step`` in operations of that kind: how a feature goes on after another's step.
    """

    def register(function: Done) -> Done:
        for step in steps:
            ON_DONE[step] = function
        return function

    return register


def on_failed(*steps: str) -> Callable[[Failed], Failed]:
    """Register what settles these steps when they failed for good or were cancelled. Keys as in ``on_done``."""

    def register(function: Failed) -> Failed:
        for step in steps:
            ON_FAILED[step] = function
        return function

    return register


def on_child_ended(kind: str) -> Callable[[ChildEnded], ChildEnded]:
    """Register what goes on in a parent of this kind when one of its children has ended (all of them are given), in
    place of its ending with the last of them: a parent that opens its children little by little. It returns how many
    are still to be opened, and the parent ends as others do once there is none; or None, and ends it itself."""

    def register(function: ChildEnded) -> ChildEnded:
        ON_CHILD_ENDED[kind] = function
        return function

    return register


def on_no_room(*steps: str) -> Callable[[NoRoom], NoRoom]:
    """Register what may find another way for these steps when layer two has no room: True, and it has added the steps
    to take instead; False, and the step waits."""

    def register(function: NoRoom) -> NoRoom:
        for step in steps:
            ON_NO_ROOM[step] = function
        return function

    return register
