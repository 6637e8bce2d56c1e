"""Connections to a console's port, as the kernel tells them in either way."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from hdcs_tasks.monitor import node_clients


@pytest.mark.parametrize("seen", [node_clients._by_netlink, node_clients._by_text, node_clients.console_clients])
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_who_is_connected_is_counted_by_port(
    seen: Callable[[], dict[int, int]], family: socket.AddressFamily, address: str
) -> None:
    with socket.socket(family) as console:
        try:
            console.bind((address, 0))
        except OSError:
            pytest.skip(f"no {address} here")
        console.listen()
        port = console.getsockname()[1]
        assert port not in seen(), "listening is nobody's connection"
        with socket.create_connection((address, port)) as first, socket.create_connection((address, port)):
            accepted = [console.accept()[0] for _ in range(2)]
            assert seen()[port] == 2
            assert seen()[first.getsockname()[1]] == 1, "the other end is here, too"
        for one in accepted:
            one.close()


def test_a_kernel_that_tells_nothing_by_netlink_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> dict[int, int]:
        raise OSError

    monkeypatch.setattr(node_clients, "_by_netlink", refused)
    with socket.create_server(("127.0.0.1", 0)) as console, socket.create_connection(console.getsockname()):
        assert node_clients.console_clients()[console.getsockname()[1]] == 1
