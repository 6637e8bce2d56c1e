"""The exporter as a process of its own on real services; and dashboard and alert rules name only what it serves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from hdcs_tasks.monitor import control_alarms
from hdcs_tasks.monitor.alarm_rules import Signal
from hdcs_tasks.monitor.control_metrics import HdcsCollector
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.states import BackupState, VmState
from hdcs_tasks.store.models import Backup, Vm, now
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control as vms
from tests.contract.test_alarms import live
from tests.contract.test_samples import pool, running, sample_of  # noqa: F401 - pool is a fixture
from tests.services import free_port

pytestmark = pytest.mark.contract
ROOT = Path(__file__).parents[2]
FULL = {"state": "running", "cpu_percent": 150.0, "console_clients": 1, "memory_mib": 128, "rss_mib": 200,
        "disk_bytes_s": 5, "net_bytes_s": 6}  # fmt: skip
HOST = {"cpu_percent": 25.0, "memory_total_mib": 1000, "memory_available_mib": 400, "clock_skew_s": 0.1,
        "net_rx_bytes_s": 1, "net_tx_bytes_s": 2}  # fmt: skip


@contextmanager
def exporter(control: Control, **more: str) -> Iterator[int]:
    """A real exporter process: its port."""
    config, port = control.settings, free_port()
    env = os.environ | {
        "HDCS_REDIS_URL": config.redis_url, "HDCS_DATABASE_URL": config.database_url, "HDCS_METRICS_CACHE_S": "0",
        "HDCS_METRICS_PORT": str(port),
    } | more  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "workers.metrics"], cwd=ROOT, env=env, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def scrape(port: int) -> str:
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < end, "the exporter does not answer"
            time.sleep(0.1)


def busy(control: Control) -> None:
    """A data center in which there is something of everything."""
    vm_id = running(control)
    control.reservations.samples.write(
        sample_of("node1", now().timestamp(), vm_id, **FULL) | {"host": HOST}, kept=2, ttl_s=60
    )
    control.reservations.samples.swept("recovery", now().timestamp(), 0.1, 5.0)
    with control.transaction() as tx:
        operation = tx.open("vm.start", asked=Asked(), subject="desk-0")
        operation.created_at = now() - timedelta(seconds=3)
        tx.finish(operation)
        tx.session.add(Backup(
            vm_id=vm_id, vm_name="desk-1", domain_node="east", chain="c", seq=1, kind="full", state=BackupState.READY,
            file_bytes=7, proven_at=now(),
        ))  # fmt: skip
    vms.command(control, "reboot", "desk-1", Asked())
    with control.transaction() as tx:
        move(tx.session.get_one(Vm, vm_id), VmState.RUNNING)
    control_alarms.settle(control, ["node_lost"], [Signal("node_lost", "node9", 1.0, "lost")])


def served(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Name -> labels -> value, as Prometheus's own parser reads it."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(found: dict[str, Any], name: str, **labels: str) -> float:
    return float(found[name][tuple(sorted(labels.items()))])


def expressions() -> list[str]:
    dashboard = json.loads((ROOT / "deploy/grafana/hdcs.json").read_text())
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/hdcs-alerts.yaml").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return shown + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


def test_it_serves_what_there_is_and_all_that_dashboard_and_alerts_name(pool: Control) -> None:  # noqa: F811
    busy(pool)
    with exporter(pool) as port:
        found = served(scrape(port))
    assert {labels[0][1] for labels, ok in found["hdcs_up"].items() if not ok} == set()
    assert value(found, "hdcs_vms", domain_node="east", state="running") == 1
    assert value(found, "hdcs_server_node_cpu_ratio", domain_node="east", server_node="node1") == 0.25
    assert value(found, "hdcs_server_node_memory_used_ratio", domain_node="east", server_node="node1") == 0.6
    assert value(found, "hdcs_vm_cpu_ratio", vm="desk-1", domain_node="east", server_node="node1") == 1.5
    assert value(found, "hdcs_operations_total", kind="vm.start", outcome="done") == 1
    labels = {"kind": "vm.start", "outcome": "done"}
    buckets = [value(found, "hdcs_operation_duration_seconds_bucket", le=le, **labels) for le in ("2.5", "5.0", "+Inf")]
    assert buckets == [0, 1, 1]
    assert 3 <= value(found, "hdcs_operation_duration_seconds_sum", **labels) < 5
    assert value(found, "hdcs_reservations", domain_node="east", what="port", state="used") == 1
    assert value(found, "hdcs_alarms", kind="node_lost", severity="critical", state="raised") == 1
    assert value(found, "hdcs_backup_bytes", domain_node="east") == 7
    named = 0
    for expression in expressions():
        for name, matchers in re.findall(r"\b(hdcs_[a-z0-9_]+)(?:\{([^}]*)\})?", expression):
            assert name in found, f"{name} of {expression!r} is not served"
            keys = {key for labels in found[name] for key, _ in labels}
            asked = set(re.findall(r"(\w+)\s*=", matchers)) | (
                set(re.findall(r"by \(([^)]*)\)", expression)[0].split(", ")) if "by (" in expression else set()
            )
            assert asked <= keys, f"{name} has no label {asked - keys}"
            named += 1
    assert named > 30


def test_prometheus_would_understand_every_expression() -> None:
    assert len(expressions()) > 20
    for expression in expressions():
        promql_parser.parse(expression)
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("sum by (kind) (hdcs_alarms")


def test_single_vms_are_told_only_while_they_are_few(pool: Control) -> None:  # noqa: F811
    busy(pool)
    for most, told in ((1, 1), (0, 0)):
        pool.settings.metrics.vms_most = most
        families = {family.name: family for family in HdcsCollector(pool).collect()}
        assert len(families["hdcs_vm_cpu_ratio"].samples) == told


def test_operations_are_counted_once_each_whenever_it_is_asked(pool: Control) -> None:  # noqa: F811
    pool.settings.metrics.cache_s = 0
    collector = HdcsCollector(pool)

    def count() -> float:
        (ended,) = [family for family in collector.collect() if family.name == "hdcs_operations"]
        return sum(sample.value for sample in ended.samples)

    for expected in range(1, 6):
        with pool.transaction() as tx:
            operation = tx.open("vm.start", asked=Asked(), subject="x")
            tx.finish(operation)
            operation.ended_at = now() - timedelta(seconds=60 * (expected % 2))  # committed late
        assert count() == expected == count()


def test_what_cannot_be_read_is_said_and_the_rest_is_served(pool: Control) -> None:  # noqa: F811
    lost = pool.settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
    alone = Control(lost, pool.store, Reservations.from_settings(lost), pool.celery)
    families = {family.name: family for family in HdcsCollector(alone).collect()}
    up = {sample.labels["part"]: sample.value for sample in families["hdcs_up"].samples}
    assert (up["operations"], up["backups"], up["sweeps"]) == (1, 1, 0)


def test_without_beat_and_control_worker_the_exporter_raises_the_alarm(pool: Control) -> None:  # noqa: F811
    pool.reservations.samples.swept("alarms", now().timestamp() - 3600, 0.1, 15.0)
    quick = {"HDCS_ALARM_PERIOD_S": "0.3", "HDCS_ALARM_PATIENCE_S": "0"}
    with exporter(pool, **quick):
        end = time.monotonic() + 60
        while ("sweep_late", "alarms", "raised") not in live(pool):
            assert time.monotonic() < end, live(pool)
            time.sleep(0.2)
