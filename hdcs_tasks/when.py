"""The calendar in words: when something that comes again is due. Pure; times are aware datetimes in UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from hdcs_tasks.errors import Invalid

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = "|".join(_DAYS)
_WHEN = re.compile(
    r"(?:(?P<hourly>hourly)(?: :(?P<minute>\d\d))?"
    rf"|(?:daily|(?P<weekdays>weekdays)|weekly (?P<days>(?:{_DAY})(?:,(?:{_DAY}))*)|monthly (?P<date>\d{{1,2}}))"
    r" (?P<at>\d\d:\d\d))"
)


def check_when(words: str) -> str:
    """``words`` if they name moments; else Invalid."""
    last_due(words, datetime(2000, 1, 1, tzinfo=UTC))
    return words


def last_due(words: str, now: datetime) -> datetime:
    """The newest moment of ``words`` that is not after ``now``; both in UTC.

    ``hourly``, ``hourly :15``, ``daily 02:00``, ``weekdays 09:00``, ``weekly sun 03:00``, ``weekly mon,thu 09:00``,
    ``monthly 1 03:00`` (days 1 to 28).
    """
    found = _WHEN.fullmatch(words)
    minute = int(found["minute"] or 0) if found and found["hourly"] else 0
    hour, at_minute = (int(part) for part in found["at"].split(":")) if found and found["at"] else (0, minute)
    date = int(found["date"]) if found and found["date"] else 1
    if found is None or hour > 23 or at_minute > 59 or not 1 <= date <= 28:
        raise Invalid(
            f"{words!r} does not say when",
            next="Use hourly, hourly :15, daily 02:00, weekdays 09:00, weekly sun 03:00, weekly mon,thu 09:00 or "
            "monthly 1 03:00 (UTC, days 1 to 28)",
        )
    now = now.astimezone(UTC)
    if found["hourly"]:
        slot = now.replace(minute=at_minute, second=0, microsecond=0)
        return slot if slot <= now else slot - timedelta(hours=1)
    slot = now.replace(hour=hour, minute=at_minute, second=0, microsecond=0)
    if found["date"]:
        slot = slot.replace(day=date)
        return slot if slot <= now else (slot.replace(day=1) - timedelta(days=1)).replace(day=date)
    days = _days_of(found)
    while slot > now or slot.weekday() not in days:
        slot -= timedelta(days=1)
    return slot


def _days_of(found: re.Match[str]) -> set[int]:
    """Days of the week, Monday is 0."""
    if found["weekdays"]:
        return {0, 1, 2, 3, 4}
    return {_DAYS.index(day) for day in found["days"].split(",")} if found["days"] else set(range(7))


def next_due(words: str, now: datetime) -> datetime:
    """The first moment of ``words`` after ``now``; both in UTC."""
    # The newest moment not after a later one is the next as long as it is the only one in between.
    step = timedelta(minutes=30) if words.startswith("hourly") else timedelta(hours=12)
    end = now
    while (found := last_due(words, end)) <= now:
        end += step
    return found
