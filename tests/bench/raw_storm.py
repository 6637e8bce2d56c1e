"""The hand-written program a boot storm is compared with: libvirt-python and qemu-img, nothing of HDCS.

Reads its plan from stdin and prints seconds as JSON. Connections are open before the clock starts; every host has its
own threads; agents are not polled but announce themselves by libvirt's event. After the clock each agent is asked once.

    plan: {"threads": per host, "agents": whether to wait for them,
           "hosts": [{"uri", "guests": [{"uuid", "xml", "base", "disk"}]}]}
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

ANSWER_S = 600.0


class Storm:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.waiting = {guest["uuid"] for host in plan["hosts"] for guest in host["guests"]}
        self.last = 0.0
        self.all_up = threading.Event()
        self.conns = [libvirt.open(host["uri"]) for host in plan["hosts"]]
        for conn in self.conns:
            conn.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, self.agent, None)

    def agent(self, _conn: Any, guest: Any, state: int, _reason: int, _opaque: Any) -> None:
        if state == libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED:
            self.waiting.discard(guest.UUIDString())
            self.last = time.monotonic()
            if not self.waiting:
                self.all_up.set()

    @staticmethod
    def start(conn: Any, guest: dict[str, str]) -> Any:
        Path(guest["disk"]).parent.mkdir(parents=True)
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", guest["base"], guest["disk"]]
        subprocess.run(argv, check=True)
        made = conn.defineXML(guest["xml"])
        made.create()
        return made

    def run(self) -> dict[str, float]:
        pools = [ThreadPoolExecutor(self.plan["threads"]) for _ in self.conns]
        began = time.monotonic()
        jobs = [
            pool.submit(self.start, conn, guest)
            for pool, conn, host in zip(pools, self.conns, self.plan["hosts"], strict=True) for guest in host["guests"]
        ]  # fmt: skip
        guests = [job.result() for job in jobs]
        started = time.monotonic() - began
        if self.plan["agents"]:
            if not self.all_up.wait(ANSWER_S):
                raise SystemExit(f"{len(self.waiting)} agents silent after {ANSWER_S:.0f} s")
            for guest in guests:
                libvirt_qemu.qemuAgentCommand(guest, '{"execute": "guest-ping"}', 30, 0)
        wall = (self.last - began) if self.plan["agents"] else started
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.end, guests))
        return {"started_s": started, "wall_s": wall}

    @staticmethod
    def end(guest: Any) -> None:
        guest.destroy()
        guest.undefine()


def _events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def main() -> None:
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_events, daemon=True).start()
    print(json.dumps(Storm(json.load(sys.stdin)).run()))


if __name__ == "__main__":
    main()
