"""Claims under any interleaving: Redis agrees with a plain model after every step, and nothing leaks at the end."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hdcs_tasks.errors import Conflict, NoCapacity
from hdcs_tasks.reservations import Addresses, MixEntry, Placed, PlaceRequest, PoolNode, Reservations
from hdcs_tasks.reservations.link import connect
from tests.services import Missing, RedisServer, redis_server, require

pytestmark = pytest.mark.contract

NODES = {"n1": (8, 2048), "n2": (4, 4096), "n3": (16, 1024)}
VMS = st.sampled_from([f"vm{i}" for i in range(9)])
SHAPES = st.sampled_from([(1, 256), (2, 512), (4, 1024)])
LONELY = st.lists(st.sampled_from([f"lone{i}" for i in range(5)]), min_size=1, max_size=3, unique=True)
MIXES = st.sampled_from([(), (MixEntry(1, 256, 0.6), MixEntry(4, 1024, 0.4))])
SERVER: list[RedisServer] = []


class Claims(RuleBasedStateMachine):
    """``held``: (VM, server node) -> (vCPU, MiB, placement, step). ``alone``: what VMs have without capacity, on which
    server node."""

    @initialize()
    def begin(self) -> None:
        client = connect(SERVER[0].url)
        client.flushall()
        self.reservations = Reservations(client)
        self.reservations.epoch.open()
        self.reservations.ports.set_range("east", 20000, 20005)
        self.totals = dict(NODES)
        self.draining: set[str] = set()
        self.held: dict[tuple[str, str], tuple[int, int, Placed, str]] = {}
        self.alone: dict[str, tuple[str, Addresses]] = {}
        self.steps = 0
        for name in NODES:
            self.put(name)

    def put(self, name: str) -> None:
        number = int(name[1:])
        node = PoolNode(name, *self.totals[name], f"10.128.{number}.0/29", schedulable=name not in self.draining)
        self.reservations.pool.put_node("east", node)

    def free(self, name: str) -> tuple[int, int]:
        used = [h for (_, node), h in self.held.items() if node == name]
        return self.totals[name][0] - sum(h[0] for h in used), self.totals[name][1] - sum(h[1] for h in used)

    @rule(vm=VMS, shape=SHAPES, migrate=st.booleans(), again=st.booleans(), mix=MIXES, spread=st.booleans())
    def place(
        self, vm: str, shape: tuple[int, int], migrate: bool, again: bool, mix: tuple[MixEntry, ...], spread: bool
    ) -> None:
        mine = {node: h for (owner, node), h in self.held.items() if owner == vm}
        exclude = tuple(mine) if migrate else ()
        self.steps += 1
        request = PlaceRequest("east", vm, f"s{self.steps}", *shape, exclude=exclude, mac=True, mix=mix,
                               order="spread" if spread else "pack")  # fmt: skip
        try:
            placed = self.reservations.pool.place(request)
        except Conflict:
            assert len(mine) == 2 or (mine and not migrate)
            return
        except NoCapacity as e:
            assert not mine or migrate
            if not e.details["ports"]:
                self.check_refusal(shape, exclude)
            return
        if mine and not migrate:
            assert placed.node in mine
            assert placed == mine[placed.node][2]
        else:
            assert placed.node not in mine
            assert placed.node not in self.draining
            assert all(h[2].port == placed.port for h in mine.values())
        self.held[vm, placed.node] = (*shape, placed, request.step)
        if again:
            assert self.reservations.pool.place(request) == placed

    def check_refusal(self, shape: tuple[int, int], exclude: tuple[str, ...]) -> None:
        """A refusal is right only where no node really fits; each /29 has 5 addresses for guests."""
        for name in self.totals:
            if name in exclude or name in self.draining:
                continue
            vcpus, memory = self.free(name)
            used_ips = sum(node == name for _, node in self.held)
            used_ips += sum(node == name for node, _ in self.alone.values())
            assert vcpus < shape[0] or memory < shape[1] or used_ips == 5

    @rule(vms=LONELY, node=st.sampled_from(sorted(NODES)), one_by_one=st.booleans())
    def take_addresses(self, vms: list[str], node: str, one_by_one: bool) -> None:
        """Port, MAC and IP without capacity: of several in one call, or of each alone."""
        vms = [vm for vm in vms if self.alone.get(vm, (node,))[0] == node]
        found: list[Addresses | NoCapacity] = []
        for vm in vms if one_by_one else ():
            try:
                found.append(self.reservations.addresses.take("east", node, vm))
            except NoCapacity as e:
                found.append(e)
        for vm, got in zip(vms, found or self.reservations.addresses.take_many("east", node, vms), strict=True):
            if isinstance(got, Addresses):
                assert self.alone.setdefault(vm, (node, got)) == (node, got)
            else:
                assert vm not in self.alone

    @precondition(lambda self: self.alone)
    @rule(data=st.data())
    def give_addresses_back(self, data: st.DataObject) -> None:
        vm = data.draw(st.sampled_from(sorted(self.alone)))
        self.reservations.pool.release("east", vm, self.alone.pop(vm)[0], 0, port_cooling_s=0)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        vm, node = data.draw(st.sampled_from(sorted(self.held)))
        assert self.reservations.pool.release("east", vm, node, 0, port_cooling_s=0)
        assert not self.reservations.pool.release("east", vm, node, 0)
        del self.held[vm, node]

    @rule(name=st.sampled_from(sorted(NODES)), drain=st.booleans(), shrink=st.booleans())
    def change_node(self, name: str, drain: bool, shrink: bool) -> None:
        (self.draining.add if drain else self.draining.discard)(name)
        vcpus, memory = NODES[name]
        self.totals[name] = (vcpus // 2, memory // 2) if shrink else (vcpus, memory)
        self.put(name)

    @rule()
    def reclaim(self) -> None:
        self.reservations.ports.reclaim("east")

    @rule()
    def lose_and_rebuild(self) -> None:
        before = self.reservations.dump()
        connect(SERVER[0].url).flushall()
        self.reservations.rebuild(before, port_cooling_s=0)
        self.alone.clear()  # no claim tells of them: their ports cool, their IPs are forgotten

    @invariant()
    def redis_agrees(self) -> None:
        if not hasattr(self, "held"):
            return
        pool = self.reservations.pool
        assert {(c.vm, c.node): (c.vcpus, c.memory_mib) for c in pool.claims("east")} == {
            k: h[:2] for k, h in self.held.items()
        }
        for node in pool.nodes("east"):
            assert (node.free_vcpus, node.free_memory_mib) == self.free(node.name)
        alone = {vm: got for vm, (_, got) in self.alone.items()}
        ips = [h[2].ip for h in self.held.values()] + [got.ip for got in alone.values()]
        ports = {vm: h[2].port for (vm, _), h in self.held.items()} | {vm: got.port for vm, got in alone.items()}
        assert len(ips) == len(set(ips))
        assert len(ports) == len(set(ports.values()))
        macs = self.reservations.macs.all()
        assert len(macs) == len(set(macs.values()))
        assert all(macs[vm] == got.mac for vm, got in alone.items())
        assert all(self.reservations.macs.owner(mac) == vm for vm, mac in macs.items())

    def teardown(self) -> None:
        if not hasattr(self, "held"):
            return
        for vm, node in sorted(self.held):
            self.reservations.pool.release("east", vm, node, 0, port_cooling_s=0)
        for vm in sorted(self.alone):
            self.reservations.pool.release("east", vm, self.alone.pop(vm)[0], 0, port_cooling_s=0)
        self.held.clear()
        self.redis_agrees()
        assert all(n.free_ips == 5 for n in self.reservations.pool.nodes("east"))
        self.reservations.ports.reclaim("east")
        assert self.reservations.ports.usage("east") == (0, 0, 6)


def test_claims_under_any_interleaving() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    try:
        with redis_server() as server:
            SERVER[:] = [server]
            run_state_machine_as_test(  # type: ignore[no-untyped-call]
                Claims,
                settings=settings(
                    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
                ),
            )
    except Missing as e:
        require(e)
