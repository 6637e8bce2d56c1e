"""A data center in one process: the real control plane and the real rooms of server nodes, over the models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from sqlalchemy.orm import Session, sessionmaker

from hdcs_tasks.clock import driven_by
from hdcs_tasks.config import CapacitySettings, Settings
from hdcs_tasks.hypervisor import storage
from hdcs_tasks.monitor import control_samples as monitor_control
from hdcs_tasks.operations import recovery
from hdcs_tasks.operations.control import Control
from hdcs_tasks.operations.node import NodeContext, execute, resend_spooled
from hdcs_tasks.operations.sending import send
from hdcs_tasks.operations.spool import Spool
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool import node as pool_node
from hdcs_tasks.pool import node_cables, rebuild, tidy, waiting
from hdcs_tasks.pool.identity import instance_id
from hdcs_tasks.pool.proof import JoinRequest
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.routing import CONTROL, direct_queue, quick_queue
from hdcs_tasks.states import ImageState, VmState
from hdcs_tasks.store.engine import Store, make_engine
from hdcs_tasks.store.models import Base, Image, ImageCopy, Profile
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm import control_drain, node_migrate, node_start
from hdcs_tasks.vm import node as vm_node
from hdcs_tasks.vm.control_clone import Shape, new_vm
from tests.chaos.sim.broker import Broker, Worker
from tests.chaos.sim.checks import Fence
from tests.chaos.sim.hypervisor import HostModel, World
from tests.chaos.sim.kernel import Actor, Kernel, Process
from tests.chaos.sim.redis_model import ModelClient, RedisModel, Words

TOKEN = "join-token"
POOLS = {"east": ("node1", "node2"), "west": ("node3",)}
VMS = ("desk-1", "desk-2", "desk-3")
FACTS = {
    "cpu_mhz": 3000, "sockets": 1, "cores_per_socket": 4, "threads_per_core": 1, "max_vcpus": 64, "memory_mib": 3250,
}  # fmt: skip
FENCE = ("attempt", "holder", "done", "cancel")
"""What ``Steps.check`` reads: the fence."""

STEPS: dict[str, Any] = {
    "vm.clone_on_node": vm_node.clone, "vm.start_on_node": node_start.start, "vm.delete_on_node": vm_node.delete,
    "vm.discard_on_node": vm_node.delete,
    "vm.save_on_node": vm_node.save, "vm.stop_on_node": vm_node.stop, "vm.suspend_on_node": vm_node.suspend,
    "vm.resume_on_node": vm_node.resume, "vm.reboot_on_node": vm_node.reboot,
    "vm.migrate_prepare_on_node": node_migrate.prepare, "vm.migrate_on_node": node_migrate.perform,
    "vm.migrate_finish_on_node": node_migrate.finish, "vm.migrate_clean_on_node": node_migrate.clean,
    "vm.migrate_undo_on_node": node_migrate.undo, "vm.migrate_look_on_node": node_migrate.look,
}  # fmt: skip
SWEEPS: dict[str, tuple[str, Callable[[Control], Any]]] = {
    "operations.recovery_sweep": ("recovery", recovery.recovery_sweep),
    "pool.lease_sweep": ("leases", pool_control.lease_sweep),
    "pool.reservation_sweep": ("reservations", rebuild.reservation_sweep),
    "pool.waiting_sweep": ("waiting", waiting.waiting_sweep),
    "vm.drain_sweep": ("drains", control_drain.drain_sweep),
    "pool.dhcp_sweep": ("dhcp", tidy.dhcp_sweep),
    "pool.tidy_sweep": ("tidy", tidy.tidy_sweep),
    "monitor.sample_sweep": ("monitor", monitor_control.sample_sweep),
}

LOOKS = ("monitor.sample_sweep", "pool.tidy_sweep", "pool.dhcp_sweep")


def settings(folder: Path, domain_node: str = "", server_node: str = "", ip: str = "") -> Settings:
    return Settings(
        redis_url="redis://127.0.0.1:1/0", database_url="sqlite://", key_prefix="hdcs:", lease_ttl_s=10, sweep_s=5,
        sample_s=20, step_deadline_s=300, attempts_max=5, park_deadline_s=60, dhcp_lease_s=120, port_cooling_s=30,
        subnet_prefix=28, ports_per_domain_node=40, domain_node=domain_node, server_node=server_node,
        server_node_ip=ip, storage_root=folder / "storage" / (domain_node or "none"),
        state_dir=folder / "state" / (server_node or "control"), virt_type="qemu", log_level="ERROR",
        capacity=CapacitySettings(host_reserve_mib=2048),
    )  # fmt: skip


class SimStore(Store):
    """The record, in memory; whoever is in a transaction does not give way, and may die right after its commit."""

    kernel: Kernel

    @contextmanager
    def _session(self, make: sessionmaker[Session]) -> Iterator[Session]:
        actor = self.kernel.present()
        if actor is not None:
            actor.locked += 1
        try:
            with super()._session(make) as session:
                yield session
        finally:
            if actor is not None:
                actor.locked -= 1
        if make is self._sessions:
            self.kernel.point("committed")


class Ground:
    """What a process makes once for all its histories: the schema, the folders, a data center that is set up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = SimStore(make_engine("sqlite://"))
        Base.metadata.create_all(self.store.engine)
        self.live: Any = self.store.engine.raw_connection().driver_connection
        self.nodes: dict[str, Settings] = {}
        self.layouts: dict[str, storage.StorageLayout] = {}
        for at, (pool, names) in enumerate(POOLS.items()):
            root = folder / "storage" / pool
            root.mkdir(parents=True)
            self.layouts[pool] = storage.prepare(root, pool)
            base = self.layouts[pool].path("images", "mini", "1.qcow2")
            base.parent.mkdir()
            base.touch()
            for name in names:
                self.nodes[name] = settings(folder, pool, name, f"10.9.{at}.{name[-1]}")
        self.control_settings = settings(folder)
        self._set_up()

    def _set_up(self) -> None:
        import sqlite3

        kernel = Kernel(0)
        center = Center(self, kernel, RedisModel(kernel.now_ms, "run0"))
        with driven_by(kernel):
            center.found()
        self.vm_ids = center.vm_ids
        self.redis = center.redis
        self.template = sqlite3.connect(":memory:")
        self.live.backup(self.template)

    def fresh(self, kernel: Kernel) -> Center:
        """The data center as it was set up, for one history."""
        self.template.backup(self.live)
        for layout in self.layouts.values():
            for kind in ("vms", "state"):
                for path in (layout.root / kind).iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        for node in self.nodes.values():
            for path in (*(node.state_dir / "spool").glob("*"), *(node.state_dir / "cables").glob("*")):
                path.unlink()
        for vm_id in self.vm_ids.values():
            disk = self.layouts["east"].disk(vm_id)
            disk.parent.mkdir()
            disk.touch()
        server = RedisModel(kernel.now_ms)
        server.copy_from(self.redis)
        center = Center(self, kernel, server)
        center.vm_ids = dict(self.vm_ids)
        return center


