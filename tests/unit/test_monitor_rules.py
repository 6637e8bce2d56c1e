"""What a VM that failed is, by what server nodes see."""

from __future__ import annotations

import pytest

from hdcs_tasks.monitor.rules import Sighting, settled_state
from hdcs_tasks.states import VmState

HERE, THERE = Sighting("node1", "running"), Sighting("node2", "running")


@pytest.mark.parametrize(
    ("seen", "all_looked", "state"),
    [
        ([HERE], True, VmState.RUNNING),
        ([HERE], False, VmState.RUNNING),
        ([Sighting("node1", "paused")], True, VmState.SUSPENDED),
        ([], True, VmState.STOPPED),
        ([], False, None),
        ([THERE], True, None),
        ([HERE, THERE], True, None),
    ],
)
def test_a_failed_vm_is_what_its_home_sees(seen: list[Sighting], all_looked: bool, state: VmState | None) -> None:
    assert settled_state(seen, "node1", all_looked=all_looked) is state
