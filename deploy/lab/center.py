"""A whole data center on a lab: control worker, beat, Flower, and the node program on every server node."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deploy.lab.lab import SRV, Lab
from deploy.publish_agent import publish
from hdcs_tasks.cloud import Cloud
from hdcs_tasks.config import CapacitySettings, Settings
from hdcs_tasks.errors import HdcsError, WaitTimedOut
from hdcs_tasks.hypervisor import storage

T = TypeVar("T")

CHECKOUT = Path(__file__).resolve().parents[2]

QUICK = {
    "HDCS_LEASE_TTL_S": "9",
    "HDCS_SWEEP_S": "2",
    "HDCS_SAMPLE_S": "2",
    "HDCS_PORT_COOLING_S": "5",
    "HDCS_DHCP_LEASE_S": "120",
    "HDCS_CAPACITY_HOST_RESERVE_MIB": "512",
    "HDCS_LOG_FORMAT": "console",
    "HDCS_QUICK_CONCURRENCY": "4",
}
"""Settings of a lab: everything happens within seconds, and 4 GiB of pretended memory per server node."""


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float = 60.0, every_s: float = 0.2) -> T:
    """The first true value of ``look``; WaitTimedOut naming ``what`` otherwise."""
    end = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            raise WaitTimedOut(f"waited {timeout_s:.0f} s for {what}", next="Look at the logs in the lab's folder")
        time.sleep(every_s)


def settings_of(env: Mapping[str, str]) -> Settings:
    """The Settings a process with these ``HDCS_*`` variables would read, whatever this process's environment is."""
    plain = {key.removeprefix("HDCS_").lower(): value for key, value in env.items() if key.startswith("HDCS_")}
    prefix = "capacity_"
    capacity = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
    rest: dict[str, Any] = {key: value for key, value in plain.items() if not key.startswith(prefix)}
    return Settings(**rest, capacity=CapacitySettings(**capacity))  # type: ignore[arg-type]


class Center:
    """A running data center. Everything it starts ends with its lab."""

    def __init__(self, lab: Lab, env: Mapping[str, str] | None = None, flower: bool = True) -> None:
        self.lab = lab
        self.env = QUICK | dict(env or {})
        self.with_flower = flower
        self.pids: dict[str, int] = {}
        self.flower_port = 0
        self.flower_auth = f"admin:{secrets.token_urlsafe(12)}"
        self.cloud: Cloud

    # --- up and down

    def up(self, say: Callable[[str], None] = lambda _text: None) -> None:
        """Start everything and wait until every server node is in its pool."""
        say("lab: hub, Redis and server nodes with libvirt")
        self.lab.up()
        settings = settings_of(self.lab.env() | self.env)
        self.cloud = Cloud.from_settings(settings)
        self._start_control(say)
        for domain_node in self.lab.domain_nodes:  # while the control worker comes up
            storage.prepare(self.lab.storage(domain_node), domain_node)
            publish(self.lab.storage(domain_node), copy=_link)
        wait_for("the reservations to open", self.cloud.control.reservations.epoch.is_open)
        for domain_node in self.lab.domain_nodes:
            self._make_domain_node(domain_node)
        say("server nodes: the node program, from the shared storage of each domain node")
        for node in self.lab.nodes:
            self.start_node(node)
        self.wait_for_nodes(self.lab.nodes)

    def _start_control(self, say: Callable[[str], None]) -> None:
        say("control worker and beat" + (" and Flower" if self.with_flower else ""))
        self.start_control()
        self.start_beat()
        if self.with_flower:
            self._start_flower()

    def start_control(self) -> None:
        self.pids["control"] = self._python("control", "-m", "workers.control", "--name", self.lab.name)

    def start_beat(self) -> None:
        schedule = self.lab.root / "control" / "beat-schedule"
        self.pids["beat"] = self._python(
            "beat", "-m", "celery", "-A", "hdcs_tasks.app", "beat", "--schedule", str(schedule), "--pidfile="
        )

    def _start_flower(self) -> None:
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.flower_port = probe.getsockname()[1]
        env = {"HDCS_FLOWER_AUTH": self.flower_auth, "HDCS_FLOWER_PORT": str(self.flower_port)}
        argv = ("-m", "celery", "-A", "hdcs_tasks.app", "flower", f"--conf={CHECKOUT}/deploy/flowerconfig.py")
        self.pids["flower"] = self._python("flower", *argv, env=env)

    def _python(self, name: str, *argv: str, env: Mapping[str, str] | None = None) -> int:
        extra = self.env | dict(env or {})
        return self.lab.spawn(None, [sys.executable, *argv], extra, self.lab.log(name))

    def _make_domain_node(self, name: str) -> None:
        token = self.cloud.domain_nodes.create(name).token
        file = self.lab.join_token_file(name)
        file.write_text(token + "\n")
        file.chmod(0o600)

    def start_node(self, node: str) -> None:
        """Run the node program as a new server would: from its mount of the shared storage."""
        argv = [str(SRV / "agent" / "hdcs-node")]
        self.pids[node] = self.lab.spawn(node, argv, self.env, self.lab.log(f"{node}-worker"))

    def stop(self, name: str, number: int = signal.SIGTERM, timeout_s: float = 45.0) -> None:
        """Signal a process by its name here (control, beat, flower or a server node) and wait for its end."""
        pid = self.pids.pop(name)
        os.kill(pid, number)
        wait_for(f"{name} (pid {pid}) to end", lambda: not _alive(pid), timeout_s)

    def wait_for_nodes(self, nodes: list[str] | tuple[str, ...], timeout_s: float = 60.0) -> None:
        """Wait until exactly these server nodes are up."""

        def look() -> bool:
            return {n["name"] for n in self.cloud.server_nodes.list() if n["state"] == "up"} == set(nodes)

        try:
            wait_for(f"server nodes {', '.join(nodes)} to be up", look, timeout_s)
        except WaitTimedOut as error:
            raise HdcsError(f"{error.message}: {self._last_words()}", next=error.next) from None

    def _last_words(self) -> str:
        logs = [self.lab.log(f"{node}-worker") for node in self.lab.nodes]
        return " | ".join(f"{log.stem}: {log.read_text()[-300:]!r}" for log in logs if log.exists())

    def down(self) -> None:
        if hasattr(self, "cloud"):
            self.cloud.control.store.dispose()
        self.lab.down()


def _link(source: str, target: str) -> None:
    """A second name for a file nobody writes to (a lab has thousands of them); a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _alive(pid: int) -> bool:
    """Whether the process runs; one that waits to be reaped by its parent has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def center(lab: Lab, env: Mapping[str, str] | None = None, *, keep_on_error: bool = False) -> Iterator[Center]:
    """A data center for the length of the block."""
    made = Center(lab, env)
    try:
        made.up()
        yield made
    finally:
        made.down()


def copy_logs(lab: Lab, target: Path) -> None:
    """Keep the logs of a lab that is about to be taken down."""
    shutil.copytree(lab.root / "logs", target, dirs_exist_ok=True)
