"""Pure: what spans of use add up to in a time, per VM, owner or tag, and what that costs.

Times are whole microseconds and quantities whole numbers: sums are exact whatever their order.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeAlias

from hdcs_tasks.config import EarlierRates, RateSettings
from hdcs_tasks.errors import Invalid

Prices: TypeAlias = RateSettings | EarlierRates
By = Literal["vm", "owner", "tag"]
BYS: tuple[By, ...] = ("vm", "owner", "tag")
GIB = 1024**3
MONTH_S = 30 * 86_400
_US = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Span:
    """As ``store.models_watch.UsageSpan``; ``closed_at`` None: it goes on."""

    kind: str
    level: str
    vm_id: str
    vm_name: str
    owner: str
    tags: Sequence[str]
    vcpus: int
    memory_mib: int
    size_bytes: int
    observed: bool
    opened_at: datetime
    closed_at: datetime | None


@dataclass(slots=True)
class Sum:
    """In microseconds times the quantity."""

    running: int = 0
    vcpu: int = 0
    memory_mib: int = 0
    disk_byte: int = 0
    backup_byte: int = 0
    console: int = 0
    unobserved: int = 0
    vms: set[str] = field(default_factory=set)

    def add(self, span: Span, us: int) -> None:
        self.vms.add(span.vm_id)
        if span.kind == "console":
            self.console += us
        elif span.kind == "backup":
            self.backup_byte += us * span.size_bytes
        else:
            self.disk_byte += us * span.size_bytes
            if span.level in ("on", "paused"):
                self.memory_mib += us * span.memory_mib
                self.unobserved += 0 if span.observed else us
            if span.level == "on":
                self.running += us
                self.vcpu += us * span.vcpus


def month(text: str) -> tuple[datetime, datetime]:
    """First moment of a month ``2026-11`` and of the next, in UTC; Invalid."""
    found = re.fullmatch(r"(\d{4})-(\d{2})", text)
    if not found or not 1 <= int(found[2]) <= 12 or not 1970 <= int(found[1]) < 9999:
        raise Invalid(f"{text!r} is not a month", next="Write it as 2026-11")
    start = datetime(int(found[1]), int(found[2]), 1, tzinfo=UTC)
    return start, start + timedelta(days=calendar.monthrange(start.year, start.month)[1])


def microseconds(span: Span, start: datetime, end: datetime) -> int:
    """How much of a span lies between ``start`` and ``end``; one that goes on lasts until ``end``."""
    closed = end if span.closed_at is None else min(span.closed_at, end)
    return max(0, (closed - max(span.opened_at, start)) // _US)


def periods(rates: RateSettings, start: datetime, end: datetime) -> list[tuple[datetime, datetime, Prices]]:
    """The time from ``start`` to ``end`` in parts of one price list each, in order, at least one."""
    found: list[tuple[datetime, datetime, Prices]] = []
    for earlier in sorted(rates.earlier, key=lambda one: one.until):
        if start < earlier.until < end:
            found.append((start, earlier.until, earlier))
            start = earlier.until
        elif earlier.until >= end:
            return [*found, (start, end, earlier)]
    return [*found, (start, end, rates)]


def totals(
    spans: Iterable[Span], start: datetime, end: datetime, by: By, rates: RateSettings, tag: str | None = None
) -> list[dict[str, Any]]:
    """A row per VM, owner or tag that used anything, and with several a last one for all (``total`` true).

    A VM with several tags counts under each, and once in the total. Each stretch has the prices of its time.
    """
    parts = periods(rates, start, end)
    sums: dict[tuple[str, ...], list[Sum]] = {}
    whole = [Sum() for _ in parts]
    for span in spans:
        if tag is not None and tag not in span.tags:
            continue
        for number, (begin, until, _) in enumerate(parts):
            us = microseconds(span, begin, until)
            if not us:
                continue
            whole[number].add(span, us)
            for key in _keys(span, by):
                sums.setdefault(key, [Sum() for _ in parts])[number].add(span, us)
    prices = [price for _, _, price in parts]
    rows = [_row(dict(zip(_HEADS[by], key, strict=True)), found, prices, rates.currency)
            for key, found in sorted(sums.items())]  # fmt: skip
    if len(rows) > 1:
        rows.append(_row(dict.fromkeys(_HEADS[by], ""), whole, prices, rates.currency))
    return [row | {"total": number > 0 and number == len(sums)} for number, row in enumerate(rows)]


_HEADS: dict[By, tuple[str, ...]] = {"vm": ("vm", "owner", "vm_id"), "owner": ("owner",), "tag": ("tag",)}


def _keys(span: Span, by: By) -> Iterable[tuple[str, ...]]:
    if by == "vm":
        return ((span.vm_name, span.owner, span.vm_id),)
    return ((span.owner,),) if by == "owner" else [(tag,) for tag in span.tags] or [("",)]


def _row(heads: dict[str, str], found: Sequence[Sum], prices: Sequence[Prices], currency: str) -> dict[str, Any]:
    used = {name: sum(getattr(part, field) for part in found) / 1_000_000 for name, field in _AMOUNTS.items()}
    cost = sum(_cost(part, price) for part, price in zip(found, prices, strict=True))
    vms = set[str]().union(*(part.vms for part in found))
    return heads | {"vms": len(vms)} | used | {"cost": round(cost, 4), "currency": currency}


_AMOUNTS = {
    "running_s": "running", "vcpu_s": "vcpu", "memory_mib_s": "memory_mib", "disk_byte_s": "disk_byte",
    "backup_byte_s": "backup_byte", "console_s": "console", "unobserved_s": "unobserved",
}  # fmt: skip


def _cost(used: Sum, price: Prices) -> float:
    return (
        used.vcpu / 3600 * price.vcpu_hour
        + used.memory_mib / 1024 / 3600 * price.memory_gib_hour
        + used.disk_byte / GIB / MONTH_S * price.disk_gib_month
        + used.backup_byte / GIB / MONTH_S * price.backup_gib_month
        + used.console / 3600 * price.console_hour
    ) / 1_000_000
