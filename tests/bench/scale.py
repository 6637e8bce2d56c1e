"""Scale: the control plane of a whole data center on this machine: 1,000 server nodes with 50 running VMs each.

Record (SQLite), Redis and every rule are the real ones; what is simulated is the server nodes: their rows, and what
they would have reported. Nobody takes the messages that are sent.

- ``rebuild``: Redis came back empty. Every server node's report taken in, all reservations written anew, allocation
  open again (promised: within a minute, of which waiting for silent nodes is not measured here).
- ``sweep_*``: one round of each periodic sweep against its period. A sweep must end before its next turn.
- ``busy``: the part of one core that all of them take together, a round of samples of every server node included.
- ``request_*``: one request, asked and published; baseline: the same in a data center of 10 server nodes.
- ``storm``: a thousand stopped VMs started by one request: accepted, recorded and published.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import bindparam, select, update

from beat_schedule import schedule
from hdcs_tasks.app import make_app
from hdcs_tasks.backup.control_policy import policy_sweep
from hdcs_tasks.config import Settings
from hdcs_tasks.monitor.control_alarms import alarm_sweep
from hdcs_tasks.monitor.control_idle import idle_sweep
from hdcs_tasks.monitor.control_retention import retention_sweep
from hdcs_tasks.monitor.control_samples import sample_sweep
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.pool.control import lease_sweep
from hdcs_tasks.pool.rebuild import reservation_sweep, take_report
from hdcs_tasks.pool.tidy import dhcp_sweep, tidy_sweep
from hdcs_tasks.pool.waiting import waiting_sweep
from hdcs_tasks.states import ImageState, VmState
from hdcs_tasks.store.migrate import upgrade
from hdcs_tasks.store.models import DomainNode, Image, ImageCopy, Profile, ServerNode, Vm, new_id
from hdcs_tasks.vm import control as vm_control
from hdcs_tasks.vm.control_clone import CloneRequest, clone
from hdcs_tasks.vm.control_drain import drain_sweep
from hdcs_tasks.vm.control_storm import storm_sweep
from hdcs_tasks.vm.control_warm import warm_sweep
from tests.bench.report import Figure, judged, say
from tests.bench.sweep import one_round, populate
from tests.services import RedisServer, redis_server

NODES, PER_NODE, SMALL = 1000, 50, 10
STORM = 1000
REBUILD_S = 60.0
SWEEPS: dict[str, Callable[[Control], object]] = {
    "recovery": recovery_sweep, "leases": lease_sweep, "reservations": reservation_sweep, "dhcp": dhcp_sweep,
    "waiting": waiting_sweep, "drains": drain_sweep, "tidy": tidy_sweep, "monitor": sample_sweep,
    "policies": policy_sweep, "warm": warm_sweep, "storms": storm_sweep, "alarms": alarm_sweep, "idle": idle_sweep,
    "retention": retention_sweep,
}  # fmt: skip


def run(options: argparse.Namespace) -> list[Figure]:
    nodes = NODES // 10 if options.quick else NODES
    small = measured(SMALL, rounds=10)
    large = measured(nodes, rounds=10)
    figures = [judged("rebuild", large["rebuild"], "s", None, REBUILD_S, "<=", of="value")]
    figures += [
        judged(name, large[name], "s", large["period"][name], 1.0, "<=") for name in large["period"]
    ]  # fmt: skip
    busy = large["samples"] / large["sample_s"] + sum(large[name] / period for name, period in large["period"].items())
    figures.append(judged("busy", busy, "cores", None, 1.0, "<=", of="value"))
    figures += [
        Figure(f"request_{what}", round(large[what], 5), "s", round(small[what], 5),
               round(large[what] / small[what], 2), "told: against 10 server nodes")
        for what in ("start", "clone")
    ]  # fmt: skip
    figures.append(Figure("storm", round(large["storm"], 3), "s", None, None, f"told: {large['started']} VMs"))
    return figures


def measured(nodes: int, rounds: int) -> dict[str, Any]:
    """Every figure of a data center of so many server nodes (s)."""
    with tempfile.TemporaryDirectory(prefix="hdcs-scale-") as folder, redis_server() as redis:
        control, vms = built(Path(folder), redis, nodes)
        say(f"{nodes} server nodes, {sum(map(len, vms.values()))} VMs")
        found: dict[str, Any] = {"rebuild": rebuilt(control, redis, vms)}
        found["samples"] = median(sum(one_round(control, vms, number)[:2]) for number in range(2))
        found["sample_s"] = control.settings.sample_s
        stopped = rest(control, vms, STORM * nodes // NODES + rounds)
        asks = [lambda name=name: vm_control.start(control, name, Asked()) for name in stopped[:rounds]]  # type: ignore[misc]
        found["start"] = median(map(took, asks))
        found["clone"] = median(took(lambda n=n: clone(control, wish(n), Asked())) for n in range(rounds))  # type: ignore[misc]
        found["storm"] = took(lambda: vm_control.start_many(control, stopped[rounds:], Asked()))
        found["started"] = len(stopped) - rounds
        beat = schedule(control.settings)
        found["period"] = {f"sweep_{name}": float(beat[name]["schedule"]) for name in SWEEPS}
        for name, sweep in SWEEPS.items():
            found[f"sweep_{name}"] = median(took(lambda sweep=sweep: sweep(control)) for _ in range(2))  # type: ignore[misc]
            say(f"  {name}: {found[f'sweep_{name}']:.2f} s")
        control.store.dispose()
    return found


def took(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def wish(number: int) -> CloneRequest:
    return CloneRequest("mini", f"wish-{number}", 1, "small")


def built(folder: Path, redis: RedisServer, nodes: int) -> tuple[Control, dict[str, list[str]]]:
    """The data center on record, an image everywhere, and what runs on each server node."""
    url = f"sqlite:///{folder}/hdcs.sqlite"
    upgrade(url)
    config = Settings(
        redis_url=redis.url, database_url=url, state_dir=folder, port_first=8192, port_last=65535,
        ports_per_domain_node=570, lease_ttl_s=3600,
    )  # fmt: skip
    control = Control.from_settings(config, make_app(config))
    control.reservations.epoch.open()
    vms = populate(control, nodes, PER_NODE)
    with control.store.session() as session:
        image = Image(id=new_id(), name="mini", version=1, virtual_size_bytes=10**9, sha256="0" * 64)
        session.add_all([Profile(name="small", vcpus=2, memory_mib=2048), image])
        session.flush()
        for home in session.scalars(select(DomainNode.name)):
            session.add(ImageCopy(image_id=image.id, domain_node=home, state=ImageState.READY, file_bytes=10**9))
        address(session, vms)
    return control, vms


def address(session: Any, vms: dict[str, list[str]]) -> None:
    """Port and IP of every VM that runs, as its start would have recorded them."""
    rows, used = [], dict.fromkeys(session.scalars(select(DomainNode.name)), 0)
    first = {name: port for name, port in session.execute(select(DomainNode.name, DomainNode.port_first))}
    for node in session.scalars(select(ServerNode)):
        hosts = ip_network(node.subnet)
        for number, vm_id in enumerate(vms[node.name]):
            home = node.domain_node
            rows.append({"vm": vm_id, "its_port": first[home] + used[home], "its_ip": str(hosts[16 + number])})
            used[home] += 1
    table: Any = Vm.__table__
    change = update(table).where(table.c.id == bindparam("vm"))
    session.connection().execute(change.values(port=bindparam("its_port"), ip=bindparam("its_ip")), rows)


def rebuilt(control: Control, redis: RedisServer, vms: dict[str, list[str]]) -> float:
    """Seconds from an empty Redis to open reservations."""
    redis.wipe()
    redis.start()
    began = time.perf_counter()
    assert reservation_sweep(control) == "waiting"
    run_id = control.reservations.epoch.run_id()
    for node, ids in vms.items():
        seen = [{"vm_id": vm_id, "state": "running"} for vm_id in ids]
        take_report(control, {"run_id": run_id, "node": node, "guests": seen})
    assert reservation_sweep(control) == "rebuilt"
    seconds = time.perf_counter() - began
    claims = sum(len(pool.claims) for pool in control.reservations.dump().pools.values())
    assert claims == sum(map(len, vms.values())), claims
    return seconds


def rest(control: Control, vms: dict[str, list[str]], count: int) -> list[str]:
    """Let so many VMs be stopped, and their claims and ports given back by the tidy sweep. Their names."""
    every = [vm_id for ids in vms.values() for vm_id in ids]
    chosen = every[:: max(1, len(every) // count)][:count]
    with control.store.session() as session:
        table: Any = Vm.__table__
        change = update(table).where(table.c.id == bindparam("vm"))
        quiet = change.values(state=VmState.STOPPED, server_node=None, port=None, ip=None)
        session.connection().execute(quiet, [{"vm": vm_id} for vm_id in chosen])
        names = list(session.scalars(select(Vm.name).where(Vm.state == VmState.STOPPED)))
    assert tidy_sweep(control) >= count
    return names
