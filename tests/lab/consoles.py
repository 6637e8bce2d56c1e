"""A SPICE client connected to a desktop's console, as somebody at it would be."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.lab.center import Center
from tests.services import Missing, require

SYSTEM_PYTHON = "/usr/bin/python3"
CLIENT = Path(__file__).with_name("spice_client.py")


@contextmanager
def console_client(center: Center, vm: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A client connected by a console ticket: its process, which prints what happens to it, and what is secret."""
    if subprocess.run([SYSTEM_PYTHON, "-c", "import gi; gi.require_version('SpiceClientGLib', '2.0')"],
                      capture_output=True, check=False).returncode:  # fmt: skip
        require(Missing("gir1.2-spiceclientglib-2.0 or python3-gi is not installed"))
    ticket = dict(line.split("=", 1) for line in center.cloud.vms[vm].console(ttl_s=120).splitlines() if "=" in line)
    argv = ["-u", str(CLIENT), ticket["host"], ticket["port"]]
    client = subprocess.Popen([SYSTEM_PYTHON, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin is not None and client.stdout is not None
    try:
        client.stdin.write(ticket["password"] + "\n")
        client.stdin.flush()
        assert client.stdout.readline().strip() == "connected"
        yield client, ticket["password"]
    finally:
        client.stdin.close()
        client.wait(20)
