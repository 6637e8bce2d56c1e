"""A worker whose connection to Redis is lost at the worst of moments: between a message and its acknowledgement."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hdcs_tasks.app import make_app
from hdcs_tasks.errors import Unreachable
from hdcs_tasks.hypervisor.facts import HostFacts
from hdcs_tasks.operations.node import NodeContext
from hdcs_tasks.operations.sending import send
from hdcs_tasks.pool import node as pool_node
from tests.contract.conftest import make_settings
from tests.contract.test_operations_workers import Center, eventually
from tests.services import RedisServer

pytestmark = pytest.mark.contract

AWAY_S = 3.0


class Relay:
    """A way to Redis that breaks: armed, it closes every connection instead of passing on the next acknowledgement, and
    takes no new one for a while. The connection that waits for messages is the last to go: the worker learns of the
    loss by another, as it may with a Redis that was killed."""

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.url = f"redis://127.0.0.1:{self.address[1]}/0"
        self.armed = False
        self.broke = threading.Event()
        self._open: list[socket.socket] = []
        self._waiting: list[socket.socket] = []
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        for one in (self._listener, *(one for one in self._open if one not in self._waiting), *self._waiting):
            if self._waiting and one is self._waiting[0]:
                time.sleep(0.3)
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()
        self._waiting.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._to)
                self._open += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.armed and b"HDEL" in data and b"unacked" in data:
                    self._break()
                    return
                if b"BRPOP" in data and source not in self._waiting:
                    self._waiting += [source, sink]
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def _break(self) -> None:
        self.armed = False
        self.close()
        self.broke.set()
        time.sleep(AWAY_S)
        self._listener = socket.create_server(self.address)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()


@pytest.fixture
def relay(own_redis: RedisServer) -> Iterator[Relay]:
    made = Relay(own_redis.port)
    yield made
    made.close()


def test_a_join_without_redis_is_asked_again(own_redis: RedisServer, tmp_path: Path) -> None:
    """And says so by an error of ours: any other would end the worker that starts."""
    token = tmp_path / "token"
    token.write_text("token")
    config = make_settings(own_redis.url, "", tmp_path / "state", join_token_file=token, storage_root=tmp_path)
    facts = HostFacts("node1", 2000, 1, 2, 1, 64, 4096, "qemu", False, "9.0.0", "7.2.0")
    celery = make_app(config)
    celery.conf.result_backend_transport_options["retry_policy"] = {"max_retries": 1}  # of 20 s of them
    ctx = NodeContext.from_settings(config, celery)
    own_redis.kill()
    with pytest.raises(Unreachable, match="no control worker answered"):
        pool_node._ask(ctx, facts, 2.0)


def test_a_message_that_could_not_be_acknowledged_ends_no_worker(
    own_redis: RedisServer, relay: Relay, tmp_path: Path
) -> None:
    center = Center(own_redis, tmp_path)
    center.redis = relay  # type: ignore[assignment]  # of which a worker takes the address alone

    def ask() -> None:
        send(center.control.celery, "operations.outcome", {"report": {"step": "none", "attempt": 1}}, "control")

    with center.worker("control", "control@test", "control", "threads") as worker:
        relay.armed = True
        ask()
        assert relay.broke.wait(20), "the acknowledgement was on its way"
        log = center.folder / "control.log"
        eventually(lambda: log.read_bytes().count(b"Connected to") == 2 or worker.poll() is not None, 30, "back again")
        assert worker.poll() is None, log.read_text()[-3000:]
        before = log.read_bytes().count(b"succeeded in")
        ask()
        eventually(lambda: log.read_bytes().count(b"succeeded in") > before, 20, "it works again")
    center.control.store.dispose()
