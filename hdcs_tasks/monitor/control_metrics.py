"""What Prometheus is told: read from record, reservations and samples when it asks, at most every few seconds.

Labels are bounded: domain nodes, server nodes and their queues by what was joined, kinds and states by the code; VMs
only while they are few (``HDCS_METRICS_VMS_MOST``).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from hdcs_tasks.clock import monotonic_s, now_s
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor.control_signals import queue_names
from hdcs_tasks.operations.control import Control
from hdcs_tasks.pool.control import list_domain_nodes
from hdcs_tasks.states import IN_POOL, OPERATION_LIVE, STEP_LIVE, AlarmState, BackupState, ServerNodeState, VmState
from hdcs_tasks.store.models import Backup, DomainNode, Operation, ServerNode, Step, Vm
from hdcs_tasks.store.models_watch import Alarm, Notice, OperationTally

log = logger(__name__)

MIB = 1024 * 1024
BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
LATE = timedelta(minutes=5)
"""An operation's end may be committed this long after it."""


@dataclass
class Histogram:
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect_left(BUCKETS_S, seconds)] += 1
        self.total_s += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        found, sum_ = [], 0
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self.buckets, strict=True):
            sum_ += count
            found.append((bound, float(sum_)))
        return found


class Ended:
    """Operations that have ended, counted since there are any, those that left the record too; each scrape reads only
    what is new."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Histogram] = {}
        self._until: datetime | None = None
        self._recent: dict[str, datetime] = {}

    def update(self, control: Control) -> None:
        query = select(Operation.id, Operation.kind, Operation.state, Operation.created_at, Operation.ended_at).where(
            Operation.ended_at.is_not(None), Operation.state.not_in(OPERATION_LIVE)
        )  # fmt: skip
        if self._until is not None:
            query = query.where(Operation.ended_at > self._until - LATE)
        with control.store.read() as session:
            if self._until is None:
                self.found = {
                    (row.kind, row.outcome): Histogram(list(row.buckets), row.total_s)
                    for row in session.scalars(select(OperationTally))
                }
            for id_, kind, state, began, ended in session.execute(query.execution_options(yield_per=5000)):
                if ended is None or id_ in self._recent:
                    continue
                self._recent[id_] = ended
                self._until = ended if self._until is None else max(self._until, ended)
                histogram = self.found.setdefault((kind, state.value), Histogram())
                histogram.add(max(0.0, (ended - began).total_seconds()))
        if self._until is not None:
            self._recent = {id_: at for id_, at in self._recent.items() if at > self._until - 2 * LATE}


class HdcsCollector(Collector):
    """Reads everything anew when it was last read more than ``cache_s`` ago. What cannot be read is left out, and
    ``hdcs_up`` says so."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._ended = Ended()
        self._lock = threading.Lock()
        self._read_at: float | None = None
        self._metrics: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        return ()  # else registering would read everything

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            fresh_s = self._control.settings.metrics.cache_s
            if self._read_at is None or monotonic_s() - self._read_at >= fresh_s:
                self._metrics = list(self._read())
                self._read_at = monotonic_s()
            return self._metrics

    def _read(self) -> Iterator[Metric]:
        up = gauge("up", "Whether this part could be read", ["part"])
        parts: dict[str, Callable[[Control], Iterable[Metric]]] = {
            "pools": pools, "server_nodes": server_nodes, "vms": vms, "operations": self._operations,
            "backups": backups, "alarms": alarms, "sweeps": sweeps, "queues": queues,
        }  # fmt: skip
        for name, read in parts.items():
            try:
                found = list(read(self._control))
            except HdcsError as error:
                log.warning("not read for metrics", part=name, error=str(error))
                up.add_metric([name], 0)
                continue
            up.add_metric([name], 1)
            yield from found
        yield up

    def _operations(self, control: Control) -> Iterator[Metric]:
        self._ended.update(control)
        ended = CounterMetricFamily("hdcs_operations", "Operations that have ended", labels=["kind", "outcome"])
        took = HistogramMetricFamily(
            "hdcs_operation_duration_seconds", "From request to end", labels=["kind", "outcome"]
        )
        for labels, histogram in sorted(self._ended.found.items()):
            ended.add_metric(labels, sum(histogram.buckets))
            took.add_metric(labels, buckets=histogram.cumulative(), sum_value=histogram.total_s)
        yield from (ended, took)
        with control.store.read() as session:
            live = session.execute(
                select(Operation.kind, Operation.state, func.count())
                .where(Operation.state.in_(OPERATION_LIVE))
                .group_by(Operation.kind, Operation.state)
            ).all()
            steps = session.execute(
                select(Step.state, func.count()).where(Step.state.in_(STEP_LIVE)).group_by(Step.state)
            ).all()  # fmt: skip
        yield counted("operations_live", "Operations that have not ended", ["kind", "state"], live)
        yield counted("steps_live", "Steps that have not ended; parked ones wait for room", ["state"], steps)


