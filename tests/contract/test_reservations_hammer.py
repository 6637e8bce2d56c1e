"""Eight processes take and give back at once: nothing twice, nothing over-committed, nothing left over."""

from __future__ import annotations

import multiprocessing
import random

import pytest

from hdcs_tasks.errors import NoCapacity
from hdcs_tasks.reservations import PlaceRequest, PoolNode, Reservations
from hdcs_tasks.reservations.link import connect
from tests.services import RedisServer

pytestmark = pytest.mark.contract

PROCESSES, ROUNDS = 8, 250
NODES = 4


def work(url: str, number: int, found: multiprocessing.Queue[dict[str, list[str]]]) -> None:
    """Take and give back at random; report what was held when, as this process saw it."""
    reservations = Reservations(connect(url))
    draw = random.Random(number)
    held: dict[str, tuple[str, ...]] = {}
    log: dict[str, list[str]] = {"twice": [], "refused": []}
    client = connect(url)
    for n in range(ROUNDS):
        if held and draw.random() < 0.45:
            vm = draw.choice(sorted(held))
            *things, node = held.pop(vm)
            # The marks go first: from the release on another process may rightly hold the same things.
            client.delete(*(f"mark:{t}" for t in things))
            reservations.pool.release("east", vm, node, 0, port_cooling_s=0)
            reservations.macs.release(vm)
            continue
        vm = f"vm-{number}-{n}"
        shape = draw.choice([(1, 256), (2, 512), (4, 512)])
        request = PlaceRequest("east", vm, "s", *shape, mac=True)
        try:
            placed = reservations.pool.place(request)
        except NoCapacity:
            log["refused"].append(vm)
            continue
        if reservations.pool.place(request) != placed:
            log["twice"].append(f"{vm} placed differently when asked again")
        things = [f"port:{placed.port}", f"ip:{placed.ip}", f"mac:{placed.mac}"]
        log["twice"] += [f"{vm} {t} is another's" for t in things if not client.set(f"mark:{t}", vm, nx=True)]
        held[vm] = (*things, placed.node)
    for vm, (*things, node) in held.items():
        client.delete(*(f"mark:{t}" for t in things))
        reservations.pool.release("east", vm, node, 0, port_cooling_s=0)
        reservations.macs.release(vm)
    found.put(log)


def test_eight_processes_share_one_pool(redis_service: RedisServer, reservations: Reservations) -> None:
    pool = reservations.pool
    reservations.ports.set_range("east", 20000, 20039)
    for n in range(NODES):
        pool.put_node("east", PoolNode(f"n{n}", 24, 4096, f"10.128.{n}.0/28"))
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[dict[str, list[str]]] = context.Queue()
    workers = [context.Process(target=work, args=(redis_service.url, n, found)) for n in range(PROCESSES)]
    for worker in workers:
        worker.start()
    over: list[str] = []
    while any(worker.is_alive() for worker in workers):
        over += [n.name for n in pool.nodes("east") if n.free_vcpus < 0 or n.free_memory_mib < 0]
        for worker in workers:
            worker.join(0.05)
    logs = [found.get(timeout=10) for _ in workers]
    assert [line for log in logs for line in log["twice"]] == []
    assert sum(len(log["refused"]) for log in logs) > 0, "the pool was never full: the test shows nothing"
    assert over == []
    reservations.ports.reclaim("east")
    assert pool.claims("east") == []
    assert reservations.macs.all() == {}
    assert reservations.ports.usage("east") == (0, 0, 40)
    assert [(n.free_vcpus, n.free_memory_mib, n.free_ips) for n in pool.nodes("east")] == [(24, 4096, 13)] * NODES


def race(url: str, number: int, found: multiprocessing.Queue[list[str]]) -> None:
    steps = Reservations(connect(url)).steps
    won = [f"s{n}" for n in range(200) if steps.claim(f"s{n}", 1, f"w{number}", "n1", 30) == "claimed"]
    found.put(won)


def test_each_attempt_is_claimed_once(redis_service: RedisServer, reservations: Reservations) -> None:
    reservations.steps.issue_many((f"s{n}", 1) for n in range(200))
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[list[str]] = context.Queue()
    workers = [context.Process(target=race, args=(redis_service.url, n, found)) for n in range(PROCESSES)]
    for worker in workers:
        worker.start()
    won = [step for _ in workers for step in found.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert sorted(won) == sorted(f"s{n}" for n in range(200))
