"""What a bench says: figures, each beside its raw baseline from the same run, and whether its goal is met."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Figure:
    """``ratio`` is value / baseline where both are of one kind. ``goal`` in words; ``met`` None: told, not judged."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None


def judged(
    name: str,
    value: float,
    unit: str,
    baseline: float | None,
    goal: float,
    sense: Literal[">=", "<="],
    of: str = "ratio",
) -> Figure:
    """A figure with a goal for its ratio to the baseline, or (``of="value"``) for the value itself."""
    ratio = value / baseline if baseline else None
    measured = value if of == "value" or ratio is None else ratio
    met = measured >= goal if sense == ">=" else measured <= goal
    return Figure(name, round(value, 4), unit, baseline and round(baseline, 4), ratio and round(ratio, 4),
                  f"{of} {sense} {goal}", met)  # fmt: skip


def report(bench: str, figures: list[Figure]) -> dict[str, Any]:
    return {
        "bench": bench,
        "figures": [asdict(f) for f in figures],
        "goal_met": all(f.met for f in figures if f.met is not None),
    }


def say(text: str) -> None:
    """A message for the reader; stdout is for the JSON alone."""
    print(text, file=sys.stderr, flush=True)


def rates(rounds: int, *works: Callable[[], int]) -> list[float]:
    """Runs per second of each piece of work, interleaved ``rounds`` times so that a noisy machine hits all alike.
    Each piece does some runs and returns how many. The median round counts."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for i, work in enumerate(works):
            begin = perf_counter()
            count = work()
            found[i].append(count / (perf_counter() - begin))
    return [sorted(f)[len(f) // 2] for f in found]
