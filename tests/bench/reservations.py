"""Reservations: port, MAC and IP in one call, against redis-py's INCR; and eight processes at once."""

from __future__ import annotations

import argparse

from hdcs_tasks.reservations import PlaceRequest, PoolNode, Reservations
from hdcs_tasks.reservations.link import connect
from tests.bench.report import Figure, judged, rates, say
from tests.contract.test_reservations_hammer import hammer
from tests.services import RedisServer, redis_server

BATCH = 500
SINGLE = 50


def _request(number: int) -> PlaceRequest:
    return PlaceRequest("east", f"vm{number}", "s", 1, 1, mac=True)


def speed(server: RedisServer, rounds: int) -> list[Figure]:
    """Every call takes for a VM never seen before; nothing is given back between, so everything grows.

    ``single``, ``pipelined``: port, MAC and IP, nothing else. ``…_with_capacity``: these, the choice of a server node
    and the claim of vCPU and memory on it: the call of a start. ``empty_script…``: a script that does nothing, sent as
    ours are: what any script costs at least.
    """
    client = connect(server.url)
    reservations = Reservations(client)
    client.flushall()
    reservations.epoch.open()
    reservations.ports.set_range("west", 1, 32767)
    reservations.ports.set_range("east", 32768, 65535)
    reservations.pool.put_node("west", PoolNode("n0", 65535, 2**20, "10.130.0.0/15"))
    reservations.pool.put_node("east", PoolNode("n1", 65535, 2**20, "10.128.0.0/15"))
    scripts, sha = reservations._link._scripts, client.script_load("return 1")
    number = iter(range(10**9))

    def incr() -> int:
        for _ in range(SINGLE):
            client.incr("counter")
        return SINGLE

    def nothing() -> int:
        for _ in range(SINGLE):
            scripts._exchange([("EVALSHA", sha, 0)])
        return SINGLE

    def take() -> int:
        for _ in range(SINGLE):
            reservations.addresses.take("west", "n0", f"vm{next(number)}")
        return SINGLE

    def place() -> int:
        for _ in range(SINGLE):
            reservations.pool.place(_request(next(number)))
        return SINGLE

    def incr_many() -> int:
        pipe = client.pipeline(transaction=False)
        for _ in range(BATCH):
            pipe.incr("counter")
        pipe.execute()
        return BATCH

    def nothing_many() -> int:
        scripts._exchange([("EVALSHA", sha, 0)] * BATCH)
        return BATCH

    def take_many() -> int:
        found = reservations.addresses.take_many("west", "n0", [f"vm{next(number)}" for _ in range(BATCH)])
        assert not any(isinstance(one, Exception) for one in found)
        return BATCH

    def place_many() -> int:
        found = reservations.pool.place_many([_request(next(number)) for _ in range(BATCH)])
        assert not any(isinstance(one, Exception) for one in found)
        return BATCH

    (base, _), single, full, floor = rates(rounds, incr, take, place, nothing)
    (base_many, _), many, full_many, floor_many = rates(min(rounds, 40), incr_many, take_many, place_many, nothing_many)
    return [
        judged("single", single[0], "per s", base, 0.75, ">=", ratio=single[1]),
        judged("pipelined", many[0], "per s", base_many, 0.25, ">=", ratio=many[1]),
        *(Figure(name, round(rate), "per s", round(raw), round(ratio, 4)) for name, raw, (rate, ratio) in (
            ("single_with_capacity", base, full), ("pipelined_with_capacity", base_many, full_many),
            ("empty_script", base, floor), ("empty_script_pipelined", base_many, floor_many),
        )),
    ]  # fmt: skip


def run(options: argparse.Namespace) -> list[Figure]:
    with redis_server() as server:
        figures = speed(server, 20 if options.quick else 240)
        say("speed done; eight processes")
        found = hammer(server.url, 250 if options.quick else 2000)
    assert found.refused, "the pool was never full: the check would show nothing"
    return [
        *figures,
        Figure("hammer_calls", found.calls, "calls"),
        judged("duplicates", len(found.twice), "things", None, 0, "<=", "value"),
        judged("over_commitment", len(found.over), "sightings", None, 0, "<=", "value"),
        judged("left_over", len(found.left), "things", None, 0, "<=", "value"),
    ]
