"""Eight processes take and give back at once: nothing twice, nothing over-committed, nothing left over."""

from __future__ import annotations

import multiprocessing
import random
from typing import NamedTuple

import pytest

from hdcs_tasks.errors import NoCapacity
from hdcs_tasks.reservations import Addresses, PlaceRequest, PoolNode, Reservations
from hdcs_tasks.reservations.link import connect
from tests.services import RedisServer

pytestmark = pytest.mark.contract

PROCESSES = 8
NODES = 4
SHAPES = [(1, 256), (2, 512), (4, 512)]


class Found(NamedTuple):
    """What a hammering showed. ``twice``: things two VMs had; ``over``: sightings of a node with less than nothing
    free; ``left``: what remained when all was given back; ``refused``: placements a full pool refused."""

    calls: int
    refused: int
    twice: list[str]
    over: list[str]
    left: list[str]


def work(url: str, number: int, rounds: int, found: multiprocessing.Queue[tuple[int, int, list[str]]]) -> None:
    """Take and give back at random; report calls, refusals, and what another process had at the same time."""
    client = connect(url)
    reservations = Reservations(client)
    draw = random.Random(number)
    held: dict[str, tuple[list[str], str]] = {}
    calls, refused = 0, 0
    twice: list[str] = []

    def give_back(vm: str) -> None:
        things, node = held.pop(vm)
        # The marks go first: from the release on another process may rightly hold the same things.
        client.delete(*(f"mark:{t}" for t in things))
        reservations.pool.release("east", vm, node, 0, port_cooling_s=0)
        reservations.macs.release(vm)

    def take(vm: str, node: str = "") -> tuple[str, Addresses]:
        """With capacity; every fourth VM without, half of these as one of a batch."""
        kind = sum(vm.encode()) % 8
        if kind > 1:
            placed = reservations.pool.place(PlaceRequest("east", vm, "s", *SHAPES[kind % 3], mac=True))
            return placed.node, Addresses(placed.port, placed.mac, placed.ip)
        node = node or f"n{draw.randrange(NODES)}"
        if kind:
            return node, reservations.addresses.take("east", node, vm)
        found = reservations.addresses.take_many("east", node, [vm])[0]
        if isinstance(found, NoCapacity):
            raise found
        return node, found

    for n in range(rounds):
        calls += 1
        if held and draw.random() < 0.45:
            give_back(draw.choice(sorted(held)))
            continue
        vm = f"vm-{number}-{n}"
        try:
            node, placed = take(vm)
        except NoCapacity:
            refused += 1
            reservations.macs.release(vm)
            continue
        if take(vm, node) != (node, placed):
            twice.append(f"{vm} placed differently when asked again")
        things = [f"port:{placed.port}", f"ip:{placed.ip}", f"mac:{placed.mac}"]
        twice += [f"{vm}: {t} is another's" for t in things if not client.set(f"mark:{t}", vm, nx=True)]
        held[vm] = (things, node)
    for vm in sorted(held):
        give_back(vm)
    found.put((calls, refused, twice))


def hammer(url: str, rounds: int) -> Found:
    """Eight processes on one small pool, watched meanwhile. The Redis is emptied first."""
    client = connect(url)
    client.flushall()
    reservations = Reservations(client)
    reservations.epoch.open()
    pool = reservations.pool
    reservations.ports.set_range("east", 20000, 20039)
    for n in range(NODES):
        pool.put_node("east", PoolNode(f"n{n}", 24, 4096, f"10.128.{n}.0/28"))
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[tuple[int, int, list[str]]] = context.Queue()
    workers = [context.Process(target=work, args=(url, n, rounds, found)) for n in range(PROCESSES)]
    for worker in workers:
        worker.start()
    over: list[str] = []
    while any(worker.is_alive() for worker in workers):
        over += [n.name for n in pool.nodes("east") if n.free_vcpus < 0 or n.free_memory_mib < 0]
        for worker in workers:
            worker.join(0.05)
    logs = [found.get(timeout=10) for _ in workers]
    reservations.ports.reclaim("east")
    left = [f"claim of {c.vm}" for c in pool.claims("east")] + [f"MAC of {vm}" for vm in reservations.macs.all()]
    left += [f"port of {vm}" for vm in reservations.ports.all("east")]
    left += [n.name for n in pool.nodes("east") if (n.free_vcpus, n.free_memory_mib, n.free_ips) != (24, 4096, 13)]
    twice = [line for log in logs for line in log[2]]
    return Found(sum(log[0] for log in logs), sum(log[1] for log in logs), twice, over, left)


def test_eight_processes_share_one_pool(redis_service: RedisServer) -> None:
    found = hammer(redis_service.url, 250)
    assert found.refused > 0, "the pool was never full: the test shows nothing"
    assert (found.twice, found.over, found.left) == ([], [], [])


def race(url: str, number: int, found: multiprocessing.Queue[list[str]]) -> None:
    steps = Reservations(connect(url)).steps
    won = [f"s{n}" for n in range(200) if steps.claim(f"s{n}", 1, f"w{number}", "n1", 30) == "claimed"]
    found.put(won)


def test_each_attempt_is_claimed_once(redis_service: RedisServer, reservations: Reservations) -> None:
    reservations.steps.issue_many((f"s{n}", 1, "") for n in range(200))
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[list[str]] = context.Queue()
    workers = [context.Process(target=race, args=(redis_service.url, n, found)) for n in range(PROCESSES)]
    for worker in workers:
        worker.start()
    won = [step for _ in workers for step in found.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert sorted(won) == sorted(f"s{n}" for n in range(200))
