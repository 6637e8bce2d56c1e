"""Who looks at a console right now: established TCP connections by local port, as the kernel tells them."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_SOCK_DIAG = 4
_GET_TCP_OF_ANY_FAMILY = 18
_REQUEST_DUMP = 0x301
_ERROR, _DONE = 2, 3
_ESTABLISHED = 1
_ESTABLISHED_TEXT = "01"
_HEAD = struct.Struct("=IHHII")
"""Length, type, flags, sequence, sender (linux/netlink.h)."""
_REQUEST = struct.Struct("=4x48xII")
"""Any family and address; states; no attributes (linux/inet_diag.h: inet_diag_req)."""
_PORT = struct.Struct(">H")
_PORT_AT = 4
"""Local port in inet_diag_msg: behind family, state, timer, retransmissions."""
_BUFFER_BYTES = 1 << 17
_WAIT_S = 2.0


def console_clients() -> dict[int, int]:
    """Connections by local port, IPv4 and IPv6, of this network namespace.

    By netlink: the text of /proc/net/tcp costs the kernel some 15 ms whatever it holds. That is read where the kernel
    was built without sock_diag.
    """
    try:
        return _by_netlink()
    except OSError:
        return _by_text()


def _by_netlink() -> dict[int, int]:
    counts: dict[int, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as link:
        link.settimeout(_WAIT_S)
        request = _REQUEST.pack(1 << _ESTABLISHED, 0)
        link.send(_HEAD.pack(_HEAD.size + len(request), _GET_TCP_OF_ANY_FAMILY, _REQUEST_DUMP, 1, 0) + request)
        while True:
            data, at = link.recv(_BUFFER_BYTES), 0
            while at < len(data):
                length, kind, *_ = _HEAD.unpack_from(data, at)
                if kind == _DONE:
                    return counts
                if kind == _ERROR:
                    raise OSError("the kernel does not tell connections by netlink")
                (port,) = _PORT.unpack_from(data, at + _HEAD.size + _PORT_AT)
                counts[port] = counts.get(port, 0) + 1
                at += (length + 3) & ~3


def _by_text() -> dict[int, int]:
    counts: dict[int, int] = {}
    for name in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/self/net", name).read_text().splitlines()[1:]
        except OSError:
            continue  # no IPv6 here
        for line in lines:
            _, local, _, state = line.split(maxsplit=4)[:4]
            if state == _ESTABLISHED_TEXT:
                port = int(local.rpartition(":")[2], 16)
                counts[port] = counts.get(port, 0) + 1
    return counts
