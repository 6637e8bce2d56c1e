"""Boot storm: linked clones made and started on four lab server nodes, until the last guest agent answers, against a
hand-written parallel program (raw_storm.py) that makes the same guests with the same definitions on the same hosts.

HDCS's clock starts before ``cloud.vms.clone`` is called; the program's when its first thread starts, connections open.
Both hear of the agents by libvirt's events. Rounds alternate, each side first in turn. The data center stays up while
the program runs. ``one_vm``: clone, define and start of a single VM, until the operation has ended in the record.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from deploy.lab import Lab, free_net
from deploy.lab.center import Center, copy_logs, wait_for
from deploy.lab.golden_image import build
from deploy.lab.lab import CHECKOUT, SRV
from hdcs_tasks.hypervisor import agent, xml
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.spec import GuestSpec
from tests.bench.report import Figure, judged, say

THREADS = 2  # per host, and as many long steps at once on each of HDCS's server nodes
MEMORY_MIB = 128  # of the profile tiny
READY_S = 600.0
ONE_VM_EXTRA_S = 0.05
CENTER = {"HDCS_SAMPLE_S": "10", "HDCS_SWEEP_S": "5", "HDCS_LEASE_TTL_S": "30", "HDCS_NODE_CONCURRENCY": str(THREADS)}


class Storms:
    def __init__(self, center: Center) -> None:
        self.center = center
        self.lab = center.lab
        self.round = 0

    def add_image(self) -> None:
        self.center.cloud.images.add("mini", str(build().path)).result(timeout_s=300)

    # --- HDCS

    def hdcs(self, count: int) -> float:
        """Seconds from asking until the last agent was heard of."""
        self.round += 1
        name = f"storm{self.round}-{{:03d}}"
        began = time.time()
        operation = self.center.cloud.vms.clone("mini", name=name, count=count, profile="tiny", start=True)
        vms = wait_for("the last guest agent", lambda: self._ready(count), READY_S, every_s=0.3)
        wall = max(datetime.fromisoformat(vm["ready_at"]).timestamp() for vm in vms) - began
        operation.result(timeout_s=60)
        for vm in vms:
            with Host.open(f"qemu+tcp://{self.lab.ip(vm['server_node'])}/system") as host:
                assert agent.ping(host, vm["id"], 30), f"the agent of {vm['name']} is silent"
        self._delete()
        return wall

    def _ready(self, count: int) -> list[dict[str, Any]] | None:
        vms = self.center.cloud.vms.list()
        failed = [vm["name"] for vm in vms if vm["state"] == "failed"]
        assert not failed, f"not started: {failed}"
        return vms if len(vms) == count and all(vm["ready_at"] for vm in vms) else None

    def _delete(self) -> None:
        names = [vm["name"] for vm in self.center.cloud.vms.list()]
        for operation in [self.center.cloud.vms[name].delete() for name in names]:
            operation.result(timeout_s=120)

    def hdcs_one(self) -> float:
        self.round += 1
        began = time.time()
        operation = self.center.cloud.vms.clone("mini", name=f"one{self.round}", profile="tiny", start=True)
        operation.result(timeout_s=120)
        ended = datetime.fromisoformat(operation.show()["ended_at"]).timestamp()
        self._delete()
        return ended - began

    # --- the program

    def raw(self, count: int, agents: bool = True) -> float:
        self.round += 1
        nodes = self.lab.nodes[: min(count, len(self.lab.nodes))]
        hosts = [
            {"uri": f"qemu+tcp://{self.lab.ip(node)}/system", "guests": self._guests(node, count // len(nodes))}
            for node in nodes
        ]  # fmt: skip
        plan = json.dumps({"threads": THREADS, "agents": agents, "hosts": hosts})
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.raw_storm"], input=plan, capture_output=True, text=True, cwd=CHECKOUT,
        )  # fmt: skip
        for domain_node in self.lab.domain_nodes:
            shutil.rmtree(self.lab.storage(domain_node) / "raw", ignore_errors=True)
        if done.returncode:
            raise SystemExit(f"raw_storm failed: {done.stderr[-1500:]}")
        return float(json.loads(done.stdout)["wall_s"])

    def _guests(self, node: str, count: int) -> list[dict[str, str]]:
        root = self.lab.storage(self.lab.domain_node(node))
        made = []
        for number in range(count):
            vm_id = str(uuid.uuid4())
            disk = f"raw/{vm_id}/disk0.qcow2"
            spec = GuestSpec(
                vm_id=vm_id, name=f"raw-{vm_id[:8]}", vcpus=1, memory_mib=MEMORY_MIB, disks=(str(SRV / disk),),
                mac=f"52:54:01:{vm_id[:2]}:{vm_id[2:4]}:{vm_id[4:6]}", network="hdcs", console_port=30000 + number,
                virt_type="qemu", operation="raw", step="raw", attempt=1,
            )  # fmt: skip
            definition = xml.guest_xml(spec, "not-used-here")
            base = "../../images/mini/1.qcow2"
            made.append({"uuid": vm_id, "xml": definition, "base": base, "disk": str(root / disk)})
        return made


def measure(storms: Storms, rounds: int, count: int, ones: int) -> list[Figure]:
    hdcs: list[float] = []
    raw: list[float] = []
    for number in range(rounds):
        order = (hdcs, raw) if number % 2 else (raw, hdcs)
        for side in order:
            side.append(storms.hdcs(count) if side is hdcs else storms.raw(count))
            say(f"round {number}: {'hdcs' if side is hdcs else 'program'} {side[-1]:.2f} s")
    one, one_raw = [], []
    for _ in range(ones):
        one_raw.append(storms.raw(1, agents=False))
        one.append(storms.hdcs_one())
        say(f"one VM: program {one_raw[-1]:.3f} s, hdcs {one[-1]:.3f} s")
    wall, base = statistics.median(hdcs), statistics.median(raw)
    single, single_base = statistics.median(one), statistics.median(one_raw)
    met = single <= 1.15 * single_base + ONE_VM_EXTRA_S
    return [
        Figure("guests", count, "VMs"),
        judged("wall", wall, "s", base, 1.10, "<="),
        Figure("one_vm", round(single, 3), "s", round(single_base, 3), round(single / single_base, 3),
               "value <= 1.15 * baseline + 0.05", met),
    ]  # fmt: skip


def run(options: argparse.Namespace) -> list[Figure]:
    rounds, count, ones = (1, 8, 3) if options.quick else (2, 24, 7)
    rounds = options.rounds or rounds
    with tempfile.TemporaryDirectory(prefix="hdcs-storm-", dir=_labs()) as folder:
        center = Center(Lab("storm", Path(folder) / "lab", net=free_net()), CENTER, flower=False)
        try:
            center.up(say)
            storms = Storms(center)
            storms.add_image()
            storms.hdcs(1)  # every process opens its connections, the image is in the page cache
            return measure(storms, rounds, count, ones)
        except BaseException:
            copy_logs(center.lab, CHECKOUT / ".lab" / "boot_storm-logs")
            raise
        finally:
            center.down()


def _labs() -> Path:
    folder = CHECKOUT / ".lab"
    folder.mkdir(exist_ok=True)
    return folder
