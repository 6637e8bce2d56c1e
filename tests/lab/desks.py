"""Desktops for the tests of migration and backup: linked clones of the golden image on the lab's hosts."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.lab import Lab
from hdcs_tasks.hypervisor import agent, disks, guests, networks
from hdcs_tasks.hypervisor.bases import Bases
from hdcs_tasks.hypervisor.bitmaps import ensure_seed
from hdcs_tasks.hypervisor.checkpoints import define_seed
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.manifests import BaseImage
from hdcs_tasks.hypervisor.spec import GuestSpec

NETWORK = "hdcs"
MIB = 1 << 20


def uri(lab: Lab, node: str) -> str:
    return f"qemu+tcp://{lab.ip(node)}/system"


def open_host(lab: Lab, node: str) -> Host:
    """The node's libvirtd with the network that guests ask for."""
    host = Host.open(uri(lab, node))
    number = lab.nodes.index(node)
    networks.ensure_network(host, networks.NetworkSpec(NETWORK, f"10.200.{number * 4}.0/22"))
    return host


def put_image(golden_image: Path, storage: Path) -> BaseImage:
    """Copy the golden image into a domain node's storage and its backup repository, as import and backup do."""
    target = image_file(storage)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy(golden_image, target)
    base = BaseImage("mini", 1, disks.sha256(target))
    Bases(storage / "backups" / "bases").keep(base, target)
    return base


def image_file(storage: Path) -> Path:
    return storage / "images" / "mini" / "1.qcow2"


@dataclass
class Desk:
    """A VM with its disk; ``host`` is where its guest runs now."""

    vm_id: str
    disk: Path
    spec: GuestSpec
    host: Host

    def sh(self, command: str) -> str:
        done = agent.exec_(self.host, self.vm_id, ["/bin/sh", "-c", command], timeout_s=60)
        assert done.exit_code == 0, (command, done)
        return done.stdout.decode()

    def write(self, name: str, mib: int) -> None:
        """Put ``mib`` MiB of random data on the guest's disk."""
        self.sh(f"dd if=/dev/urandom of=/root/{name} bs=1M count={mib} 2>/dev/null; sync")

    def tick(self) -> tuple[int, int]:
        """The guest's counter in memory, and its longest gap in ms."""
        count, _, gap = self.sh("cat /run/tick").split()
        return int(count), int(gap) * 10

    def copy(self, target: Path) -> Path:
        """The disk of this moment; the guest must be suspended."""
        return Path(shutil.copy(self.disk, target))

    def kill_qemu(self) -> None:
        """kill -9 of this guest's QEMU."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                argv = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if argv[0].endswith(b"qemu-system-x86_64") and self.vm_id.encode() in argv:
                subprocess.run(["kill", "-9", folder.name], check=True)


def make_disk(base: Path, disk: Path) -> None:
    disk.parent.mkdir(parents=True, exist_ok=True)
    disks.create_overlay(base, disk, base_format="qcow2")
    ensure_seed(disk)


def spec_for(vm_id: str, disk: str, port: int) -> GuestSpec:
    mac = "52:54:00:" + ":".join(f"{b:02x}" for b in uuid.UUID(vm_id).bytes[:3])
    return GuestSpec(
        vm_id=vm_id, name=f"desk-{vm_id[:8]}", vcpus=1, memory_mib=96, disks=(disk,), mac=mac, network=NETWORK,
        console_port=port, operation="test", step="test", attempt=1,
    )  # fmt: skip


@contextmanager
def running_desk(lab: Lab, host: Host, image: BaseImage, port: int, domain_node: str = "east") -> Iterator[Desk]:
    """A booted desk whose agent answers, with a seed checkpoint; stopped and deleted at the end."""
    vm_id = str(uuid.uuid4())
    storage = lab.storage(domain_node)
    disk = storage / "vms" / vm_id / "disk0.qcow2"
    make_disk(image_file(storage), disk)
    desk = Desk(vm_id, disk, spec_for(vm_id, str(disk), port), host)
    try:
        guests.start(host, desk.spec)
        agent.wait_for_agent(host, vm_id, 120)
        assert define_seed(host.guest(vm_id))
        yield desk
    finally:
        guests.stop(desk.host, vm_id, force=True)
        shutil.rmtree(disk.parent)


def image_info(path: Path) -> dict[str, object]:
    out = subprocess.run(["qemu-img", "info", "-U", "--output=json", str(path)], capture_output=True, check=True)
    return dict(json.loads(out.stdout))
