"""How many starts may be under way at once, by what was measured. Pure: additive increase, halving under load.

A bound moves between an operator's floor and ceiling. While the host is calm it grows by an eighth of that span at each
look; when CPU or memory are short, the storage is slow or boots take much longer than they used to, it is halved, and
then left alone until the measures can tell what that brought. One slow VM tells nothing: medians count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

CPU_PRESSURE = 80.0
"""Percent of the last ten seconds in which something waited for a CPU (/proc/pressure/cpu, some)."""
MEMORY_PRESSURE = 20.0
STORAGE_MS = 250.0
"""A small synced write that takes longer says that the storage is behind."""
SLOWER = 3.0
"""So many times the usual boot is too slow."""
BOOTS = 3
"""So many boots must have been seen of late before they count."""
SETTLE_LOOKS = 3
"""Looks after a cut during which nothing more is cut: pressures are averages over ten seconds."""
FORGET = 1.01
"""The usual boot grows by this factor per measured look, so that one lucky boot is not the measure for ever."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a look shows; None: not known. ``boots_s``: boots of late, claim to agent's answer."""

    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    storage_ms: float | None = None
    boots_s: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Bound:
    """Starts that may be under way at once, and why so many. ``usual_boot_s``: what a boot takes when nothing is in its
    way (0: not known); ``settling``: looks until it may be cut again."""

    starts: int
    why: str = "nothing measured yet"
    usual_boot_s: float = 0.0
    settling: int = 0


def next_bound(bound: Bound, seen: Measured, *, floor: int, ceiling: int) -> Bound:
    """The bound after a look."""
    floor, ceiling = min(floor, ceiling), max(1, ceiling)
    floor = max(1, floor)
    usual_s = _usual_s(bound.usual_boot_s, seen.boots_s)
    short = shortage(seen, usual_s)
    starts = min(max(bound.starts, floor), ceiling)
    if not short:
        grown = min(ceiling, starts + max(1, (ceiling - floor) // 8))
        why = "calm: at its ceiling" if grown == ceiling else "calm: growing"
        return Bound(grown, why, usual_s, max(0, bound.settling - 1))
    if bound.settling > 0:
        return Bound(starts, f"{short}; cut a moment ago", usual_s, bound.settling - 1)
    cut = max(floor, starts // 2)
    why = f"{short}: at its floor" if starts == floor else f"{short}: halved"
    return Bound(cut, why, usual_s, SETTLE_LOOKS)


def shortage(seen: Measured, usual_boot_s: float) -> str:
    """What is short, in words; '' where nothing is."""
    if seen.cpu_pressure is not None and seen.cpu_pressure > CPU_PRESSURE:
        return f"CPU pressure {seen.cpu_pressure:.0f} %"
    if seen.memory_pressure is not None and seen.memory_pressure > MEMORY_PRESSURE:
        return f"memory pressure {seen.memory_pressure:.0f} %"
    if seen.storage_ms is not None and seen.storage_ms > STORAGE_MS:
        return f"a synced write takes {seen.storage_ms:.0f} ms"
    if len(seen.boots_s) >= BOOTS and usual_boot_s > 0 and (now_s := median(seen.boots_s)) > SLOWER * usual_boot_s:
        return f"boots take {now_s:.0f} s instead of {usual_boot_s:.0f} s"
    return ""


def _usual_s(usual_s: float, boots_s: Sequence[float]) -> float:
    if len(boots_s) < BOOTS:
        return usual_s
    now_s = median(boots_s)
    return now_s if usual_s <= 0 else min(now_s, usual_s * FORGET)
