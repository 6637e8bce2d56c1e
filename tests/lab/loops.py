"""Loop devices: block devices of the tests' own, freed one by one by their name."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def tool(*argv: object) -> str:
    return subprocess.run([str(a) for a in argv], check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def loop_device(folder: Path, size_bytes: int, *options: str, head: bytes = b"") -> Iterator[Path]:
    """A block device of this size that begins with ``head``; skips (in CI: fails) where the machine gives none."""
    backing = folder / f"loop-{len(list(folder.glob('loop-*')))}"
    with backing.open("wb") as file:
        file.write(head)
        file.truncate(size_bytes)
    if not shutil.which("losetup") or not Path("/dev/loop-control").exists():
        pytest.skip("this machine has no loop devices")
    try:
        device = Path(tool("losetup", "--find", "--show", *options, backing))
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI") and "ermission" not in error.stderr:
            raise
        pytest.skip(f"no loop device: {error.stderr.strip()}")
    try:
        yield device
    finally:
        tool("losetup", "--detach", device)
        backing.unlink()