def gauge(name: str, text: str, labels: list[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"hdcs_{name}", text, labels=labels)


def counted(name: str, text: str, labels: list[str], rows: Iterable[Iterable[object]]) -> GaugeMetricFamily:
    """A gauge from rows of label values with the number last."""
    made = gauge(name, text, labels)
    for *values, number in rows:
        made.add_metric([str(value) for value in values], float(str(number)))
    return made


def table(
    prefix: str, labels: list[str], columns: dict[str, str], rows: Iterable[tuple[list[str], dict[str, float | None]]]
) -> Iterator[Metric]:
    """One gauge per column: rows of label values and what is known of each column."""
    made = {name: gauge(f"{prefix}_{name}", text, labels) for name, text in columns.items()}
    for values, known in rows:
        for name, value in known.items():
            if value is not None:
                made[name].add_metric(values, value)
    yield from made.values()


def pools(control: Control) -> Iterator[Metric]:
    rows = [([row["name"]], {
        "vcpus": row["vcpus"], "free_vcpus": row["free_vcpus"], "memory_bytes": row["memory_mib"] * MIB,
        "free_memory_bytes": row["free_memory_mib"] * MIB, "storage_bytes": row["storage_total_bytes"],
        "free_storage_bytes": row["storage_free_bytes"], "promised_disk_bytes": row["disk_promised_bytes"],
    }) for row in list_domain_nodes(control)]  # fmt: skip
    yield from table("pool", ["domain_node"], {
        "vcpus": "vCPUs the pool promises", "free_vcpus": "Of them not claimed",
        "memory_bytes": "Memory the pool promises", "free_memory_bytes": "Of it not claimed",
        "storage_bytes": "Size of the domain node's storage", "free_storage_bytes": "Of it free",
        "promised_disk_bytes": "Virtual disk promised to VMs",
    }, rows)  # fmt: skip
    held = gauge("reservations", "What is reserved, cooling or free", ["domain_node", "what", "state"])
    for name in [row[0][0] for row in rows]:
        used, cooling, free = control.reservations.ports.usage(name)
        for state, number in (("used", used), ("cooling", cooling), ("free", free)):
            held.add_metric([name, "port", state], number)
        held.add_metric([name, "ip", "free"], sum(view.free_ips for view in control.reservations.pool.nodes(name)))
        held.add_metric([name, "claim", "used"], len(control.reservations.pool.claims(name)))
    yield held
    yield counted("reservations_open", "1: what is reserved is known; 0: it is being rebuilt", [],
                  [(int(control.reservations.epoch.is_open()),)])  # fmt: skip


def server_nodes(control: Control) -> Iterator[Metric]:
    with control.store.read() as session:
        nodes = list(session.scalars(select(ServerNode).order_by(ServerNode.name)))
        names = list(session.scalars(select(DomainNode.name)))
    states = {(name, state.value): 0 for name in names for state in ServerNodeState}
    for node in nodes:
        states[node.domain_node, node.state.value] += 1
    yield counted("server_nodes", "Server nodes by state", ["domain_node", "state"],
                  [(*key, number) for key, number in states.items()])  # fmt: skip
    views = {view.name: view for name in names for view in control.reservations.pool.nodes(name)}
    hosts = control.reservations.samples.hosts([node.name for node in nodes])
    rows = []
    for node in nodes:
        known: dict[str, float | None] = {"up": float(node.state in IN_POOL)}
        if (view := views.get(node.name)) is not None:
            known |= {"vcpus": view.vcpus, "free_vcpus": view.free_vcpus, "memory_bytes": view.memory_mib * MIB,
                      "free_memory_bytes": view.free_memory_mib * MIB, "free_ips": view.free_ips}  # fmt: skip
        if (host := hosts.get(node.name)) is not None:
            total, free = host.get("memory_total_mib") or 0, host.get("memory_available_mib") or 0
            known |= {
                "sample_age_seconds": max(0.0, now_s() - host["at"]),
                "cpu_ratio": (host.get("cpu_percent") or 0) / 100,
                "memory_used_ratio": 1 - free / total if total else None,
                "clock_skew_seconds": host.get("clock_skew_s"),
                "receive_bytes_per_second": host.get("net_rx_bytes_s"),
                "transmit_bytes_per_second": host.get("net_tx_bytes_s"),
            }  # fmt: skip
        rows.append(([node.domain_node, node.name], known))
    yield from table("server_node", ["domain_node", "server_node"], {
        "up": "1: in its pool", "vcpus": "vCPUs it promises", "free_vcpus": "Of them not claimed",
        "memory_bytes": "Memory it promises", "free_memory_bytes": "Of it not claimed", "free_ips": "IPs not given out",
        "sample_age_seconds": "Age of its last sample", "cpu_ratio": "Busy share of the host's CPU",
        "memory_used_ratio": "Used share of the host's memory", "clock_skew_seconds": "Its clock against that of Redis",
        "receive_bytes_per_second": "Received by the host", "transmit_bytes_per_second": "Sent by the host",
    }, rows)  # fmt: skip


def vms(control: Control) -> Iterator[Metric]:
    with control.store.read() as session:
        rows = session.execute(
            select(Vm.home, Vm.state, func.count()).where(Vm.deleted_at.is_(None)).group_by(Vm.home, Vm.state)
        ).all()
        few = sum(row[2] for row in rows) <= control.settings.metrics.vms_most
        running = session.execute(
            select(Vm.id, Vm.name, Vm.home, Vm.server_node).where(Vm.deleted_at.is_(None), Vm.state == VmState.RUNNING)
        ).all() if few else []  # fmt: skip
    yield counted("vms", "VMs by state", ["domain_node", "state"], rows)
    seen = control.reservations.samples.vms([vm.id for vm in running])
    shown = [([vm.name, vm.home, vm.server_node or ""], {
        "cpu_ratio": None if found["cpu_percent"] is None else found["cpu_percent"] / 100,
        "memory_bytes": (found["memory_mib"] or 0) * MIB, "host_memory_bytes": (found["rss_mib"] or 0) * MIB,
        "disk_bytes_per_second": found["disk_bytes_s"], "network_bytes_per_second": found["net_bytes_s"],
        "console_clients": found["console_clients"],
    }) for vm in running if (found := seen.get(vm.id)) is not None]  # fmt: skip
    yield from table("vm", ["vm", "domain_node", "server_node"], {
        "cpu_ratio": "CPU time per second, in vCPUs", "memory_bytes": "The guest's memory",
        "host_memory_bytes": "What its QEMU takes of the host", "disk_bytes_per_second": "Read and written",
        "network_bytes_per_second": "Received and sent", "console_clients": "Clients connected to its console",
    }, shown)  # fmt: skip


def backups(control: Control) -> Iterator[Metric]:
    kept = (BackupState.READY, BackupState.BROKEN)
    with control.store.read() as session:
        states = session.execute(
            select(Backup.domain_node, Backup.state, func.count()).group_by(Backup.domain_node, Backup.state)
        ).all()
        sums = session.execute(
            select(Backup.domain_node, func.sum(Backup.file_bytes), func.count(Backup.proven_at),
                   func.max(Backup.created_at)).where(Backup.state.in_(kept)).group_by(Backup.domain_node)
        ).all()  # fmt: skip
    yield counted("backups", "Points by state", ["domain_node", "state"], states)
    yield counted("backup_bytes", "Size of all points", ["domain_node"], [(r[0], int(r[1] or 0)) for r in sums])
    yield counted("backups_proven", "Points a drill has brought up", ["domain_node"], [(r[0], r[2]) for r in sums])
    yield counted("backup_newest_timestamp_seconds", "When the newest point was made", ["domain_node"],
                  [(r[0], r[3].timestamp()) for r in sums])  # fmt: skip


def alarms(control: Control) -> Iterator[Metric]:
    states = (AlarmState.RAISED, AlarmState.ACKNOWLEDGED)
    with control.store.read() as session:
        rows = session.execute(
            select(Alarm.kind, Alarm.severity, Alarm.state, func.count()).where(Alarm.state.in_(states))
            .group_by(Alarm.kind, Alarm.severity, Alarm.state)
        ).all()  # fmt: skip
        waiting = session.scalar(select(func.count()).where(Notice.not_before.is_not(None)))
    yield counted("alarms", "Alarms that live", ["kind", "severity", "state"], rows)
    yield counted("notices_waiting", "Notices that have not gone out", [], [(waiting or 0,)])


def sweeps(control: Control) -> Iterator[Metric]:
    yield from table("sweep", ["sweep"], {
        "age_seconds": "Since it last ran to its end", "duration_seconds": "How long that took",
        "period_seconds": "How often it is to run",
    }, [([name], {"age_seconds": max(0.0, now_s() - told["at"]), "duration_seconds": told["took_s"],
                  "period_seconds": told["period_s"]})
        for name, told in sorted(control.reservations.samples.sweeps().items())])  # fmt: skip


def queues(control: Control) -> Iterator[Metric]:
    lengths = control.reservations.samples.queue_lengths(queue_names(control))
    yield counted("queue_length", "Messages that wait", ["queue"], lengths.items())
