"""Increments of a running linked clone, as operations, against virtnbdbackup on the same VM and the same writes.

Each round writes known random data in the guest and suspends it, so that there is a disk of that moment to compare
with: its clusters that differ from the round before are the bytes really changed. Then both back it up, taking turns in
who is first. Each has checkpoints of its own, which would be in the other's way: libvirt is made to forget those of the
one (their bitmaps stay in the disk and record on) before the other begins, and is told of them again before its next
turn. Neither is in the time that is measured. Every point is restored at the end.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import libvirt

from deploy.lab import Lab, free_net
from deploy.lab.center import Center
from deploy.lab.golden_image import build
from deploy.lab.lab import SRV
from hdcs_tasks.hypervisor import agent
from hdcs_tasks.hypervisor.checkpoints import checkpoint_names, redefine_checkpoints
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.repository import Repository
from tests.bench import virtnbdbackup
from tests.bench.report import Figure, judged, say

MIB = 1 << 20
CLUSTER = 65536
LONG_S = 600.0
DESK = "desk-01"


class Bench:
    """The data center, the desk, and what was measured."""

    def __init__(self, center: Center, folder: Path, rounds: int) -> None:
        self.center = center
        self.cloud = center.cloud
        self.folder = folder
        self.rounds = rounds
        self.moments: list[Path] = []
        self.points: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.theirs: list[float] = []
        self.changed: list[int] = []
        self.theirs_bytes: list[int] = []
        self.baseline = virtnbdbackup.program()
        self.kept: list[str] = []

    def prepare(self) -> None:
        self.cloud.images.add("mini", str(build().path)).result(timeout_s=LONG_S)
        self.cloud.vms.clone("mini", name=DESK, profile="tiny", start=True).result(timeout_s=LONG_S)
        self.cloud.vms[DESK].wait_ready(timeout_s=LONG_S)

    def round(self, number: int) -> None:
        mib = (8, 1, 4, 2)[number % 4] if number else 8
        self._sh(f"dd if=/dev/urandom of=/root/data{number % 3} bs=1M count={mib} conv=notrunc; sync")
        self.cloud.vms[DESK].suspend().result(timeout_s=LONG_S)
        turns = [self._ours, self._theirs]
        for turn in turns if number % 2 == 0 else turns[::-1]:
            turn(number)
        self.moments.append(self._moment(number))
        if number:
            self.changed.append(_differing(self.moments[-2], self.moments[-1]))
        self.cloud.vms[DESK].resume().result(timeout_s=LONG_S)

    def _ours(self, number: int) -> None:
        with self._host() as host:
            redefine_checkpoints(host, self._vm()["id"], self.kept)
        began = time.monotonic()
        self.cloud.backups.create(DESK).result(timeout_s=LONG_S)
        self.seconds.append(time.monotonic() - began)
        self.points.append(self.cloud.backups.list(DESK)[-1])
        assert self.points[-1]["kind"] == ("increment" if number else "full"), "the chain was broken by the other"
        self.kept = [self.points[-1]["manifest"]["checkpoint_xml"]]
        self._forget()

    def _theirs(self, number: int) -> None:
        if self.baseline is None:
            return
        folder = self.center.lab.storage("east") / "virtnbdbackup"
        before = _size(folder)
        level = "inc" if number else "full"
        argv = [str(self.baseline), "-U", "qemu:///system", "-d", DESK, "-l", level, "-o", f"{SRV}/virtnbdbackup"]
        began = time.monotonic()
        done = self.center.lab.run(self._vm()["server_node"], argv, timeout_s=LONG_S, check=False)
        self.theirs.append(time.monotonic() - began)
        self.theirs_bytes.append(_size(folder) - before)
        if done.returncode:
            say(f"virtnbdbackup {level} failed, no baseline: {done.stderr[-1500:]}")
            self.baseline = None
        self._forget()

    def _forget(self) -> None:
        """libvirt forgets the checkpoints; their bitmaps go on."""
        with self._host() as host:
            guest = host.guest(self._vm()["id"])
            for name in reversed(checkpoint_names(guest)):
                guest.checkpointLookupByName(name, 0).delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)

    def _vm(self) -> dict[str, Any]:
        return self.cloud.vms[DESK].show()

    def _host(self) -> Host:
        return Host.open(f"qemu+tcp://{self.center.lab.ip(self._vm()['server_node'])}/system")

    def _sh(self, command: str) -> None:
        with self._host() as host:
            done = agent.exec_(host, self._vm()["id"], ["/bin/sh", "-c", command], timeout_s=120)
        if done.exit_code:
            raise RuntimeError(f"{command}: {done}")

    def _moment(self, number: int) -> Path:
        """The suspended desk's disk as raw bytes; made on its server node, whose paths the overlay names."""
        vm = self._vm()
        argv = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw"]
        self.center.lab.run(
            vm["server_node"], [*argv, f"{SRV}/vms/{vm['id']}/disk0.qcow2", f"{SRV}/{number}.raw"], timeout_s=LONG_S
        )
        return self.center.lab.storage("east") / f"{number}.raw"

    def restored(self) -> int:
        """How many points, restored, equal the disk of their moment byte for byte."""
        repository = Repository(self.center.lab.storage("east"))
        good = 0
        for point, moment in zip(self.points, self.moments, strict=True):
            found = repository.get(point["vm_id"], point["id"])
            repository.verify(found)
            target = self.folder / "restored.qcow2"
            target.unlink(missing_ok=True)
            image = self.center.lab.storage("east") / "images" / "mini" / "1.qcow2"
            repository.restore(found, target, image=image)
            argv = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(target), str(moment)]
            good += subprocess.run(argv, stdout=subprocess.DEVNULL, check=False).returncode == 0
        return good

    def figures(self) -> list[Figure]:
        sizes = [point["file_bytes"] for point in self.points[1:]]
        worst = max(size / (1.05 * changed + MIB) for size, changed in zip(sizes, self.changed, strict=True))
        say(f"bytes of increments {sizes}, really changed {self.changed}")
        ours = statistics.median(self.seconds[1:])
        theirs = statistics.median(self.theirs[1:]) if self.baseline and len(self.theirs) > 1 else None
        found = [
            Figure("increment_bytes", sum(sizes), "bytes", sum(self.changed), round(sum(sizes) / sum(self.changed), 4)),
            judged("worst_increment_of_allowed", worst, "x", None, 1.0, "<=", "value"),
            *([Figure("virtnbdbackup_bytes", sum(self.theirs_bytes[1:]), "bytes")] if theirs is not None else []),
            Figure("full_s", round(self.seconds[0], 3), "s", round(self.theirs[0], 3) if self.theirs else None),
            judged("points_not_identical", len(self.points) - self.restored(), "points", None, 0, "<=", "value"),
            Figure("points_restored", len(self.points), "points"),
        ]
        if theirs is None:
            say("virtnbdbackup is not there: the time has no baseline and is not judged")
            return [*found, Figure("increment_s", round(ours, 3), "s", goal="ratio <= 1.0 (no baseline)")]
        return [*found, judged("increment_s", ours, "s", theirs, 1.0, "<=")]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _differing(before: Path, after: Path) -> int:
    """Bytes of the clusters in which two raw disks differ."""
    count = 0
    with before.open("rb") as one, after.open("rb") as other:
        while block := other.read(CLUSTER):
            count += one.read(CLUSTER) != block
    return count * CLUSTER


def run(options: argparse.Namespace) -> list[Figure]:
    rounds = 4 if options.quick else 10
    with tempfile.TemporaryDirectory(prefix="hdcs-bench-backup-") as folder:
        lab = Lab("benchbackup", Path(folder) / "lab", net=free_net("10.97"), domain_nodes={"east": ["node1"]})
        center = Center(lab, flower=False)
        try:
            center.up(say)
            bench = Bench(center, Path(folder), rounds)
            bench.prepare()
            for number in range(rounds):
                bench.round(number)
                say(f"point {number + 1} of {rounds}: {bench.seconds[-1]:.2f} s")
            return bench.figures()
        finally:
            center.down()
