"""One history: requests and faults drawn from one seed, then peace, then judgement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import select

from hdcs_tasks.clock import driven_by
from hdcs_tasks.errors import HdcsError, Unavailable
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.operations.views import cancel
from hdcs_tasks.states import OPERATION_LIVE, STEP_LIVE
from hdcs_tasks.store.models import Operation, Step
from hdcs_tasks.vm import control as vm_control
from hdcs_tasks.vm import control_clone, control_delete, control_drain, control_migrate
from hdcs_tasks.vm.control_clone import CloneRequest
from tests.chaos.sim.center import VMS, Center, Ground, Node
from tests.chaos.sim.checks import judge
from tests.chaos.sim.hypervisor import rooms
from tests.chaos.sim.kernel import START_S, Kernel, Odds, Process

BUSY_S = 20.0
"""How long requests and faults come."""

SETTLED_WITHIN_S = 240.0
"""Every acknowledged operation has ended this long after the last fault, in virtual time."""

QUIET_S = 7.0
"""Between the last operation's end and a sweep: long enough for a sample to count."""

Ask = Callable[[Control, Asked], dict[str, Any] | Operation]

PROFILES: tuple[Odds, ...] = (
    Odds(),
    Odds(drop=0.08, duplicate=0.1, delay=0.1),
    Odds(crash=0.02),
    Odds(crash=0.01, drop=0.03, duplicate=0.05, delay=0.05),
    Odds(freeze=0.01, twice=0.02),
    Odds(crash=0.008, freeze=0.006, twice=0.02, drop=0.03, duplicate=0.05, delay=0.05, give_way=0.3),
)


