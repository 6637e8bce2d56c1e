"""Setting a disk back: whichever step a worker dies after, the VM has a whole disk, and the next attempt ends it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hdcs_tasks.errors import HypervisorRefused
from hdcs_tasks.hypervisor.bitmaps import ensure_seed
from hdcs_tasks.vm.node_swap import swap


class Folder:
    """A VM's folder before the swap: the current disk, its second name, and the restored disk."""

    def __init__(self, root: Path) -> None:
        self.disk, self.fresh, self.old = (root / f"{name}.qcow2" for name in ("disk0", "restored-s", "replaced-s"))
        for path, pattern in ((self.disk, 1), (self.fresh, 2)):
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
            subprocess.run(["qemu-io", "-c", f"write -q -P {pattern} 0 64k", path], check=True)
        ensure_seed(self.fresh)
        os.link(self.disk, self.old)

    def shows(self, pattern: int) -> bool:
        argv = ["qemu-io", "-r", "-c", f"read -q -P {pattern} 0 64k", str(self.disk)]
        return "Pattern verification failed" not in subprocess.run(argv, capture_output=True, text=True).stdout

    def names(self) -> list[str]:
        return sorted(path.name for path in self.disk.parent.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    if not shutil.which("qemu-img"):
        if os.environ.get("CI"):
            pytest.fail("qemu-img is missing")
        pytest.skip("needs qemu-img")
    return Folder(tmp_path)


def test_the_restored_disk_takes_the_name(folder: Folder) -> None:
    swap(folder.disk, folder.fresh, folder.old)
    assert folder.shows(2)
    assert folder.names() == ["disk0.qcow2"]


def test_a_swap_that_died_before_or_after_the_rename_is_ended(folder: Folder) -> None:
    assert folder.shows(1), "before: the current disk is whole, under both its names"
    os.replace(folder.fresh, folder.disk)  # the worker dies right after this
    swap(folder.disk, folder.fresh, folder.old)
    assert folder.shows(2)
    assert folder.names() == ["disk0.qcow2"]


@pytest.mark.parametrize(("damage", "error"), [("no seed", HypervisorRefused), ("no image", HypervisorRefused)])
def test_a_restored_disk_that_is_not_good_is_put_away_again(
    folder: Folder, damage: str, error: type[Exception]
) -> None:
    if damage == "no seed":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder.fresh, "1M"], check=True)
    else:
        folder.fresh.write_bytes(b"garbage")
    with pytest.raises(error):
        swap(folder.disk, folder.fresh, folder.old)
    assert folder.shows(1), "the current disk is back"
    assert folder.names() == ["disk0.qcow2"]
