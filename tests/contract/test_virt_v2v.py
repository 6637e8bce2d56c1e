"""``image import --drivers`` with the real virt-v2v, where it is installed and a guest's disk is named.

HDCS_TEST_V2V_DISK=/images/debian-12.qcow2 pytest tests/contract/test_virt_v2v.py    # minutes without KVM
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from hdcs_tasks.hypervisor.disks import compare
from tests.contract.desk import Desk, desk  # noqa: F401 - desk is a fixture
from tests.contract.image_place import ImagePlace, tool
from tests.contract.test_images import place  # noqa: F401 - place is a fixture

DISK = os.environ.get("HDCS_TEST_V2V_DISK", "")
pytestmark = [
    pytest.mark.contract,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not (DISK and shutil.which("virt-v2v") and shutil.which("nbdcopy")),
        reason="needs virt-v2v (apt install virt-v2v nbdkit libnbd-bin) and a disk with a Windows or Linux that it "
        "knows, named by HDCS_TEST_V2V_DISK",
    ),
]


@pytest.fixture
def empty_database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/hdcs.sqlite"


def appliances() -> list[int]:
    """libguestfs's virtual machines: their command line names none of our files, so they are known by its own mark."""
    seen = psutil.process_iter(["cmdline"])
    return [p.pid for p in seen if any("guestfs_" in word for word in p.info["cmdline"] or [])]


def folders() -> list[Path]:
    """Where it works. (Of one that is ended, /tmp/libguestfs* stay: some 100 KiB.)"""
    return [*Path("/tmp").glob("v2v?*")]


def within(seconds: float, met: Callable[[], object]) -> bool:
    deadline = time.monotonic() + seconds
    while not met() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(met())


def test_an_import_with_drivers(place: ImagePlace) -> None:  # noqa: F811
    source = place.roots["east"] / "import" / "guest.vmdk"
    tool("qemu-img", "convert", "-O", "vmdk", DISK, source)
    operation = place.images.import_("guest", "guest.vmdk", drivers=True, domain_nodes=("east",))
    place.work()
    assert operation.state == "done", operation.show()
    made = place.image(name="guest")
    tool("qemu-img", "check", "-f", "qcow2", made)
    assert not compare(source, made, formats=("vmdk", "qcow2")), "something was put in"
    assert place.everything() == ["east/images/guest", "east/images/guest/1.qcow2"]
    assert (appliances(), folders()) == ([], [])


def test_a_cancel_while_drivers_are_put_in(place: ImagePlace) -> None:  # noqa: F811
    """It comes while the appliance runs; that ends too, and nothing of it is left."""
    tool("qemu-img", "convert", "-O", "qcow2", DISK, place.roots["east"] / "import" / "guest.qcow2")
    operation = place.images.import_("guest", "guest.qcow2", drivers=True, domain_nodes=("east",))
    with ThreadPoolExecutor(1) as pool:

        def cancel() -> bool:
            came = within(600, appliances)
            time.sleep(15)  # well into what it does with it, which takes minutes
            operation.cancel()
            return came

        came = pool.submit(cancel)
        place.work()
        assert came.result(), "its appliance ran"
    assert operation.state == "cancelled", operation.show()
    assert within(10, lambda: not appliances())
    assert place.everything() == [] and place.images.list() == [] and folders() == []
