"""Real services for contract tests: started once, emptied for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hdcs_tasks.reservations import Reservations
from hdcs_tasks.reservations.link import connect
from tests.services import Missing, PostgresServer, RedisServer, postgres_server, redis_server, require


@pytest.fixture(scope="session")
def redis_service() -> Iterator[RedisServer]:
    try:
        with redis_server() as server:
            yield server
    except Missing as e:
        require(e)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server only this test uses, to stop, kill and wipe."""
    try:
        with redis_server() as server:
            yield server
    except Missing as e:
        require(e)


@pytest.fixture(scope="session")
def postgres_service() -> Iterator[PostgresServer]:
    try:
        with postgres_server() as server:
            yield server
    except Missing as e:
        require(e)


@pytest.fixture
def reservations(redis_service: RedisServer) -> Reservations:
    """Empty and open."""
    client = connect(redis_service.url)
    client.flushall()
    found = Reservations(client)
    found.epoch.open()
    return found
