"""What spans of use add up to: exact, whatever way a time is cut."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.config import RateSettings
from hdcs_tasks.errors import Invalid
from hdcs_tasks.monitor.usage_rules import Span, month, totals
from hdcs_tasks.vm.quota_rules import Amounts, refusals

BEGAN = datetime(2026, 11, 1, tzinfo=UTC)
FREE = RateSettings()


def span(start_s: float, end_s: float | None, **more: Any) -> Span:
    facts: dict[str, Any] = {
        "kind": "vm", "level": "on", "vm_id": "1", "vm_name": "desk", "owner": "alice", "tags": ["a", "b"], "vcpus": 2,
        "memory_mib": 2048, "size_bytes": 10, "observed": True,
    }  # fmt: skip
    closed = None if end_s is None else BEGAN + timedelta(seconds=end_s)
    return Span(**(facts | more), opened_at=BEGAN + timedelta(seconds=start_s), closed_at=closed)


def one(spans: list[Span], start_s: float, end_s: float, **more: Any) -> dict[str, Any]:
    (row,) = totals(spans, BEGAN + timedelta(seconds=start_s), BEGAN + timedelta(seconds=end_s), "vm", FREE, **more)
    return row


def test_an_hour_is_an_hour_by_its_levels() -> None:
    hour = [span(0, 1800), span(1800, 2700, level="paused"), span(2700, 3000, observed=False), span(3000, None)]
    row = one([*hour, span(0, 3600, kind="console"), span(0, 3600, kind="backup", size_bytes=7)], 0, 3600)
    assert (row["running_s"], row["vcpu_s"], row["memory_mib_s"]) == (2700, 5400, 3600 * 2048)
    assert (row["disk_byte_s"], row["backup_byte_s"], row["console_s"], row["unobserved_s"]) == (
        36000,
        25200,
        3600,
        300,
    )


@given(st.lists(st.integers(0, 10**10), min_size=2, max_size=12, unique=True), st.lists(st.integers(0, 10**10)))
def test_however_a_time_is_cut_the_parts_add_up_to_the_whole(edges: list[int], cuts: list[int]) -> None:
    edges.sort()
    levels = ["on", "paused", "off"]
    pairs = pairwise(edges)
    spans = [span(a / 1e6, b / 1e6, level=levels[n % 3]) for n, (a, b) in enumerate(pairs)]
    moments = sorted({0, 10**10, *cuts})
    parts = []
    for a, b in pairwise(moments):
        parts += totals(spans, BEGAN + timedelta(microseconds=a), BEGAN + timedelta(microseconds=b), "vm", FREE)
    (whole,) = totals(spans, BEGAN, BEGAN + timedelta(microseconds=10**10), "vm", FREE)
    for key in ("running_s", "vcpu_s", "memory_mib_s", "disk_byte_s"):
        assert round(sum(part[key] for part in parts) * 1e6) == round(whole[key] * 1e6)


def test_tags_count_under_each_and_once_in_all() -> None:
    rows = totals([span(0, 10), span(0, 10, vm_id="2", vm_name="other", tags=[])], BEGAN, BEGAN + timedelta(hours=1),
                  "tag", FREE)  # fmt: skip
    assert [(row["tag"], row["vcpu_s"], row["total"]) for row in rows] == [
        ("", 20.0, False), ("a", 20.0, False), ("b", 20.0, False), ("", 40.0, True),
    ]  # fmt: skip
    assert one([span(0, 10), span(0, 10, tags=[])], 0, 60, tag="a")["vcpu_s"] == 20


def test_what_it_costs() -> None:
    rates = RateSettings(currency="EUR", vcpu_hour=0.5, memory_gib_hour=0.25, disk_gib_month=30, console_hour=1)
    spans = [span(0, 7200, size_bytes=1024**3), span(0, 3600, kind="console")]
    (row,) = totals(spans, BEGAN, BEGAN + timedelta(hours=2), "owner", rates)
    assert row["cost"] == pytest.approx(4 * 0.5 + 4 * 0.25 + 30 * 2 / 720 + 1, abs=1e-4)
    assert row["currency"] == "EUR"


def test_a_price_that_changes_within_a_month_changes_nothing_before() -> None:
    earlier = [
        {"until": BEGAN + timedelta(hours=3), "vcpu_hour": 5},
        {"until": BEGAN + timedelta(hours=1), "vcpu_hour": 2},
    ]
    rates = RateSettings(vcpu_hour=7, currency="EUR", earlier=earlier)  # type: ignore[arg-type]
    spans = [span(0, 4 * 3600)]  # two vCPUs
    (row,) = totals(spans, BEGAN, BEGAN + timedelta(hours=4), "vm", rates)
    assert (row["vcpu_s"], row["cost"], row["vms"]) == (8 * 3600, 2 * (1 * 2 + 2 * 5 + 1 * 7), 1)
    for first, last, price in ((0, 1, 2), (1, 3, 5), (3, 4, 7), (0.5, 1, 2), (3, 3.5, 7)):
        begin, end = BEGAN + timedelta(hours=first), BEGAN + timedelta(hours=last)
        (row,) = totals(spans, begin, end, "vm", rates)
        assert row["cost"] == pytest.approx(2 * (last - first) * price), (first, last)
    with pytest.raises(ValueError, match="vcpu_hours"):
        RateSettings(earlier=[{"until": BEGAN, "vcpu_hours": 2}])  # type: ignore[list-item]


def test_months() -> None:
    assert month("2024-02") == (datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC))
    assert month("2026-12")[1] == datetime(2027, 1, 1, tzinfo=UTC)
    for wrong in ("2026-13", "2026", "november", "0000-01"):
        with pytest.raises(Invalid, match="not a month"):
            month(wrong)


def test_what_is_not_asked_for_is_not_refused() -> None:
    limits = {"vms": 3, "running_vms": 1, "vcpus": None}
    assert refusals(limits, Amounts(vms=5, running_vms=0), Amounts(running_vms=1, vcpus=999)) == []
    assert refusals(limits, Amounts(vms=2, running_vms=1), Amounts(vms=2, running_vms=1)) == [
        "2 more VMs with 2 in use, 3 allowed", "1 more running VMs with 1 in use, 1 allowed",
    ]  # fmt: skip