class History:
    """Draws, runs and judges the history of one seed."""

    def __init__(self, ground: Ground, seed: int, *, tell: bool = False) -> None:
        self.kernel = Kernel(seed, tell=tell)
        self.seed = seed
        self.center: Center = ground.fresh(self.kernel)
        self.accepted: dict[str, str] = {}
        self.names = list(VMS)
        self.settled_s = 0.0
        self._restarts = 0

    def run(self) -> History:
        with driven_by(self.kernel), rooms(self.center.world):
            self._begin()
            self.kernel.run(START_S + BUSY_S)
            self._peace()
            self._settle()
            judge(self)
            self.kernel.close()
        self.center.close()
        return self

    # --- what is asked

    def _begin(self) -> None:
        kernel = self.kernel
        rng = kernel.rng
        self.center.start()
        kernel.odds = rng.choice(PROFILES)
        self.center.world.refuse = rng.choice((0.0, 0.0, 0.1))
        self.center.world.broken_hand_over = rng.choice((0.0, 0.5))
        for number in range(rng.randint(3, 8)):
            kernel.at(rng.uniform(1.0, BUSY_S - 6), lambda number=number: self._request(number))  # type: ignore[misc]
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            kernel.at(rng.uniform(2.0, BUSY_S - 2), rng.choice(self._strikes()))

    def _request(self, number: int) -> None:
        what, ask = self._draw()
        self.kernel.tell(f"ASK {number}: {what}")
        self._ask(number, what, ask, tries=4)

    def _draw(self) -> tuple[str, Ask]:
        rng = self.kernel.rng
        vm = rng.choice(self.names)
        kind = rng.choices(
            ("start", "stop", "force", "migrate", "delete", "clone", "suspend", "resume", "save", "reboot", "many",
             "cancel", "drain"),
            (7, 2, 4, 4, 2, 3, 1, 1, 2, 1, 2, 3, 1),
        )[0]  # fmt: skip
        if kind == "clone":
            return self._draw_clone()
        if kind == "cancel":
            if not self.accepted:
                return self._draw_clone()
            chosen = rng.choice(list(self.accepted.values()))
            return f"cancel {chosen[:8]}", lambda c, a: cancel(c, chosen)
        if kind == "drain":
            node, drain = rng.choice(list(self.center.nodes)), rng.random() < 0.6
            if not drain:
                return f"resume {node}", lambda c, a: control_drain.resume_node(c, node)
            moving = rng.random() < 0.7
            return f"drain {node} moving={moving}", lambda c, a: control_drain.drain_node(c, node, a, moving=moving)
        asks: dict[str, Ask] = {
            "start": lambda c, a: vm_control.start(c, vm, a),
            "force": lambda c, a: vm_control.command(c, "stop", vm, a, force=True),
            "migrate": lambda c, a: control_migrate.migrate(c, vm, a),
            "delete": lambda c, a: control_delete.delete(c, vm, a),
            "many": lambda c, a: vm_control.start_many(c, self.names[:4], a),
        }
        return f"{kind} {vm}", asks.get(kind, lambda c, a: vm_control.command(c, kind, vm, a, timeout_s=20))

    def _draw_clone(self) -> tuple[str, Ask]:
        rng = self.kernel.rng
        name, count = f"new-{len(self.names)}", rng.choice((1, 1, 2))
        pattern = name if count == 1 else name + "-{}"
        self.names += [name] if count == 1 else [f"{name}-1", f"{name}-2"]
        request = CloneRequest("mini", pattern, count, "tiny", rng.choice((None, "east")), rng.random() < 0.6)
        return f"clone {count} {pattern} start={request.start}", lambda c, a: control_clone.clone(c, request, a)

    def _ask(self, number: int, what: str, ask: Ask, tries: int) -> None:
        """One caller: no answer means not acknowledged, and it asks again with the same key."""
        kernel, key = self.kernel, f"key-{number}"
        process = Process(f"caller {number}")
        answered: list[str] = []

        def body() -> None:
            try:
                found = ask(self.center.control(process), Asked(by="sim", idempotency_key=key))
            except Unavailable as error:
                kernel.tell(f"caller {number}: {what}: {error.code}")
                if error.code == "no_capacity":
                    answered.append("")
                return
            except HdcsError as error:
                kernel.tell(f"caller {number}: {what} refused: {error.message[:120]}")
                answered.append("")
                return
            if isinstance(found, Operation):
                answered.append(found.id)
                kernel.tell(f"caller {number}: {what} accepted as {found.id[:8]}")
                self._acknowledged(key, found.id)
            else:
                answered.append("")

        def ended() -> None:
            if not answered and tries and kernel.time < START_S + BUSY_S:
                kernel.at(kernel.rng.uniform(0.5, 5.0), lambda: self._ask(number, what, ask, tries - 1))
            elif answered and answered[0] and tries == 4 and kernel.rng.random() < 0.15:
                kernel.at(kernel.rng.uniform(0.1, 20.0), lambda: self._ask(number, what, ask, 0))

        kernel.spawn(process, f"caller {number} {what}", "client", body, ended)

    def _acknowledged(self, key: str, operation: str) -> None:
        if self.accepted.setdefault(key, operation) != operation:
            self.kernel.violated("one key, two operations", f"{key}: {self.accepted[key]} and {operation}")

    # --- what strikes

    def _strikes(self) -> list[Callable[[], None]]:
        return [self._restart_redis, self._restart_redis, self._wipe_redis, self._power_off, self._power_off,
                self._cut_off, self._libvirtd, self._kill_control, self._kill_worker]  # fmt: skip

    def _restart_redis(self) -> None:
        self._stop_redis("Redis restarted, its last second lost", self.kernel.rng.choice((0, 300, 1000)))

    def _wipe_redis(self) -> None:
        self._stop_redis("Redis wiped", None)

    def _stop_redis(self, what: str, lost_ms: int | None) -> None:
        if not self.center.broker.up:
            return
        self.center.broker.up = False
        self.kernel.fault(what, "" if lost_ms is None else f"{lost_ms} ms")
        self.kernel.at(self.kernel.rng.choice((0.1, 2.0, 14.0)), lambda: self._start_redis(lost_ms))

    def _start_redis(self, lost_ms: int | None) -> None:
        if self.center.broker.up:
            return
        self._restarts += 1
        if lost_ms is None:
            self.center.redis.wipe()
        undone = self.center.redis.restart(f"run{self._restarts}", lost_ms or 0)
        self.kernel.tell(f"Redis is up again, {undone} changes lost")
        self.center.broker.up = True
        self.center.broker.deliver()

    def _node(self) -> Node:
        return self.center.nodes[self.kernel.rng.choice(list(self.center.nodes))]

    def _power_off(self) -> None:
        node = self._node()
        if not node.power.alive:
            return
        self.kernel.fault("server node lost", node.config.server_node)
        node.host.power_off()
        self.kernel.kill(node.power)
        self.kernel.at(self.kernel.rng.choice((2.0, 12.0, 25.0)), lambda: self._power_on(node))

    def _power_on(self, node: Node) -> None:
        if node.power.alive:
            return
        self.kernel.tell(f"{node.config.server_node} is back")
        node.host.powered = node.host.up = True
        node.power = Process(node.config.server_node)
        node.start()

    def _cut_off(self) -> None:
        node, seconds = self._node(), self.kernel.rng.choice((3.0, 14.0, 30.0))
        self.kernel.fault("server node cut off", f"{node.config.server_node} for {seconds:g} s")
        node.power.cut_off(True)
        self.kernel.at(seconds, lambda: self._join_again(node))

    def _join_again(self, node: Node) -> None:
        node.power.cut_off(False)
        self.center.broker.deliver()

    def _libvirtd(self) -> None:
        node = self._node()
        self.kernel.fault("libvirtd killed", node.config.server_node)
        node.host.down()
        self.kernel.at(self.kernel.rng.choice((0.5, 6.0)), lambda: self._libvirtd_back(node))

    def _libvirtd_back(self, node: Node) -> None:
        node.host.up = node.host.powered

    def _kill_control(self) -> None:
        name = self.kernel.rng.choice(list(self.center.controls))
        self.kernel.fault("control worker killed", name)
        self.center.kill(self.center.controls[name])

    def _kill_worker(self) -> None:
        node = self._node()
        process = self.kernel.rng.choice((node.long, node.quick))
        self.kernel.fault("server node worker killed", process.name)
        self.center.kill(process)

    # --- the end

    def _peace(self) -> None:
        """No fault any more, and all that was struck is mended."""
        kernel, center = self.kernel, self.center
        kernel.tell("PEACE")
        kernel.odds = Odds(give_way=0.0)
        center.world.refuse = center.world.broken_hand_over = 0.0
        if not center.broker.up:
            self._start_redis(0)
        for node in center.nodes.values():
            self._power_on(node)
            node.host.up = True
            self._join_again(node)
            node.start()
        for process in {actor.process for actor in kernel.actors.values()}:
            while process is not None:
                process.freeze(0.0)
                process = process.parent  # type: ignore[assignment]
        for name, process in center.controls.items():
            if not process.alive:
                center.start_control(name)
        center.broker.deliver()

    def _live(self) -> list[str]:
        with self.center.ground.store.read() as session:
            found = session.scalars(select(Operation).where(Operation.state.in_(OPERATION_LIVE))).all()
            steps = session.scalars(select(Step).where(Step.state.in_(STEP_LIVE))).all()
            return [f"{o.kind} {o.subject} {o.id[:8]}: {o.phase}" for o in found] + [
                f"step {s.name} {s.id[:8]} {s.state} attempt {s.attempt}" for s in steps
            ]

    def _settle(self) -> None:
        """Let operations end; then two rounds of every sweep, and what these ask for."""
        kernel, center = self.kernel, self.center
        since = kernel.time
        self._until_ended(since + SETTLED_WITHIN_S)
        self.settled_s = kernel.time - since
        if center.live_operations():
            for line in self._live():
                kernel.violated("not settled", f"{line} after {SETTLED_WITHIN_S:g} s")
        center.swept_by_hand = True
        for _ in range(2):
            kernel.run(kernel.time + QUIET_S)
            center.sweep()
            kernel.run(kernel.time + 1.0)
            self._until_ended(kernel.time + SETTLED_WITHIN_S)
        kernel.run(kernel.time + 1.0)

    def _until_ended(self, until: float) -> None:
        while self.center.live_operations() and self.kernel.time < until:
            self.kernel.run(min(until, self.kernel.time + 1.0))
