"""virt-v2v itself, where it is installed; a guest it knows is too large to be made for every run of the tests.

HDCS_TEST_V2V_DISK=/images/debian-12.qcow2 pytest tests/lab/test_virt_v2v.py    # minutes, with KVM
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deploy.lab.center import wait_for
from hdcs_tasks.errors import Cancelled
from hdcs_tasks.hypervisor import v2v
from hdcs_tasks.hypervisor.conversion import Watch
from tests.lab.loops import tool

ROOT = Path(__file__).parents[2]
DISK = os.environ.get("HDCS_TEST_V2V_DISK", "")
pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not (DISK and shutil.which("virt-v2v")),
        reason="needs virt-v2v (apt install virt-v2v nbdkit libnbd-bin) and a disk with a Windows or Linux that it "
        "knows, named by HDCS_TEST_V2V_DISK",
    ),
]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The guest's disk as an import hands it over: a qcow2 of our own."""
    made = tmp_path / "disk.qcow2"
    tool("qemu-img", "convert", "-O", "qcow2", DISK, made)
    return made


def left(tmp_path: Path) -> list[list[str]]:
    """Programs that still have something of the conversion open, or were called for it."""
    seen = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [argv for argv in seen if any(str(tmp_path) in word for word in argv)]


def nobody(tmp_path: Path) -> bool:
    """Whether they end within ten seconds."""
    deadline = time.monotonic() + 10
    while left(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left(tmp_path)


def once(after_s: float) -> Callable[[], bool]:
    at = time.monotonic() + after_s
    return lambda: time.monotonic() > at


def test_a_disk_gets_its_drivers(disk: Path, tmp_path: Path) -> None:
    before, out = tool("qemu-img", "info", disk), tmp_path / "out"
    out.mkdir()
    made = v2v.convert("node1", disk, out, "Büro PC 1", Watch(timeout_s=3000))
    assert made.parent == out and {path.suffix for path in out.iterdir() if path != made} <= {".xml"}
    assert "No errors" in tool("qemu-img", "check", "-f", "qcow2", made)
    assert tool("qemu-img", "info", disk) == before
    assert left(tmp_path) == []


def test_what_is_called_off_leaves_nobody_at_work(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Cancelled):
        v2v.convert("node1", disk, out, "desk", Watch(cancelled=once(20.0)))
    assert nobody(tmp_path)


def test_a_killed_worker_takes_all_of_it_with_it(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import sys; from pathlib import Path; from hdcs_tasks.hypervisor import v2v; "
        "from hdcs_tasks.hypervisor.conversion import Watch; "
        "v2v.convert('node1', Path(sys.argv[1]), Path(sys.argv[2]), 'desk', Watch())"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(disk), str(out)], cwd=ROOT)
    wait_for("its appliance to run", lambda: any("qemu-nbd" in argv[0] for argv in left(tmp_path)), 60)
    time.sleep(2)
    worker.kill()
    worker.wait()
    assert nobody(tmp_path)
