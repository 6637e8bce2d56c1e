"""Talks to the guest agent through a UNIX socket or through libvirt, whichever sends a line and gives one back."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any


class Agent:
    """``send`` takes one JSON command and returns the reply; it raises while the guest is not there."""

    def __init__(self, send: Callable[[str], str]) -> None:
        self._send = send

    def call(self, command: str, **arguments: Any) -> Any:
        return json.loads(self._send(json.dumps({"execute": command, "arguments": arguments})))["return"]

    def wait(self, timeout_s: float = 180) -> float:
        """Seconds until it answers."""
        started = time.monotonic()
        while True:
            try:
                self.call("guest-ping")
                return time.monotonic() - started
            except Exception:
                if time.monotonic() - started > timeout_s:
                    raise
                time.sleep(0.1)

    def sh(self, command: str, timeout_s: float = 20) -> str:
        """Output of a shell command in the guest; AssertionError with it if the command fails."""
        pid = self.call("guest-exec", path="/bin/sh", arg=["-c", command], **{"capture-output": True})["pid"]
        deadline = time.monotonic() + timeout_s
        while not (status := self.call("guest-exec-status", pid=pid))["exited"]:
            assert time.monotonic() < deadline, f"{command!r} does not end"
            time.sleep(0.05)
        out = base64.b64decode(status.get("out-data", "")).decode()
        assert status.get("exitcode") == 0, (command, out, base64.b64decode(status.get("err-data", "")))
        return out
