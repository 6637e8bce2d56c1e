"""Moves whose server nodes, workers or networks fail in a phase of theirs: one good copy is left, and nothing else.

The cases that differ most from each other; ``python -m tests.chaos moves`` does every one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.lab.center import Center
from tests.chaos import moves
from tests.chaos.moves import BOTH, ENDS, Case

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

CASES = [
    Case("live", "prepare", "target dies"),
    Case("live", "perform", "cut target"),
    Case("live", "perform", "source dies"),
    Case("live", "finish", "kill target's worker"),
    Case("live", "clean", "source dies"),
    Case("move", "prepare", "cut source"),
    Case("move", "perform", "cut source"),
    Case("move", "perform", BOTH),
    Case("move", "perform", "target dies"),
    Case("move", "perform", ENDS),
    Case("move", "finish", "cut target"),
    Case("move", "clean", "source dies"),
    Case("saved", "save", "cut source"),
    Case("saved", "start", "target dies"),
    Case("carry", "save", "target dies"),
    Case("carry", "offer", "kill source's worker"),
    Case("carry", "fetch", "cut target"),
    Case("carry", "start", "kill target's worker"),
    Case("carry", "discard", "source dies"),
]


@pytest.fixture(scope="module")
def center(lab_possible: None) -> Iterator[Center]:
    with moves.lab() as made:
        yield made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_good_copy_is_left(center: Center, case: Case) -> None:
    moves.one(center, case)
