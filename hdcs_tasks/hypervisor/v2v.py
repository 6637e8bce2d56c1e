"""virt-v2v: gives a guest of another hypervisor the drivers it needs here (virtio disk and network, SPICE).

It boots a small appliance to look into the disk, so it is slow, large, and not everywhere installed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from hdcs_tasks.errors import HypervisorRefused, Invalid
from hdcs_tasks.hypervisor.conversion import Watch
from hdcs_tasks.hypervisor.processes import run

_STEP = re.compile(r"[^a-z0-9-]")


def require(server_node: str) -> str:
    """The program's path. Raises Invalid in clear words where it is not installed, or what it copies with (Debian's
    package does not bring that: it would fail after minutes)."""
    found = {name: shutil.which(name) for name in ("virt-v2v", "nbdcopy")}
    if missing := [name for name, path in found.items() if path is None]:
        raise Invalid(
            f"{' and '.join(missing)} not installed on {server_node}: drivers cannot be converted",
            next="Install it there (apt install virt-v2v nbdkit libnbd-bin; for Windows also virtio-win's drivers in "
            "/usr/share/virtio-win), or import without --drivers and install virtio drivers before",
        )
    return str(found["virt-v2v"])


def arguments(program: str, disk: Path, folder: Path, name: str) -> list[str]:
    """The call: ``disk`` is a qcow2 of ours, so that virt-v2v has no format to guess and no file to follow."""
    return [
        program, "-i", "disk", "-if", "qcow2", str(disk), "-o", "local", "-os", str(folder), "-of", "qcow2",
        "-on", _STEP.sub("-", name.lower()), "--quiet",
    ]  # fmt: skip


def convert(server_node: str, disk: Path, folder: Path, name: str, watch: Watch) -> Path:
    """Convert ``disk`` (qcow2, left alone) into a new qcow2 in ``folder`` (empty); returns it. Raises
    HypervisorRefused (it could not: what virt-v2v says), Invalid (not installed), Cancelled, Unavailable."""
    argv = arguments(require(server_node), disk, folder, name)
    try:
        # Its appliance as a child of its own: a guest of this libvirt would be one that the record has not. In a
        # process namespace: nothing it starts outlives it, however it ends.
        alone = ["unshare", "--pid", "--fork", "--kill-child", "env", "LIBGUESTFS_BACKEND=direct"]
        run([*alone, *argv], timeout_s=watch.timeout_s, cancelled=watch.stop)
    except HypervisorRefused as error:
        raise HypervisorRefused(
            f"virt-v2v could not put in drivers: {error.message}",
            next="Is a Windows or Linux that it knows on this disk? Else import without --drivers",
        ) from error
    made = [path for path in sorted(folder.iterdir()) if path.suffix != ".xml"]
    if len(made) != 1:
        raise HypervisorRefused(
            f"virt-v2v made {len(made)} disks out of one", next="Import without --drivers, and look at its log"
        )
    return made[0]
