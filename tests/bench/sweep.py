"""Monitoring sweep: one sweep of a server node, as its quick worker makes it, against the raw bulk call alone.

- ``lab_node``: a real libvirtd with paused QEMU guests (QEMU is asked all the same, and nothing else uses the CPU).
- ``test_driver``: libvirt's test driver, several libvirtds, 500 guests each. It answers from memory, so the raw call is
  nearly nothing and what HDCS does for each guest is nearly all: told per guest, not judged.
- ``simulated``: 50,000 VMs on 100 server nodes: their samples written to Redis, taken into the record and judged.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import insert

from deploy.lab import Lab, free_net
from hdcs_tasks.app import make_app
from hdcs_tasks.config import Settings
from hdcs_tasks.hypervisor import disks, guests, networks, storage, xml
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.spec import GuestSpec
from hdcs_tasks.hypervisor.stats import _FLAGS, _GROUPS
from hdcs_tasks.monitor import node as node_room
from hdcs_tasks.monitor.control_alarms import alarm_sweep
from hdcs_tasks.monitor.control_samples import take_sample
from hdcs_tasks.operations.control import Control
from hdcs_tasks.operations.node import NodeContext
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool.proof import JoinRequest
from hdcs_tasks.states import VmState
from hdcs_tasks.store.migrate import upgrade
from hdcs_tasks.store.models import ServerNode, Vm, new_id, now
from hdcs_tasks.store.models_watch import UsageSpan
from tests.bench.report import Figure, judged, say
from tests.services import redis_server

GIB = 1024**3
GOAL, GOAL_SIMULATED_S = 1.3, 5.0


def run(options: argparse.Namespace) -> list[Figure]:
    quick = options.quick
    with tempfile.TemporaryDirectory(prefix="hdcs-sweep-") as folder:
        figures = simulated(Path(folder), 20 if quick else 100, 500)
        lab = Lab("sweep", Path(folder) / "lab", net=free_net(), domain_nodes={"east": ["node1", "node2"]})
        try:
            lab.up()
            with redis_server() as redis:
                figures += lab_node(lab, redis.url, 12 if quick else 20, 15 if quick else 40)
                figures += test_driver(lab, redis.url, 500, 5 if quick else 20)
        finally:
            lab.down()
    return figures


# --- one server node


def context(redis_url: str, folder: Path, node: str, uri: str) -> NodeContext:
    config = Settings(
        redis_url=redis_url,
        libvirt_uri=uri,
        storage_root=folder,
        domain_node="east",
        server_node=node,
        state_dir=folder / "state",
    )
    return NodeContext.from_settings(config, make_app(config))


def pairs(rounds: int, raw: Callable[[], Any], sweep: Callable[[], Any]) -> tuple[float, float, float]:
    """Medians of raw call and sweep in seconds, and of the ratios of neighbours; they go first in turn."""
    found: list[tuple[float, float]] = []
    for number in range(rounds):
        took = {}
        for work in (raw, sweep) if number % 2 else (sweep, raw):
            began = time.perf_counter()
            work()
            took[work] = time.perf_counter() - began
        found.append((took[raw], took[sweep]))
    return median(r for r, _ in found), median(s for _, s in found), median(s / r for r, s in found)


@contextmanager
def paused_guests(host: Host, root: Path, count: int) -> Iterator[None]:
    layout = storage.prepare(root, "east")
    networks.ensure_network(host, networks.NetworkSpec("hdcs", "10.92.132.0/24"))
    made = []
    try:
        for number in range(count):
            vm_id = str(uuid.uuid4())
            layout.vm_dir(vm_id).mkdir()
            disks.create_blank(layout.disk(vm_id), 8 << 20)
            guests.start(host, spec_of(vm_id, number, (str(layout.disk(vm_id)),)), paused=True)
            made.append(vm_id)
        yield
    finally:
        for vm_id in made:
            guests.stop(host, vm_id, force=True)


def spec_of(vm_id: str, number: int, files: tuple[str, ...]) -> GuestSpec:
    return GuestSpec(
        vm_id=vm_id, name=f"desk-{number:05d}", vcpus=1, memory_mib=64, disks=files, network="hdcs",
        mac=f"52:54:00:93:{number >> 8:02x}:{number & 255:02x}", console_port=21000 + number, operation="bench",
        step=f"step-{number}", attempt=1,
    )  # fmt: skip


def lab_node(lab: Lab, redis_url: str, count: int, rounds: int) -> list[Figure]:
    uri = f"qemu+tcp://{lab.ip('node1')}/system"
    with Host.open(uri) as host, paused_guests(host, lab.storage("east"), count):
        ctx = context(redis_url, lab.storage("east"), "node1", uri)
        for _ in range(2):
            node_room.sample(ctx)  # connections open; each guest's port is known
        raw_s, sweep_s, ratio = pairs(
            rounds, lambda: host.conn.getAllDomainStats(_GROUPS, _FLAGS), lambda: node_room.sample(ctx)
        )
        seen = ctx.reservations.samples.node("node1")
        assert seen is not None and len(seen["guests"]) == count
    say(f"lab node, {count} guests: raw {raw_s * 1e3:.1f} ms, sweep {sweep_s * 1e3:.1f} ms, ratio {ratio:.2f}")
    return [judged(f"lab_node_{count}_guests", sweep_s, "s", raw_s, GOAL, "<=", ratio=ratio)]


def test_driver(lab: Lab, redis_url: str, count: int, rounds: int) -> list[Figure]:
    figures = []
    for node in lab.nodes:
        uri = f"test+tcp://{lab.ip(node)}/default"
        with Host.open(uri) as host, ExitStack() as stack:
            for number in range(count):
                definition = xml.guest_xml(spec_of(str(uuid.uuid4()), number, ("/nowhere",)), "never")
                guest = host.conn.createXML(definition.replace('type="qemu"', 'type="test"', 1), 0)
                stack.callback(guest.destroy)
            ctx = context(redis_url, lab.storage("east"), node, uri)
            for _ in range(2):
                node_room.sample(ctx)
            raw_s, sweep_s, ratio = pairs(
                rounds, lambda host=host: host.conn.getAllDomainStats(_GROUPS, _FLAGS),  # type: ignore[misc]
                lambda ctx=ctx: node_room.sample(ctx),  # type: ignore[misc]
            )  # fmt: skip
            seen = ctx.reservations.samples.node(node)
            assert seen is not None and len(seen["guests"]) == count
        say(f"test driver {node}, {count} guests: raw {raw_s * 1e3:.1f} ms, sweep {sweep_s * 1e3:.1f} ms")
        per_guest = round((sweep_s - raw_s) / count * 1e6, 1)
        figures.append(Figure(f"test_driver_{node}_{count}_guests", round(sweep_s, 4), "s", round(raw_s, 4),
                              round(ratio, 2), f"told: {per_guest} us of HDCS's own work per guest"))  # fmt: skip
    return figures


# --- the whole data center


def simulated(folder: Path, nodes: int, per_node: int) -> list[Figure]:
    with redis_server() as redis:
        url = f"sqlite:///{folder}/hdcs.sqlite"
        upgrade(url)
        config = Settings(redis_url=redis.url, database_url=url, state_dir=folder)
        control = Control.from_settings(config, make_app(config))
        control.reservations.epoch.open()
        vms = populate(control, nodes, per_node)
        rounds = [one_round(control, vms, number) for number in range(3)]
        control.store.dispose()
    count = nodes * per_node
    goal = GOAL_SIMULATED_S * count / 50_000
    write_s, judge_s, alarms_s = (median(part) for part in zip(*rounds, strict=True))
    say(f"{count} simulated VMs: written {write_s:.2f} s, taken {judge_s:.2f} s, alarms {alarms_s:.2f} s")
    whole = median(sum(parts) for parts in rounds)
    return [
        judged(f"simulated_{count}_vms", whole, "s", None, goal, "<=", of="value"),
        Figure("of_it_written", round(write_s, 3), "s"), Figure("of_it_taken_and_judged", round(judge_s, 3), "s"),
        Figure("of_it_alarms", round(alarms_s, 3), "s"),
    ]  # fmt: skip


def populate(control: Control, nodes: int, per_node: int) -> dict[str, list[str]]:
    """Domain nodes of ten server nodes each, every VM running and metered."""
    facts = {"cpu_mhz": 3000, "sockets": 2, "cores_per_socket": 64, "threads_per_core": 2, "max_vcpus": 512,
             "memory_mib": 2_000_000}  # fmt: skip
    disk = {"total_bytes": 10**15, "free_bytes": 10**15}
    vms: dict[str, list[str]] = {}
    number = 0
    for at in range(nodes):
        home, name = f"pool{at // 10}", f"host{at}"
        if at % 10 == 0:
            pool_control.create_domain_node(control, home, "token")
        request = JoinRequest(home, name, f"10.1.{at // 250}.{at % 250 + 1}", f"i-{at}", facts, disk, time.time())
        pool_control.join(control, request.signed("token"))
        vms[name] = [new_id() for _ in range(per_node)]
        moment = now()
        rows, spans = [], []
        for vm_id in vms[name]:
            number += 1
            rows.append({
                "id": vm_id, "name": f"desk-{number}", "state": VmState.RUNNING, "home": home, "server_node": name,
                "profile": "small", "vcpus": 2, "memory_mib": 2048, "disk_bytes": 20 * GIB, "owner": "o", "tags": [],
                "mac": f"52:54:01:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",
                "usb": "off", "rules": {}, "created_at": moment, "state_at": moment,
            })  # fmt: skip
            spans.append({
                "kind": "vm", "vm_id": vm_id, "vm_name": f"desk-{number}", "owner": "o", "tags": [], "home": home,
                "server_node": name, "level": "on", "vcpus": 2, "memory_mib": 2048, "size_bytes": 20 * GIB,
                "observed": True, "open_key": f"vm:{vm_id}", "opened_at": moment,
            })  # fmt: skip
        with control.store.session() as session:
            session.execute(insert(Vm), rows)
            session.execute(insert(UsageSpan), spans)
            session.get_one(ServerNode, name)
    return vms


def one_round(control: Control, vms: dict[str, list[str]], number: int) -> tuple[float, float, float]:
    """Seconds to write every server node's sample, to take them into the record, and to judge every alarm."""
    at = time.time() + number
    host = {"cpu_percent": 40.0, "memory_total_mib": 2_000_000, "memory_available_mib": 900_000, "clock_skew_s": 0.0}
    samples = []
    for name, ids in vms.items():
        seen = [
            {"vm_id": vm_id, "state": "running", "cpu_percent": float(n % 30), "console_clients": int(n % 50 == 0),
             "memory_mib": 2048, "unused_mib": 700, "rss_mib": 1500, "disk_bytes_s": n, "net_bytes_s": n,
             "partial": False, "console_port": 20000 + n}
            for n, vm_id in enumerate(ids)
        ]  # fmt: skip
        samples.append({"node": name, "at": at, "host": host, "storage": {}, "guests": seen})
    began = time.perf_counter()
    for sample in samples:
        control.reservations.samples.write(sample, kept=30, ttl_s=300)
    written = time.perf_counter()
    for sample in samples:
        take_sample(control, {"node": sample["node"], "at": at})
    taken = time.perf_counter()
    counts = alarm_sweep(control)
    ended = time.perf_counter()
    assert sum(counts.values()) >= len(vms), counts
    return written - began, taken - written, ended - taken
