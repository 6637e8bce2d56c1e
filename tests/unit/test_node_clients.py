"""Connections to a console's port, as the kernel tells them in either way."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable

import pytest

from hdcs_tasks.monitor import node_clients

PORTS = (11_000, 19_999)
"""Below those the kernel gives to whoever connects: on a busy machine each of these is somebody's."""


def told(look: Callable[[], int | None], wanted: int | None) -> bool:
    """While connections elsewhere come and go the kernel's table may lose or repeat a line: it is read again."""
    return any(look() == wanted or time.sleep(0.05) for _ in range(200))


def bound(family: socket.AddressFamily, address: str) -> socket.socket:
    """A socket with a port of its own."""
    for _ in range(100):
        made = socket.socket(family)
        try:
            made.bind((address, random.randint(*PORTS)))
            return made
        except OSError:
            made.close()
    pytest.skip(f"no port of {address} here")


@pytest.mark.parametrize("seen", [node_clients._by_netlink, node_clients._by_text, node_clients.console_clients])
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_who_is_connected_is_counted_by_port(
    seen: Callable[[], dict[int, int]], family: socket.AddressFamily, address: str
) -> None:
    with bound(family, address) as console, bound(family, address) as first, bound(family, address) as second:
        console.listen()
        port = console.getsockname()[1]
        assert told(lambda: seen().get(port), None), "listening is nobody's connection"
        for client in (first, second):
            client.connect((address, port))
        accepted = [console.accept()[0] for _ in range(2)]
        assert told(lambda: seen().get(port), 2)
        assert told(lambda: seen().get(first.getsockname()[1]), 1), "the other end is here, too"
        for one in accepted:
            one.close()


def test_a_kernel_that_tells_nothing_by_netlink_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> dict[int, int]:
        raise OSError

    monkeypatch.setattr(node_clients, "_by_netlink", refused)
    with bound(socket.AF_INET, "127.0.0.1") as console, bound(socket.AF_INET, "127.0.0.1") as client:
        console.listen()
        client.connect(console.getsockname())
        assert told(lambda: node_clients.console_clients().get(console.getsockname()[1]), 1)
