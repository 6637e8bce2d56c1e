"""What a lab could leave on the machine: processes, namespaces anybody is still in, links, mounts, its folder."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

from deploy.lab import SRV, Lab
from deploy.lab.space import marked, pids

NOTHING = {"processes": [], "namespaces": set(), "links": [], "mounts": [], "folder": False}


def namespaces(lab: Lab) -> set[str]:
    """The namespaces of a running lab, to be told of again when it is down."""
    spaces = [lab.hub, *lab.spaces.values()]
    return {_link(f"/proc/{s.pid}/ns/{kind}") for s in spaces for kind in ("net", "mnt", "pid")}


def left_by(lab: Lab, inside: set[str], timeout_s: float = 30) -> dict[str, object]:
    """What is left of it, once the machine's init has collected the dead (it is not ours to hurry)."""
    deadline = time.monotonic() + timeout_s
    while (traces := _traces(lab, inside)) != NOTHING and time.monotonic() < deadline:
        time.sleep(0.05)
    return traces


def _traces(lab: Lab, inside: set[str]) -> dict[str, object]:
    living = {n for pid in pids() for kind in ("net", "mnt", "pid") if (n := _link(f"/proc/{pid}/ns/{kind}"))}
    shown = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return {
        "processes": list(marked(lab.mark)),
        "namespaces": living & inside,
        "links": re.findall(rf"{lab.link}|{re.escape(lab.net)}\.\d+", shown),
        "mounts": [line for line in mounts if str(lab.root) in line or str(SRV) in line],
        "folder": lab.root.exists(),
    }


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
