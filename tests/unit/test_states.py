"""The state machines: whole, connected, and drawn as they are."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import pytest

from hdcs_tasks.errors import WrongState
from hdcs_tasks.states import (
    MACHINES,
    OPERATION_LIVE,
    STEP_LIVE,
    VM_HOLDS_GUEST,
    OperationState,
    StepState,
    VmState,
    check,
    document,
)
from hdcs_tasks.vm.rules import COMMANDS

machines = pytest.mark.parametrize("machine", list(MACHINES), ids=lambda m: m.__name__)


def test_the_document_is_current() -> None:
    path = Path(__file__).parents[2] / "docs" / "states.md"
    assert path.read_text() == document(), "run: python -m hdcs_tasks.states > docs/states.md"


@machines
def test_every_state_is_in_its_machine_and_can_be_reached(machine: type[StrEnum]) -> None:
    moves = MACHINES[machine]
    assert set(moves) == set(machine)
    reached, edge = set(), {next(iter(machine))}
    while edge:
        reached |= edge
        edge = {new for old in edge for new in moves[old]} - reached
    assert reached == set(machine)


@machines
def test_no_state_is_a_dead_end_but_the_last(machine: type[StrEnum]) -> None:
    ends = {state for state, moves in MACHINES[machine].items() if not moves}
    assert {str(end) for end in ends} <= {"done", "failed", "cancelled", "deleted", "cleared"}


def test_live_means_not_ended() -> None:
    assert {state for state in OperationState if MACHINES[OperationState][state]} == OPERATION_LIVE
    assert {state for state in StepState if MACHINES[StepState][state]} == STEP_LIVE


def test_a_forced_stop_and_a_delete_can_begin_whatever_holds_the_guest() -> None:
    assert len(VM_HOLDS_GUEST) > 1
    for state in VM_HOLDS_GUEST - {VmState.STOPPING}:
        check(state, VmState.STOPPING, "VM x")
        check(state, VmState.DELETING, "VM x")


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_every_command_can_begin_end_and_fail_from_where_it_may_be_given(verb: str) -> None:
    what = COMMANDS[verb]
    assert what.given_in
    for given in what.given_in:
        if given is not what.via:
            check(given, what.via, "VM x")
    check(what.via, what.to, "VM x")
    check(what.via, VmState.FAILED, "VM x")
    for rest in what.given_in & {VmState.RUNNING, VmState.SUSPENDED}:
        check(what.via, rest, "VM x")


def test_an_illegal_move_says_so() -> None:
    with pytest.raises(WrongState, match="VM desk-01 is deleted and cannot become running"):
        check(VmState.DELETED, VmState.RUNNING, "VM desk-01")
