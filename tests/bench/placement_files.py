"""A cluster and requests from files, for the placement bench (format: placement.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Vm = tuple[int, int]  # vCPU, MiB
MOST = 2**36
"""Of either amount: a server node's free memory times 65,536 must be a whole number to Redis's sorted sets, too."""


@dataclass(frozen=True)
class Server:
    """``vcpus``, ``memory_mib``: what may still be promised to guests."""

    name: str
    group: str
    vcpus: int
    memory_mib: int


class BadFileError(Exception):
    """A file that cannot be used: which, where in it, and why."""


def read_rows(path: Path, key: str, amounts: dict[str, int], least: int) -> list[dict[str, Any]]:
    """The objects under ``key``, their ``amounts`` (name -> what an absent one is; -1: must be there) as whole numbers
    of at least ``least``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadFileError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadFileError(f"{path} is not JSON: {error}") from None
    rows = data.get(key) if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise BadFileError(f'{path} has no list "{key}": it should look like {{"{key}": [{{…}}, …]}}')
    found = []
    for i, row in enumerate(rows):
        where = f"{path}: {key}[{i}]"
        if not isinstance(row, dict):
            raise BadFileError(f"{where} is {row!r}, not an object")
        for name, absent in amounts.items():
            value = row.get(name)
            value = absent if value is None else value
            if value is absent and absent < 0:
                raise BadFileError(f"{where} has no {name}")
            if isinstance(value, int | float) and value > MOST and least == 0:
                raise BadFileError(f"{where}: {name} is {value}, more than {MOST}, the most a server node may have")
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < least:
                raise BadFileError(f"{where}: {name} is {row.get(name)!r}, not a whole number of at least {least}")
            row[name] = int(value)
        found.append(row)
    return found


def read_files(cluster: Path, requests: Path) -> tuple[list[Server], list[Vm]]:
    amounts = {"vcpus": -1, "memory_mib": -1, "used_vcpus": 0, "used_memory_mib": 0}
    groups: dict[str, str] = {}
    servers = []
    for i, n in enumerate(read_rows(cluster, "nodes", amounts, 0)):  # names of our own: a file may use any characters
        group = groups.setdefault(str(n.get("group") or ""), f"pool{len(groups)}")
        # Overcommitted already is full, not a debt of the others.
        vcpus, memory = max(0, n["vcpus"] - n["used_vcpus"]), max(0, n["memory_mib"] - n["used_memory_mib"])
        servers.append(Server(f"n{i}", group, vcpus, memory))
    rows = read_rows(requests, "requests", {"vcpus": -1, "memory_mib": -1}, 1)
    # What is more than any server node may have fits nowhere, however much more it is.
    return servers, [(min(r["vcpus"], MOST), min(r["memory_mib"], MOST)) for r in rows]
