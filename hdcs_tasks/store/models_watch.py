"""The record of watching and counting: alarms and their notices, spans of use, quotas."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from hdcs_tasks.states import AlarmState
from hdcs_tasks.store.models import Base, Bytes, StateColumn, new_id, now


class Alarm(Base):
    """Something that is wrong and lasts. ``live_key`` (``kind:subject``) holds it single until it is cleared.

    ``seen_at``: when the condition was last true; ``ok_since``: since when it has been false without a break.
    """

    __tablename__ = "alarm"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    kind: Mapped[str] = mapped_column(String(40), index=True)
    subject: Mapped[str] = mapped_column(String(255))
    severity: Mapped[str] = mapped_column(String(12))
    state: Mapped[AlarmState] = mapped_column(StateColumn(AlarmState), index=True)
    live_key: Mapped[str | None] = mapped_column(String(300), unique=True)
    message: Mapped[str] = mapped_column(Text)
    next: Mapped[str] = mapped_column(Text, default="")
    value: Mapped[float | None]
    since_at: Mapped[datetime] = mapped_column(default=now)
    seen_at: Mapped[datetime] = mapped_column(default=now)
    ok_since: Mapped[datetime | None]
    state_at: Mapped[datetime] = mapped_column(default=now, index=True)
    raised_at: Mapped[datetime | None]
    acknowledged_at: Mapped[datetime | None]
    acknowledged_by: Mapped[str | None] = mapped_column(String(255))
    note: Mapped[str] = mapped_column(Text, default="")
    cleared_at: Mapped[datetime | None]


class IdlePolicy(Base):
    """Which desktops are taken back when nobody uses them, and how (monitor/idle_rules.py: Policy).

    ``ladder``: ``[rung, seconds]`` pairs in order; ``limits``: fields of ``idle_rules.Limits``.
    """

    __tablename__ = "idle_policy"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    selector: Mapped[dict[str, Any]]
    ladder: Mapped[list[Any]]
    limits: Mapped[dict[str, Any]]
    rank: Mapped[int] = mapped_column(default=100)
    inside: Mapped[bool] = mapped_column(default=True)
    force: Mapped[bool] = mapped_column(default=False)
    message: Mapped[str] = mapped_column(Text, default="")
    enabled: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Notice(Base):
    """One message about an alarm to one target. ``target`` is a fingerprint of its URL, which stays in its file."""

    __tablename__ = "notice"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    alarm_id: Mapped[str] = mapped_column(ForeignKey("alarm.id"), index=True)
    what: Mapped[str] = mapped_column(String(12))
    target: Mapped[str] = mapped_column(String(16))
    title: Mapped[str] = mapped_column(Text)
    body: Mapped[str] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(default=0)
    not_before: Mapped[datetime | None] = mapped_column(index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    sent_at: Mapped[datetime | None]
    given_up_at: Mapped[datetime | None]
    error: Mapped[str] = mapped_column(Text, default="")


class UsageSpan(Base):
    """A stretch of time in which one thing was used in one way; open while ``closed_at`` is empty.

    ``kind``: vm, console or backup. ``level`` of a VM: on (vCPU, memory, disk), paused (memory, disk), off (disk).
    ``size_bytes``: disk of a VM, file of a backup. ``observed`` false: nobody could see it meanwhile (its server node
    was out of reach). ``open_key`` (kind:id) holds the open span single. Written by ``store.metering`` only.
    """

    __tablename__ = "usage_span"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(8))
    vm_id: Mapped[str] = mapped_column(String(36), index=True)
    vm_name: Mapped[str] = mapped_column(String(63))
    owner: Mapped[str] = mapped_column(String(255), default="")
    tags: Mapped[list[Any]] = mapped_column(default=list)
    home: Mapped[str] = mapped_column(String(63), default="")
    server_node: Mapped[str | None] = mapped_column(String(63), index=True)
    level: Mapped[str] = mapped_column(String(8), default="")
    vcpus: Mapped[int] = mapped_column(default=0)
    memory_mib: Mapped[int] = mapped_column(default=0)
    size_bytes: Mapped[Bytes]
    observed: Mapped[bool] = mapped_column(default=True)
    open_key: Mapped[str | None] = mapped_column(String(80), unique=True)
    opened_at: Mapped[datetime] = mapped_column(index=True)
    closed_at: Mapped[datetime | None] = mapped_column(index=True)


class OperationTally(Base):
    """Operations that have left the record, counted: by how long they took (``monitor.control_metrics.Histogram``)."""

    __tablename__ = "operation_tally"

    kind: Mapped[str] = mapped_column(String(40), primary_key=True)
    outcome: Mapped[str] = mapped_column(String(20), primary_key=True)
    buckets: Mapped[list[Any]]
    total_s: Mapped[float]


class Quota(Base):
    """What one owner may have at most; an empty field is no limit. Owner ``*``: whoever has no quota of their own."""

    __tablename__ = "quota"

    owner: Mapped[str] = mapped_column(String(255), primary_key=True)
    vms: Mapped[int | None]
    running_vms: Mapped[int | None]
    vcpus: Mapped[int | None]
    memory_mib: Mapped[int | None]
    disk_bytes: Mapped[Bytes | None]
