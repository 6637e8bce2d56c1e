"""virtnbdbackup, as Debian ships it, in a folder of its own: a program to compare with, installed nowhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from deploy.lab.golden_image import default_cache
from tests.bench.report import say

_RUN = """#!/bin/sh
export PYTHONPATH={root}/usr/lib/python3/dist-packages LD_LIBRARY_PATH={root}/usr/lib/x86_64-linux-gnu
export PATH={root}/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec /usr/bin/python3 {root}/usr/bin/virtnbdbackup "$@"
"""


def program() -> Path | None:
    """The program, fetched once by apt-get into the cache with what it needs and is not there; None without apt-get."""
    folder = default_cache() / "virtnbdbackup"
    start = folder / "virtnbdbackup"
    if start.exists():
        return start
    try:
        _unpack(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"virtnbdbackup cannot be fetched: {error} {getattr(error, 'stderr', '') or ''}")
        return None
    start.write_text(_RUN.format(root=folder / "root"))
    start.chmod(0o755)
    return start


def _unpack(folder: Path) -> None:
    debs = folder / "archives"
    (debs / "partial").mkdir(parents=True, exist_ok=True)
    argv = [
        "apt-get", "install", "-y", "--no-install-recommends", "--download-only", "--reinstall",
        "-o", f"Dir::Cache::archives={debs}", "-o", "Debug::NoLocking=1", "virtnbdbackup",
    ]  # fmt: skip
    subprocess.run(argv, check=True, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "root")], check=True, capture_output=True, text=True)
