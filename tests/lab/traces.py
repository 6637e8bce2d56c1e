"""What a lab could leave on the machine: processes, namespaces anybody is still in, links, mounts, its folder."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from deploy.lab import SRV, Lab
from deploy.lab.space import MARK, marked, pids

NOTHING = {"processes": [], "namespaces": set(), "links": [], "mounts": [], "folder": False}


def namespaces(lab: Lab) -> set[str]:
    """The namespaces of a running lab, to be told of again when it is down."""
    spaces = [lab.hub, *lab.spaces.values()]
    return {_link(f"/proc/{s.pid}/ns/{kind}") for s in spaces for kind in ("net", "mnt", "pid")}


def left_by(lab: Lab, inside: set[str], timeout_s: float = 150) -> dict[str, object]:
    """What is left of it, once the machine's init has collected the dead (it is not ours to hurry), and the kernel the
    connections whose other end was cut off: until then they hold their network, some 100 s at most.

    What has been seen gone is gone: its network may be another lab's by now. The numbers of its namespaces may be that
    even at the first look; who is in another lab is not counted.
    """
    deadline = time.monotonic() + timeout_s
    left = _traces(lab, inside)
    while left != NOTHING and time.monotonic() < deadline:
        time.sleep(0.05)
        found = _traces(lab, inside)
        left = {kind: found[kind] and _common(old, found[kind]) for kind, old in left.items()}
    return left


def _common(old: Any, new: Any) -> Any:
    return old and (type(old)(one for one in old if one in new) if isinstance(old, list | set) else new)


def _traces(lab: Lab, inside: set[str]) -> dict[str, object]:
    ours = [pid for pid in pids() if _lab_of(pid) in ("", lab.mark)]
    living = {n for pid in ours for kind in ("net", "mnt", "pid") if (n := _link(f"/proc/{pid}/ns/{kind}"))}
    shown = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return {
        "processes": list(marked(lab.mark)),
        "namespaces": living & inside,
        "links": re.findall(rf"{lab.link}|{re.escape(lab.net)}\.\d+", shown),
        "mounts": [line for line in mounts if str(lab.root) in line or str(SRV) in line],
        "folder": lab.root.exists(),
    }


def _lab_of(pid: int) -> str:
    """The mark of the lab that a process is in, by its own environment or that of who started it; "": in none."""
    while pid > 1:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return ""
        for entry in environment:
            if entry.startswith(f"{MARK}=".encode()):
                return entry.decode().partition("=")[2]
        pid = int(status.partition("PPid:")[2].split()[0])
    return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