class Node:
    """A server node: its host, its two workers and the thread that keeps it in its pool."""

    def __init__(self, center: Center, config: Settings, host: HostModel) -> None:
        self.center, self.config, self.host = center, config, host
        self.power = Process(config.server_node)
        self.long = self.quick = Process("not started", self.power)

    def start(self) -> None:
        """Start what does not run: both workers and the membership thread."""
        if not self.long.alive or self.long.name == "not started":
            self.long = self._worker("", [self._queue(direct_queue), self.config.domain_node], 2, forks=True)
            membership = self._membership(self.long)
            self.center.kernel.spawn(self.long, f"{self.config.server_node} membership", "member", membership)
        if not self.quick.alive or self.quick.name == "not started":
            self.quick = self._worker(".quick", [self._queue(quick_queue)], 4, forks=False)

    def _queue(self, make: Callable[[str, str], str]) -> str:
        return make(self.config.domain_node, self.config.server_node)

    def _worker(self, suffix: str, queues: list[str], slots: int, forks: bool) -> Process:
        name = f"{self.config.domain_node}{suffix}@{self.config.server_node}"
        process = Process(name, self.power)
        broker = self.center.broker
        broker.workers = [w for w in broker.workers if w.name != name]
        broker.workers.append(Worker(name, "node", process, queues, slots, forks, self._handle))
        return process

    def context(self, process: Process) -> NodeContext:
        center = self.center
        hosts: Any = _Hosts(self.host)
        spool = Spool(self.config.state_dir / "spool")
        return NodeContext(self.config, center.broker.celery_of(process), center.reservations(process), hosts, spool)  # type: ignore[arg-type]

    def _handle(self, process: Process, name: str, message: dict[str, Any]) -> None:
        ctx, kernel = self.context(process), self.center.kernel
        if name in STEPS:
            became = execute(ctx, name, STEPS[name], lambda text: None, queue=ctx.domain_node, **message)
            kernel.tell(f"{ctx.server_node}: {name} attempt {message['attempt']}: {became}")
        elif name == "pool.report_on_node":
            pool_node.report(ctx, **message)
        elif name == tidy.TIDY_TASK:
            pool_node.tidy(ctx)
            node_cables.renew_all_noted(ctx)
        elif name == monitor_control.END_LEFT_TASK:
            vm_node.end_left(ctx, **message)
        elif name == monitor_control.SAMPLE_TASK:
            self._sample(ctx)

    def _sample(self, ctx: NodeContext) -> None:
        """As monitor.node.sample, without libvirt's statistics."""
        guests = [
            {"vm_id": g.vm_id, "state": g.state, "cpu_percent": 50.0, "console_clients": 0}
            for g in self.center.world.list_guests(self.host) if g.active
        ]  # fmt: skip
        sample = {"node": ctx.server_node, "at": self.center.kernel.time, "guests": guests, "storage": {}}
        send(ctx.celery, "monitor.sampled", {"sample": sample}, CONTROL, expires_s=60)

    def _membership(self, process: Process) -> Callable[[], None]:
        """As workers.node_worker.Membership: join, renew, join again when the lease ran out, send what is spooled."""

        def run() -> None:
            kernel, ctx, renewed = self.center.kernel, self.context(process), -1e9
            while True:
                try:
                    if kernel.time - renewed >= 3.0:
                        renewed = kernel.time
                        if not pool_node.renew(ctx):
                            send(ctx.celery, "pool.join", {"request": vars(self.join_request())}, CONTROL, expires_s=15)
                            renewed -= 1.0
                    resend_spooled(ctx)
                except Exception as error:
                    kernel.tell(f"{ctx.server_node} membership: {error}")
                kernel.sleep(2.0)

        return run

    def join_request(self) -> JoinRequest:
        config = self.config
        return JoinRequest(
            config.domain_node, config.server_node, config.server_node_ip, instance_id(config), FACTS,
            {"total_bytes": 10**12, "free_bytes": 10**12}, self.center.kernel.time,
        ).signed(TOKEN)  # fmt: skip


