"""Live moves against raw libvirt: inside a domain node in turns with ``migrateToURI3``, and the bytes between two.

A desktop of HDCS and a twin that only libvirt knows, on the same two server nodes with the same image, move there and
back in turns. ``move_ms`` is the step that moves (from its claim to its outcome) beside the call of libvirt; what the
whole operation takes, preparation, network and cleaning included, is told beside it and not judged.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import libvirt

from deploy.lab import Lab, free_net
from deploy.lab.center import Center
from deploy.lab.golden_image import build
from deploy.lab.lab import SRV
from hdcs_tasks.hypervisor import agent, xml
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.spec import GuestSpec
from tests.bench.report import Figure, judged, say

MIB = 1 << 20
LONG_S = 600.0
ALLOWED_MS = 100.0
DESK = "desk-01"
FLAGS = (
    libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE | libvirt.VIR_MIGRATE_UNSAFE | libvirt.VIR_MIGRATE_AUTO_CONVERGE
)  # fmt: skip


class Bench:
    def __init__(self, center: Center) -> None:
        self.center, self.cloud = center, center.cloud
        self.twin, self.twin_at = str(uuid.uuid4()), "node1"
        self.hosts = {name: Host.open(f"qemu+tcp://{center.lab.ip(name)}/system") for name in ("node1", "node2")}
        self.ours: list[tuple[float, float, float]] = []
        self.raw: list[tuple[float, float]] = []
        self.between: list[tuple[int, int]] = []

    def prepare(self) -> None:
        self.cloud.images.add("mini", str(build().path)).result(timeout_s=LONG_S)
        self.cloud.vms.clone("mini", name=DESK, profile="tiny", domain_node="east", start=True).result(timeout_s=LONG_S)
        folder = f"{SRV}/vms/{self.twin}"
        base = f"{SRV}/images/mini/1.qcow2"
        self.center.lab.run("node1", ["mkdir", folder])
        self.center.lab.run(
            "node1", ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, f"{folder}/disk0.qcow2"]
        )
        spec = GuestSpec(
            vm_id=self.twin, name="twin", vcpus=1, memory_mib=128, disks=(f"{folder}/disk0.qcow2",),
            mac="52:54:00:fe:00:01", network="hdcs", console_port=59998, operation="bench", step="bench", attempt=1,
        )  # fmt: skip
        self.hosts["node1"].conn.defineXML(xml.guest_xml(spec, "not-asked-for")).create()
        self.cloud.vms[DESK].wait_ready(timeout_s=LONG_S)
        agent.wait_for_agent(self.hosts["node1"], self.twin, LONG_S)

    def round(self) -> None:
        self.ours.append(self._ours())
        self.raw.append(self._raw())

    def _ours(self) -> tuple[float, float, float]:
        """Milliseconds of the step that moves, of downtime, and of the whole operation."""
        began = time.monotonic()
        operation = self.cloud.vms[DESK].migrate()
        done = operation.result(timeout_s=LONG_S)
        whole_ms = (time.monotonic() - began) * 1000
        (step,) = [s for s in operation.show()["steps"] if s["name"] == "vm.migrate_on_node"]
        moment = step["history"][-1]
        return (moment["ended_at"] - moment["started_at"]) * 1000, done["downtime_ms"], whole_ms

    def _raw(self) -> tuple[float, float]:
        target = "node2" if self.twin_at == "node1" else "node1"
        host, address = self.hosts[self.twin_at], self.center.lab.ip(target)
        guest, seen = host.guest(self.twin), []
        watch = host.conn.domainEventRegisterAny(
            guest, libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, lambda _c, _g, stats, _o: seen.append(stats), None
        )
        params = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{address}",
                  libvirt.VIR_MIGRATE_PARAM_GRAPHICS_URI: f"spice://{address}"}  # fmt: skip
        began = time.monotonic()
        guest.migrateToURI3(f"qemu+tcp://{address}/system", params, FLAGS)
        total_ms = (time.monotonic() - began) * 1000
        end = time.monotonic() + 5
        while not seen and time.monotonic() < end:
            time.sleep(0.02)
        host.conn.domainEventDeregisterAny(watch)
        self.twin_at = target
        return total_ms, float(seen[0]["downtime"]) if seen else float("nan")

    def there_and_back(self) -> None:
        """Between domain nodes: bytes that travelled, beside the overlay's size on its storage and guest memory."""
        for to in ("west", "east"):
            shown: dict[str, Any] = self.cloud.vms[DESK].show()
            disk = self.center.lab.storage(shown["home"]) / "vms" / shown["id"] / "disk0.qcow2"
            bound = disk.stat().st_blocks * 512 + shown["memory_mib"] * MIB
            done = self.cloud.vms[DESK].migrate(to).result(timeout_s=LONG_S)
            self.between.append((done["bytes"], bound))
            say(f"to {to}: {done}")

    def write(self, mib: int) -> None:
        shown = self.cloud.vms[DESK].show()
        command = f"dd if=/dev/urandom of=/root/data bs=1M count={mib}; sync"
        done = agent.exec_(self.hosts[shown["server_node"]], shown["id"], ["/bin/sh", "-c", command], timeout_s=120)
        if done.exit_code:
            raise RuntimeError(str(done))

    def figures(self) -> list[Figure]:
        say(f"ours {self.ours}; raw {self.raw}; between {self.between}")
        ours, downtime, whole = (statistics.median(column) for column in zip(*self.ours, strict=True))
        raw, raw_downtime = (statistics.median(column) for column in zip(*self.raw, strict=True))
        worst = max(self.between, key=lambda pair: pair[0] / pair[1])
        return [
            judged("move_ms", ours, "ms", raw, 1.15, "<=", "(value - 100 ms) / baseline", (ours - ALLOWED_MS) / raw),
            judged(
                "downtime_ms", downtime, "ms", raw_downtime, 1.15, "<=", "(value - 100 ms) / baseline",
                (downtime - ALLOWED_MS) / raw_downtime,
            ),
            Figure("operation_ms", round(whole, 1), "ms", round(raw, 1), round(whole / raw, 3)),
            judged("bytes_between_domain_nodes", worst[0], "bytes", worst[1], 1.1, "<="),
            Figure("moves", len(self.ours) + len(self.between), "moves"),
        ]  # fmt: skip


def run(options: argparse.Namespace) -> list[Figure]:
    rounds = 4 if options.quick else 10
    with tempfile.TemporaryDirectory(prefix="hdcs-bench-migrate-") as folder:
        shape = {"east": ["node1", "node2"], "west": ["node3"]}
        lab = Lab("benchmigrate", Path(folder) / "lab", net=free_net("10.97"), domain_nodes=shape)
        center = Center(lab, flower=False)
        try:
            center.up(say)
            bench = Bench(center)
            bench.prepare()
            for number in range(rounds):
                bench.round()
                say(f"round {number + 1} of {rounds}: ours {bench.ours[-1]}, raw {bench.raw[-1]}")
            bench.write(32)
            for _ in range(1 if options.quick else 2):
                bench.there_and_back()
            return bench.figures()
        finally:
            center.down()
