"""When a scheduled storm must begin, so that its desktops are ready at the time. Pure; seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_BOOT_S = 120.0
"""What a boot is taken to last where none was measured yet."""
UNBOUNDED_STARTS = 8
"""How many starts a server node without a bound is taken to bear at once."""
MARGIN = 1.25
SPARE_S = 30.0
LEAD_MAX_S = 7200.0
"""A storm that needs longer than this begins this long before: its operator should know, not its neighbours."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What is known of how fast desktops get ready. ``boots_s``: start of the step to agent's answer, of late;
    ``at_once``: starts that may be under way at once; ``last_count`` desktops took ``last_s`` in the storm's last
    measured run (0: there was none)."""

    boots_s: Sequence[float] = ()
    at_once: int = UNBOUNDED_STARTS
    last_count: int = 0
    last_s: float = 0.0


def lead_s(count: int, pace: Pace) -> float:
    """How long before the time to begin with ``count`` desktops: by the last run of this storm, scaled to the number,
    else by waves of measured boots; never less than one slow boot. With a quarter and half a minute to spare."""
    if count < 1:
        return 0.0
    boot_s = slow_boot_s(pace.boots_s)
    if pace.last_count > 0 and pace.last_s > 0:
        wanted_s = max(boot_s, pace.last_s * count / pace.last_count)
    else:
        wanted_s = boot_s * math.ceil(count / max(1, pace.at_once))
    return round(min(LEAD_MAX_S, wanted_s * MARGIN + SPARE_S), 1)


def slow_boot_s(boots_s: Sequence[float]) -> float:
    """The boot that nine in ten do not exceed; ``FIRST_BOOT_S`` where nothing was measured."""
    if not boots_s:
        return FIRST_BOOT_S
    ranked = sorted(boots_s)
    return ranked[min(len(ranked) - 1, math.ceil(0.9 * len(ranked)) - 1)]
