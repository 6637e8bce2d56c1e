"""The calendar in words: which moment is the newest, which comes next, and that none is passed over."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.errors import Invalid
from hdcs_tasks.when import check_when, last_due, next_due

NOON = datetime(2026, 3, 11, 12, 0, tzinfo=UTC)  # a Wednesday
WORDS = ["hourly :07", "daily 23:59", "weekdays 08:30", "weekly fri 00:00", "weekly sat,mon 10:00", "monthly 28 12:30"]


@pytest.mark.parametrize(
    ("words", "slot"),
    [
        ("hourly", "2026-03-11T12:00"),
        ("hourly :30", "2026-03-11T11:30"),
        ("daily 02:00", "2026-03-11T02:00"),
        ("daily 12:01", "2026-03-10T12:01"),
        ("weekly sun 03:00", "2026-03-08T03:00"),
        ("weekly wed 12:00", "2026-03-11T12:00"),
        ("weekly wed 12:01", "2026-03-04T12:01"),
        ("weekdays 09:00", "2026-03-11T09:00"),
        ("weekdays 12:30", "2026-03-10T12:30"),
        ("weekly mon,fri 09:00", "2026-03-09T09:00"),
        ("monthly 1 03:00", "2026-03-01T03:00"),
        ("monthly 12 03:00", "2026-02-12T03:00"),
    ],
)
def test_when(words: str, slot: str) -> None:
    assert last_due(words, NOON) == datetime.fromisoformat(slot).replace(tzinfo=UTC)


@given(
    st.sampled_from(WORDS),
    st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1)),
    st.floats(0, 40),
)
def test_slots_only_move_on(words: str, now: datetime, days: float) -> None:
    now = now.replace(tzinfo=UTC)
    slot = last_due(words, now)
    assert slot <= now
    assert now - slot <= timedelta(days=31)
    assert last_due(words, slot) == slot
    assert last_due(words, now + timedelta(days=days)) >= slot
    following = next_due(words, now)
    assert following > now
    assert last_due(words, following) == following
    assert last_due(words, following - timedelta(seconds=1)) == slot


@pytest.mark.parametrize(
    "words",
    ["", "daily", "daily 24:00", "daily 2:00", "weekly 03:00", "weekly mon, fri 09:00", "monthly 31 03:00", "now"],
)
def test_words_that_say_nothing(words: str) -> None:
    with pytest.raises(Invalid, match="does not say when"):
        check_when(words)
