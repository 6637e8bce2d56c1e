"""Pure decisions about alarms: what is wrong, since when, and whether that is worth an alarm. Values in, values out.

A condition raises an alarm when its value has been at or above ``raise_at`` for ``for_s``, once; it is cleared when the
value has been below ``clear_below`` for ``clear_for_s`` without a break. What lies between the two, and what could not
be measured, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hdcs_tasks.config import AlarmSettings

CRITICAL, WARNING = "critical", "warning"


@dataclass(frozen=True, slots=True)
class Rule:
    """When a kind of alarm is raised and cleared. ``ends_when_seen``: an acknowledgement ends it."""

    severity: str
    raise_at: float
    clear_below: float
    for_s: float
    clear_for_s: float
    next: str
    ends_when_seen: bool = False


@dataclass(frozen=True, slots=True)
class Signal:
    """What was measured of one subject; the higher the worse. ``value`` None: it could not be measured."""

    kind: str
    subject: str
    value: float | None
    message: str


@dataclass(frozen=True, slots=True)
class Known:
    """An alarm that lives: ``pending``, ``raised`` or ``acknowledged``; ``since_s`` ago first seen; ``ok_s``: so long
    the condition has been false, None if it is not."""

    state: str
    since_s: float
    ok_s: float | None


class Verdict(StrEnum):
    NOTHING = "nothing"
    BEGIN = "begin"  # seen, but it has to last
    RAISE = "raise"
    GOES_ON = "goes on"
    FORGET = "forget"  # passed before it was raised
    EASES = "eases"  # false from now on: it has to stay so
    CLEAR = "clear"


def rules(settings: AlarmSettings) -> dict[str, Rule]:
    """The rule of every kind of alarm."""
    for_s, clear_s = settings.for_s, settings.clear_for_s

    def share(severity: str, percent: float, advice: str, lasting: float = for_s) -> Rule:
        return Rule(severity, percent, percent - settings.hysteresis_percent, lasting, clear_s, advice)

    def fact(severity: str, advice: str, lasting: float = 0.0, ends_when_seen: bool = False) -> Rule:
        return Rule(severity, 1.0, 1.0, lasting, 0.0 if ends_when_seen else clear_s, advice, ends_when_seen)

    def above(severity: str, limit: float, advice: str, lasting: float = for_s) -> Rule:
        return Rule(severity, limit, limit * 0.8, lasting, clear_s, advice)

    return {
        "node_lost": fact(CRITICAL, "Look at the server: its guests may still run. See: hdcs node list"),
        "node_silent": fact(WARNING, "Its quick worker does not answer: see its log, journalctl -u hdcs-server-node",
                            for_s),
        "node_cpu": share(WARNING, settings.cpu_percent, "Move VMs away (hdcs vm migrate) or add a server node"),
        "node_memory": share(WARNING, settings.memory_percent, "Move VMs away (hdcs vm migrate) or add a server node"),
        "pool_storage": share(CRITICAL, settings.storage_percent,
                              "A full storage pauses every guest on it: delete VMs or backups, or add storage", 0.0),
        "pool_capacity": share(WARNING, settings.capacity_percent, "Add a server node, or stop VMs"),
        "pool_n_plus_one": fact(WARNING, "If a server node is lost its VMs have nowhere to go: add one, or stop VMs",
                                for_s),
        "pool_ports": share(WARNING, settings.ports_percent, "Widen the range: HDCS_PORTS_PER_DOMAIN_NODE"),
        "node_ips": share(WARNING, settings.ips_percent, "Use larger subnets (HDCS_SUBNET_PREFIX) and join anew"),
        "backup_failed": fact(WARNING, "See why: hdcs op list --kind backup.create"),
        "backup_overdue": above(WARNING, settings.backup_overdue_s, "See: hdcs policy list, hdcs op list --live", 0.0),
        "backups_unproven": fact(WARNING, "Prove them: a policy with --drill-schedule, or hdcs backup verify --drill"),
        "operation_stuck": fact(CRITICAL, "See: hdcs op show", ends_when_seen=True),
        "queue_backlog": above(WARNING, settings.queue_length, "Are its workers alive and enough? See: hdcs doctor"),
        "clock_skew": above(WARNING, settings.clock_skew_s, "Synchronise the clocks (chrony or systemd-timesyncd)"),
        "sweep_late": fact(CRITICAL, "Do hdcs-beat and a control worker run? See their logs"),
    }  # fmt: skip


def judge(signal: Signal, known: Known | None, rule: Rule) -> Verdict:
    """What becomes of the alarm of one subject."""
    value = signal.value
    if value is None:
        return Verdict.NOTHING
    if known is None or known.state == "pending":
        if value < rule.raise_at:
            if known is None:
                return Verdict.NOTHING
            # What swings about its threshold lasts, too.
            return Verdict.FORGET if value < rule.clear_below else Verdict.GOES_ON
        if rule.for_s <= 0 or (known is not None and known.since_s >= rule.for_s):
            return Verdict.RAISE
        return Verdict.BEGIN if known is None else Verdict.GOES_ON
    if value >= rule.clear_below:
        return Verdict.GOES_ON
    if rule.clear_for_s <= 0 or (known.ok_s is not None and known.ok_s >= rule.clear_for_s):
        return Verdict.CLEAR
    return Verdict.EASES


def n_plus_one_gone(nodes: Sequence[tuple[int, int, int, int]]) -> bool:
    """Whether the VMs of some server node would find no room on the others. Each ``(vcpus, memory_mib, free_vcpus,
    free_memory_mib)``. By sums: where they do not fit so, they fit in no order."""
    if len(nodes) < 2:
        return False
    for lost in range(len(nodes)):
        vcpus, memory_mib, free_vcpus, free_mib = nodes[lost]
        others = [node for at, node in enumerate(nodes) if at != lost]
        room_vcpus, room_mib = sum(max(0, n[2]) for n in others), sum(max(0, n[3]) for n in others)
        if vcpus - free_vcpus > room_vcpus or memory_mib - free_mib > room_mib:
            return True
    return False


def late_sweeps(
    last_at: dict[str, float], periods_s: dict[str, float], now_s: float, known_for_s: float, patience_s: float
) -> Iterable[Signal]:
    """A signal for every sweep. One that never ran counts from when the watcher began (``known_for_s`` ago)."""
    for name, period_s in sorted(periods_s.items()):
        age_s = now_s - last_at[name] if name in last_at else known_for_s
        late = age_s > 3 * period_s + patience_s
        ran = f"last ran to its end {age_s:.0f} s ago" if name in last_at else f"has not run for {age_s:.0f} s"
        yield Signal("sweep_late", name, float(late), f"sweep {name} {ran}; it is to run every {period_s:.0f} s")


def share_percent(used: float, total: float) -> float | None:
    return 100.0 * used / total if total > 0 else None


BACKOFF_FIRST_S, BACKOFF_MOST_S = 10.0, 3600.0


def notice_backoff_s(attempts: int) -> float:
    """Pause after so many failed attempts to send a notice."""
    return float(min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** max(0, min(attempts, 30) - 1)))
