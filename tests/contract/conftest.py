"""Real services for contract tests: started once, emptied for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from hdcs_tasks.app import make_app
from hdcs_tasks.config import Settings
from hdcs_tasks.operations.control import Control
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.reservations.link import connect
from hdcs_tasks.store.migrate import upgrade
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


def _emptied(server: PostgresServer) -> str:
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("SET lock_timeout = '10s'")
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return server.url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without tables; each test runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/hdcs.sqlite"
    return _emptied(request.getfixturevalue("postgres_service"))


@pytest.fixture
def database(empty_database: str) -> str:
    upgrade(empty_database)
    return empty_database


def make_settings(redis_url: str, database_url: str, state_dir: Path, **more: Any) -> Settings:
    """Settings of a test: short leases, a node named node1 in the domain node east."""
    facts: dict[str, Any] = {
        "redis_url": redis_url, "database_url": database_url, "state_dir": state_dir, "lease_ttl_s": 2.0,
        "sweep_s": 0.5, "domain_node": "east", "server_node": "node1",
    }  # fmt: skip
    return Settings(**(facts | more))


@pytest.fixture
def control(database: str, reservations: Reservations, redis_service: RedisServer, tmp_path: Path) -> Iterator[Control]:
    """The control plane's context on an empty record and empty, open reservations; nobody consumes its queues."""
    config = make_settings(redis_service.url, database, tmp_path / "state")
    celery = make_app(config)
    made = Control.from_settings(config, celery)
    yield made
    made.store.dispose()
    celery.close()
