"""hdcs alarm, usage and quota on a real control plane."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from hdcs_tasks.cli.main import run
from hdcs_tasks.cloud import Cloud
from hdcs_tasks.config import RateSettings
from hdcs_tasks.monitor import control_alarms
from hdcs_tasks.monitor.alarm_rules import Signal
from hdcs_tasks.operations.control import Control
from tests.contract.test_samples import pool, running  # noqa: F401 - pool is a fixture

pytestmark = pytest.mark.contract


@pytest.fixture
def cloud(pool: Control) -> Cloud:  # noqa: F811
    pool.settings.rates = RateSettings(currency="EUR", vcpu_hour=3600)
    return Cloud(pool, by="ops")


def say(cloud: Cloud, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert run(words, lambda: cloud) == code
    out = capsys.readouterr()
    return out.out if code == 0 else out.err


def test_alarms_are_listed_acknowledged_and_remembered(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    control_alarms.settle(cloud.control, ["node_lost"], [Signal("node_lost", "node1", 1.0, "node1 is lost")])
    (shown,) = json.loads(say(cloud, capsys, "alarm", "list", "-f", "json"))
    assert (shown["kind"], shown["state"], shown["severity"]) == ("node_lost", "raised", "critical")
    assert "node1 is lost" in say(cloud, capsys, "alarm", "list")
    assert "acknowledged" in say(cloud, capsys, "alarm", "ack", shown["id"][:8], "--note", "on it")
    seen = json.loads(say(cloud, capsys, "alarm", "show", shown["id"], "-f", "json"))
    assert (seen["acknowledged_by"], seen["note"], seen["notices"]) == ("ops", "on it", [])
    assert "ops" in say(cloud, capsys, "alarm", "history")
    assert "there is no alarm" in say(cloud, capsys, "alarm", "ack", "nothing", code=3)
    assert "HDCS_ALARM_URLS_FILE" in say(cloud, capsys, "alarm", "test", code=2)


def test_use_is_told_with_what_it_costs(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    running(cloud.control)
    found: dict[str, Any] = json.loads(say(cloud, capsys, "usage", "-f", "json"))
    (row,) = found["rows"]
    assert row["vm"] == "desk-1" and row["vcpu_s"] > 0 and row["cost"] == pytest.approx(row["vcpu_s"], abs=0.01)
    (line,) = csv.DictReader(io.StringIO(say(cloud, capsys, "usage", "--by", "owner", "-f", "csv")))
    assert line["vms"] == "1" and float(line["vcpu_s"]) >= row["vcpu_s"] and line["currency"] == "EUR"
    assert say(cloud, capsys, "usage", "--month", "2020-01", "-f", "json")
    assert "not a month" in say(cloud, capsys, "usage", "--month", "soon", code=2)
    assert "not a moment" in say(cloud, capsys, "usage", "--from", "soon", code=2)


def test_quotas(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    say(cloud, capsys, "quota", "set", "alice", "--vms", "3", "--memory", "4GiB", "--disk", "none")
    (row,) = json.loads(say(cloud, capsys, "quota", "list", "-f", "json"))
    assert (row["vms"], row["memory_mib"], row["disk_bytes"], row["used_vms"]) == (3, 4096, None, 0)
    assert "whole MiB" in say(cloud, capsys, "quota", "set", "alice", "--memory", "1KiB", code=2)
    assert "at least one" in say(cloud, capsys, "quota", "set", "alice", code=2)
    assert "not a number" in say(cloud, capsys, "quota", "set", "alice", "--vms", "-1", code=2)
    say(cloud, capsys, "quota", "drop", "alice", "-y")
    assert json.loads(say(cloud, capsys, "quota", "list", "-f", "json")) == []
