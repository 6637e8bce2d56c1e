"""What Flower's own API says about the tasks it saw."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Collection
from typing import Any


class Flower:
    """A running Flower on this machine's loopback. ``auth``: user:password."""

    def __init__(self, port: int, auth: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._header = "Basic " + base64.b64encode(auth.encode()).decode()

    def get(self, path: str, timeout_s: float = 10) -> Any:
        """The JSON answer of an API path."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": self._header})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)

    def routing_keys(self, names: Collection[str]) -> dict[str, list[str]] | None:
        """Task name → routing keys it was sent with; None until Flower knows them all."""
        found: dict[str, set[str]] = {}
        for name in names:
            try:
                tasks = self.get(f"/api/tasks?taskname={name}&limit=100")
            except (urllib.error.URLError, TimeoutError):
                return None
            keys = {task["routing_key"] for task in tasks.values() if task.get("routing_key")}
            if not keys:
                return None
            found[name] = keys
        return {name: sorted(keys) for name, keys in sorted(found.items())}
