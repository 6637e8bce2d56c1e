"""What a bench says: figures, each beside its raw baseline from the same run, and whether its goal is met."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
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
    ratio: float | None = None,
) -> Figure:
    """A figure with a goal for its ratio to the baseline, or (``of="value"``) for the value itself. ``ratio``: as
    measured by pairs (``rates``), where that is not simply the quotient of the two."""
    if ratio is None and baseline:
        ratio = value / baseline
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


def rates(rounds: int, base: Callable[[], int], *works: Callable[[], int]) -> list[tuple[float, float]]:
    """Runs per second and ratio to ``base``'s of each piece of work, ``base`` itself first. Each piece does some runs
    and returns how many; keep them short. They alternate ``rounds`` times, and the medians count: of the rounds'
    rates, and of the ratios taken within each round, for a noisy machine is the same machine only for a moment."""
    found: list[list[float]] = [[] for _ in range(1 + len(works))]
    for _ in range(rounds):
        for i, work in enumerate((base, *works)):
            begin = perf_counter()
            count = work()
            found[i].append(count / (perf_counter() - begin))
    return [(median(f), median(rate / own for rate, own in zip(f, found[0], strict=True))) for f in found]