class _Hosts:
    def __init__(self, host: HostModel) -> None:
        self._host = host

    def get(self) -> HostModel:
        return self._host


class Center:
    """One history's data center."""

    def __init__(self, ground: Ground, kernel: Kernel, server: RedisModel) -> None:
        self.ground, self.kernel, self.redis = ground, kernel, server
        ground.store.kernel = kernel
        self.broker = Broker(kernel, server)
        hosts = [HostModel(n, c.domain_node, c.server_node_ip) for n, c in ground.nodes.items()]
        self.world = World(kernel, hosts)
        self.world.by_state_dir = {c.state_dir: self.world.hosts[n] for n, c in ground.nodes.items()}
        self.nodes = {name: Node(self, config, self.world.hosts[name]) for name, config in ground.nodes.items()}
        self.controls: dict[str, Process] = {}
        self.swept_by_hand = False
        self._reservations: dict[Process, Reservations] = {}
        self.vm_ids: dict[str, str] = {}
        self.fence = Fence(kernel, server)
        self.world.fence = self.fence.judge
        kernel.on_crash = self._died

    def close(self) -> None:
        """Let go of what points back here, so that a finished history is freed at once and not by the collector."""
        for part in (self.broker, self.world, self.fence, *self.nodes.values(), self):
            vars(part).clear()

    # --- what each process has

    def reservations(self, process: Process) -> Reservations:
        """The process's own, made once as in the product: what it knows of Redis's scripts lives as long as it does."""
        made = self._reservations.get(process)
        if made is None:
            client: Any = ModelClient(self.redis, lambda words: self._gate(process, words))
            made = self._reservations[process] = Reservations(client, "hdcs:")
        return made

    def _gate(self, process: Process, words: Words) -> bool:
        kernel = self.kernel
        kernel.point(f"Redis {words[0]}")
        if not self.broker.reachable(process):
            raise redis.ConnectionError("Connection refused")
        if words[0] == "HMGET" and words[2:] == FENCE:
            self.fence.checked(kernel.present())
        if kernel.present() is not None and kernel.rng.random() < kernel.odds.twice:
            kernel.fault("Redis answer lost, asked again", str(words[0]))
            return True
        return False

    def control(self, process: Process) -> Control:
        celery: Any = self.broker.celery_of(process)
        return Control(self.ground.control_settings, self.ground.store, self.reservations(process), celery)

    # --- setting up

    def found(self) -> None:
        """Create domain nodes, join every server node, bring an image and three stopped VMs."""
        control = self.control(Process("setup"))
        control.reservations.epoch.open()
        for pool in POOLS:
            pool_control.create_domain_node(control, pool, TOKEN)
        for node in self.nodes.values():
            pool_control.join(control, node.join_request())
        with control.transaction() as tx:
            tx.session.add(Profile(name="tiny", vcpus=1, memory_mib=128))
            image = Image(id=self.kernel.new_id(), name="mini", version=1, virtual_size_bytes=10**9, sha256="0" * 64)
            tx.session.add(image)
            tx.session.flush()
            for pool in POOLS:
                tx.session.add(ImageCopy(image_id=image.id, domain_node=pool, state=ImageState.READY))
            for name in VMS:
                vm = new_vm(tx, name, Shape("tiny", 1, 128, 10**9, "off"), "east", image_id=image.id)
                move(vm, VmState.STOPPED)
                self.vm_ids[name] = vm.id

    def start(self) -> None:
        """Start control workers, beat and every server node."""
        for name in ("control@a", "control@b"):
            self.start_control(name)
        for node in self.nodes.values():
            node.start()
        config = self.ground.control_settings
        for at, task in enumerate(SWEEPS):
            period = config.sweep_s * (4 if task.startswith(("monitor", "pool.tidy", "pool.dhcp")) else 1)
            self._beat(task, period, 0.5 + at)

    def _beat(self, task: str, period_s: float, delay_s: float) -> None:
        def tick() -> None:
            if self.broker.up and self._is_worth(task):
                self.broker.put(task, {"period_s": period_s}, CONTROL, max(period_s, 1.0))
            self._beat(task, period_s, period_s)

        self.kernel.at(delay_s, tick)

    def _is_worth(self, task: str) -> bool:
        """Those that look at everything take most of a history's time: they come every second time, and not at all
        while ``sweep`` asks for them."""
        looks = 0.0 if self.swept_by_hand else 0.5
        return self._has_work(task) and (task not in LOOKS or self.kernel.rng.random() < looks)

    def _has_work(self, task: str) -> bool:
        """Whether a sweep could find anything: one that cannot is left out, it costs and shows nothing."""
        if task == "operations.recovery_sweep":
            return self.live_operations() > 0
        if task == "vm.drain_sweep":
            query = "SELECT 1 FROM operation WHERE kind = 'pool.drain' AND state IN ('queued', 'running')"
            return bool(self.ground.live.execute(query).fetchone())
        if task == "pool.waiting_sweep":
            return bool(self.ground.live.execute("SELECT 1 FROM step WHERE state = 'parked' LIMIT 1").fetchone())
        if task == "pool.lease_sweep":
            lost = self.ground.live.execute("SELECT count(*) FROM server_node WHERE state = 'lost'").fetchone()[0]
            return lost or any(self.redis.run("GET", f"hdcs:lease:node:{name}") is None for name in self.nodes)
        if task == "pool.reservation_sweep":
            open_ = self.redis.run("GET", "hdcs:epoch:run_id") == self.redis.run_id
            return not open_ or self.kernel.rng.random() < 0.1
        if task == "monitor.sample_sweep":
            return bool(self.ground.live.execute("SELECT 1 FROM vm WHERE server_node IS NOT NULL").fetchone())
        return True

    def live_operations(self) -> int:
        """How many operations have not ended, or wait for one that has."""
        query = "SELECT count(*) FROM operation WHERE state IN ('queued', 'running') OR waits_for IS NOT NULL"
        return int(self.ground.live.execute(query).fetchone()[0])

    def sweep(self) -> None:
        """Every sweep that could find anything at once, beside those of beat."""
        for task in SWEEPS:
            if task.startswith("pool.") or self._has_work(task):  # those of reservations find what nobody expects
                self.broker.put(task, {"period_s": 0.001}, CONTROL, 60)

    def start_control(self, name: str) -> None:
        process = self.controls[name] = Process(name)
        self.broker.workers = [w for w in self.broker.workers if w.name != name]
        self.broker.workers.append(Worker(name, "control", process, [CONTROL], 2, False, self._handle_control))

    def _handle_control(self, process: Process, name: str, message: dict[str, Any]) -> None:
        control = self.control(process)
        if name == "operations.outcome":
            recovery.settle(control, **message)
        elif name in SWEEPS:
            slot, sweep = SWEEPS[name]
            answer = recovery.sweep_once(control, slot, message["period_s"], sweep)
            if answer not in (None, "open", [], 3, 0) and not (isinstance(answer, dict) and not _acted(answer)):
                self.kernel.tell(f"{name}: {answer}")
        elif name == "pool.join":
            pool_control.join(control, JoinRequest(**message["request"]))
        elif name == "pool.node_report":
            rebuild.take_report(control, **message)
        elif name == "monitor.sampled":
            monitor_control.take_sample(control, **message)

    # --- what happens to processes

    def _died(self, actor: Actor) -> None:
        """An actor crashed: its process dies with it, and what restarts it does so a little later."""
        process = actor.process
        if actor.kind == "node" and process.parent is not None and self.kernel.rng.random() < 0.3:
            process = process.parent if process.parent.parent is not None else process
        self.kill(process)

    def kill(self, process: Process) -> None:
        self.kernel.kill(process)
        for name, worker in self.controls.items():
            if worker is process:
                self.kernel.at(self.kernel.rng.uniform(0.5, 3.0), lambda name=name: self.start_control(name))  # type: ignore[misc]
        for node in self.nodes.values():
            if process in (node.long, node.quick):
                self.kernel.at(self.kernel.rng.uniform(0.5, 3.0), lambda node=node: self._restart(node))  # type: ignore[misc]

    def _restart(self, node: Node) -> None:
        if node.power.alive:
            node.start()


def _acted(counts: dict[str, int]) -> bool:
    return any(count for verdict, count in counts.items() if verdict != "leave")
