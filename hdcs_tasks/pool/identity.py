"""What a server node knows of itself between restarts: its instance id, and what joining told it."""

from __future__ import annotations

import json
import os
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import WrongState

_FILE = "node.json"


def instance_id(config: Settings) -> str:
    """This server's own id, made once: a restarted worker is the same node, another server with its name is not."""
    return _instance(config.state_dir)


@lru_cache(maxsize=16)
def _instance(state_dir: Path) -> str:
    path = state_dir / "instance"
    state_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _write(path, uuid.uuid4().hex)
    return path.read_text().strip()


def remember(config: Settings, **facts: Any) -> None:
    """Keep what joining told this node, for the processes that do its work."""
    _write(config.state_dir / _FILE, json.dumps(facts))
    _recall.cache_clear()


def joined_file(config: Settings) -> Path:
    """Is there when this node has joined since its node program was started."""
    return config.state_dir / "joined"


def virt_type(config: Settings) -> str:
    """``kvm`` or ``qemu``: as set, or as probed when this node joined."""
    if config.virt_type != "auto":
        return config.virt_type
    return str(_recall(config.state_dir / _FILE)["virt_type"])


@lru_cache(maxsize=4)
def _recall(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise WrongState("this server node has not joined a domain node yet", next="Look at its worker's log") from None
    return facts


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
