"""Reservations: capacity, port, IP and MAC in one call, against redis-py's INCR; and eight processes at once."""

from __future__ import annotations

import argparse

from hdcs_tasks.reservations import PlaceRequest, PoolNode, Reservations
from hdcs_tasks.reservations.link import connect
from tests.bench.report import Figure, judged, rates, say
from tests.contract.test_reservations_hammer import hammer
from tests.services import RedisServer, redis_server

BATCH = 500


def _request(number: int) -> PlaceRequest:
    return PlaceRequest("east", f"vm{number}", "s", 1, 1, mac=True)


def speed(server: RedisServer, rounds: int) -> list[Figure]:
    """Every call takes for a VM never seen before; all of it is given back between rounds."""
    client = connect(server.url)
    reservations = Reservations(client)
    client.flushall()
    reservations.epoch.open()
    reservations.ports.set_range("east", 1, 65535)
    reservations.pool.put_node("east", PoolNode("n1", 65535, 2**20, "10.128.0.0/15"))
    number = iter(range(10**9))

    def incr() -> int:
        for _ in range(50):
            client.incr("counter")
        return 50

    def take() -> int:
        for _ in range(50):
            reservations.pool.place(_request(next(number)))
        return 50

    def incr_pipelined() -> int:
        pipe = client.pipeline(transaction=False)
        for _ in range(BATCH):
            pipe.incr("counter")
        pipe.execute()
        return BATCH

    def take_pipelined() -> int:
        reservations.pool.place_many([_request(next(number)) for _ in range(BATCH)])
        return BATCH

    (base, _), (single, ratio) = rates(rounds, incr, take)
    (base_many, _), (many, ratio_many) = rates(rounds, incr_pipelined, take_pipelined)
    return [
        judged("single", single, "per s", base, 0.75, ">=", ratio=ratio),
        judged("pipelined", many, "per s", base_many, 0.25, ">=", ratio=ratio_many),
    ]


def run(options: argparse.Namespace) -> list[Figure]:
    with redis_server() as server:
        figures = speed(server, 20 if options.quick else 100)
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
