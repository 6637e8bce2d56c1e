"""A desktop out of a warm pool with saved memory: asked until it runs and the record says so, against libvirt's bare
restore of a twin's memory on the same server node.

The two alternate. The twin has the same definition, and a disk on the same image; its memory file was written by
libvirt's own save a moment before, so both are in the page cache. ``answers``: until the guest's agent answers.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import libvirt

from deploy.lab import Lab, free_net
from deploy.lab.center import Center, copy_logs, wait_for
from deploy.lab.lab import CHECKOUT, SRV
from hdcs_tasks.hypervisor import agent
from hdcs_tasks.hypervisor.connection import Host
from tests.bench.boot_storm import CENTER, Storms, _labs
from tests.bench.raw_storm import Storm as RawStorm
from tests.bench.report import Figure, say

BOOT_S = 300.0
ABOUT_A_SECOND_S = 1.25


class Twin:
    """A guest that only libvirt knows, with its memory saved."""

    def __init__(self, lab: Lab, node: str, guest: dict[str, str]) -> None:
        self.host = Host.open(f"qemu+tcp://{lab.ip(node)}/system")
        self.made = RawStorm.start(self.host.conn, guest)
        self.uuid = guest["uuid"]
        wait_for("the twin's agent", lambda: agent.ping(self.host, self.uuid, 5), BOOT_S, every_s=0.5)
        folder = SRV / "raw" / self.uuid
        self.file = str(folder / "memory")
        self.made.save(self.file)

    def restore(self) -> float:
        """Seconds; and it is saved again for the next round."""
        began = time.monotonic()
        self.host.conn.restoreFlags(self.file, None, libvirt.VIR_DOMAIN_SAVE_RUNNING)
        took = time.monotonic() - began
        assert self.made.isActive() and agent.ping(self.host, self.uuid, 30)
        self.made.save(self.file)
        return took

    def end(self) -> None:
        with suppress(libvirt.libvirtError):  # a sweep has seen the definition without a guest, and removed it
            self.made.undefine()
        self.host.close()


class Warm:
    def __init__(self, center: Center) -> None:
        self.center = center
        self.cloud = center.cloud
        self.cloud.warm_pools.create("lab", image="mini", profile="tiny", size=1, saved=True)
        self.round = 0

    def wait(self) -> None:
        """Until the pool has made another one."""
        wait_for("the warm pool", lambda: self.cloud.warm_pools.show("lab")["ready"] == 1, BOOT_S, every_s=0.5)

    def take(self) -> tuple[float, float]:
        """Seconds until the operation has ended in the record, and until the agent answered."""
        self.round += 1
        name = f"desk{self.round}"
        began = time.time()
        operation = self.cloud.vms.clone("mini", name=name, profile="tiny", warm=True)
        operation.result(timeout_s=60)
        ended = datetime.fromisoformat(operation.show()["ended_at"]).timestamp()
        vm = self.cloud.vms[name].show()
        assert vm["state"] == "running"
        with Host.open(f"qemu+tcp://{self.center.lab.ip(vm['server_node'])}/system") as host:
            assert agent.ping(host, vm["id"], 30), "it does not answer"
        answered = time.time()
        steps: list[dict[str, Any]] = operation.show()["steps"]
        assert [step["name"] for step in steps] == ["vm.start_on_node"], "it came cold"
        self.cloud.vms[name].delete().result(timeout_s=120)
        return ended - began, answered - began


def measure(center: Center, rounds: int) -> list[Figure]:
    storms = Storms(center)
    storms.add_image()
    warm = Warm(center)
    warm.wait()
    node = center.lab.nodes[0]
    twin = Twin(center.lab, node, storms._guests(node, 1)[0])
    ours, answers, raw = [], [], []
    for number in range(rounds):
        warm.wait()
        raw.append(twin.restore())
        ended, answered = warm.take()
        ours.append(ended)
        answers.append(answered)
        say(f"round {number}: libvirt {raw[-1]:.2f} s, hdcs {ended:.2f} s, its agent after {answered:.2f} s")
    twin.end()
    shutil.rmtree(center.lab.storage(center.lab.domain_node(node)) / "raw", ignore_errors=True)
    value, base = statistics.median(ours), statistics.median(raw)
    goal = f"value <= {ABOUT_A_SECOND_S} s"
    return [
        Figure("saved_warm_start", round(value, 3), "s", round(base, 3), round(value / base, 3), goal,
               value <= ABOUT_A_SECOND_S),
        Figure("saved_warm_agent_answers", round(statistics.median(answers), 3), "s"),
    ]  # fmt: skip


def run(options: argparse.Namespace) -> list[Figure]:
    rounds = options.rounds or (3 if options.quick else 7)
    with tempfile.TemporaryDirectory(prefix="hdcs-warm-", dir=_labs()) as folder:
        lab = Lab("warm", Path(folder) / "lab", net=free_net(), domain_nodes={"east": ("node1", "node2")})
        center = Center(lab, CENTER, flower=False)
        try:
            center.up(say)
            return measure(center, rounds)
        finally:
            copy_logs(center.lab, CHECKOUT / ".lab" / "warm-logs")
            center.down()
