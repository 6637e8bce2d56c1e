"""The lab: a data center of namespaces. Domain nodes with server nodes, each a real libvirtd, and a private Redis.

    hub      holds the switch (a bridge) and Redis on <net>.2
    nodeN    one server node on <net>.1N: own libvirtd, own /run, the domain node's storage on ``SRV``
    <net>.1  this machine, by one veth

Everything lives in the lab's folder and in namespaces without names, so ``down`` leaves nothing behind, and what a
killed lab left is found by the mark in its processes' environment and cleaned by the next ``up``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.lab.node_files import listening, make_authority, write_certificates, write_node_files
from deploy.lab.private_redis import PrivateRedis
from deploy.lab.space import Space, kill_marked, marked_env, wait_until
from hdcs_tasks.errors import Conflict, HdcsError, Invalid, NotFound
from hdcs_tasks.routing import check_name

CHECKOUT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
# where a node sees its domain node's storage; a checkout below /srv must not be hidden by it
SRV = Path("/mnt/hdcs" if CHECKOUT.is_relative_to("/srv") else "/srv/hdcs")
LOCAL = Path(f"{SRV}-local")  # the node's own disk
DOMAIN_NODES: Mapping[str, Sequence[str]] = {"east": ("node1", "node2"), "west": ("node3", "node4")}
NEEDED = ("unshare", "nsenter", "ip", "tini", "libvirtd", "virtlogd", "redis-server", "qemu-img", "qemu-system-x86_64")


def default_root(name: str) -> Path:
    """Folder of the lab ``name``: below ``HDCS_LAB_DIR``, else ``.lab`` in the checkout."""
    return Path(os.environ.get("HDCS_LAB_DIR") or CHECKOUT / ".lab") / name


class Lab:
    """One data center. ``root`` is its own folder; ``net`` the first three numbers of its /24.

    Labs of different name and net stand side by side. Needs root. All waits are bounded and raise HdcsError.
    """

    def __init__(
        self,
        name: str,
        root: Path | None = None,
        net: str = "10.99.0",
        domain_nodes: Mapping[str, Sequence[str]] = DOMAIN_NODES,
        *,
        tls: bool = False,
    ) -> None:
        """``tls``: the server nodes have certificates, and libvirtd takes TLS connections too."""
        self.tls = tls
        self.name = check_name("lab", name)
        self.root = (root or default_root(name)).resolve()
        self.net = net
        self.domain_nodes = {d: list(nodes) for d, nodes in domain_nodes.items()}
        self.nodes = [check_name("server node", n) for nodes in self.domain_nodes.values() for n in nodes]
        if len(set(self.nodes)) < len(self.nodes) or len(self.nodes) > 200:
            raise Invalid(f"the lab's server nodes are not up to 200 different names: {self.nodes}")
        try:
            self._subnet = ipaddress.ip_network(f"{net}.0/24")
        except ValueError as error:
            raise Invalid(f"{net!r} is not the beginning of a /24 ({error})", next="For example 10.99.0") from None
        self.redis = PrivateRedis(f"{net}.2", self.root / "redis")
        self._root_children: list[subprocess.Popen[bytes]] = []
        self.hub = Space("hub", self.root / "hub", self.mark)
        self.spaces = {n: Space(n, self.root / "nodes" / n, self.mark) for n in self.nodes}

    # -- names and places

    @property
    def mark(self) -> str:
        return str(self.root)

    @property
    def link(self) -> str:
        """This machine's end of the veth into the hub: at most 15 characters, of its own for each folder."""
        return f"h{zlib.crc32(self.mark.encode()) & 0xFFFF:04x}-{self.name[:9]}"

    def domain_node(self, node: str) -> str:
        """The domain node of a server node; NotFound for an unknown one."""
        for domain_node, nodes in self.domain_nodes.items():
            if node in nodes:
                return domain_node
        raise NotFound(f"the lab {self.name} has no server node {node!r}", next=f"It has: {', '.join(self.nodes)}")

    def space(self, node: str) -> Space:
        self.domain_node(node)
        return self.spaces[node]

    def ip(self, node: str) -> str:
        self.domain_node(node)
        return f"{self.net}.{11 + self.nodes.index(node)}"

    def storage(self, domain_node: str) -> Path:
        """The domain node's shared storage as this machine sees it; its server nodes see it as ``SRV``."""
        return self.root / "storage" / domain_node

    def join_token_file(self, domain_node: str) -> Path:
        return self.root / "tokens" / domain_node

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def env(self, node: str | None = None) -> dict[str, str]:
        """``HDCS_*`` settings for a process of the control plane (no node) or of a server node.

        A server node gets no database URL: it holds no database credentials.
        """
        shared = {
            "HDCS_REDIS_URL": self.redis.url,
            "HDCS_VIRT_TYPE": "qemu",
            "HDCS_MIGRATE_UNSAFE": "1",  # a bind mount of one folder, which libvirt takes for two local ones
            "PYTHONPATH": str(CHECKOUT),
            "PYTHONUNBUFFERED": "1",
        }
        if node is None:
            return shared | {
                "HDCS_DATABASE_URL": f"sqlite:///{self.root}/hdcs.sqlite",
                "HDCS_STATE_DIR": str(self.root / "control"),
            }
        domain_node = self.domain_node(node)
        return shared | {
            "HDCS_DOMAIN_NODE": domain_node,
            "HDCS_SERVER_NODE": node,
            "HDCS_SERVER_NODE_IP": self.ip(node),
            "HDCS_JOIN_TOKEN_FILE": str(self.join_token_file(domain_node)),
            "HDCS_STORAGE_ROOT": str(SRV),
            "HDCS_STATE_DIR": str(LOCAL),
            "HDCS_HOST_MEMORY_MIB": "4096",
        }

    # -- up and down

    def up(self) -> float:
        """Clean what an earlier lab of this name left, then start hub, Redis and all server nodes. Returns seconds."""
        started = time.monotonic()
        self.check()
        self.down()
        self._check_net()
        self._make_folders()
        self.hub.unshare(HERE / "hub-boot")
        self._link_hub()
        self.hub.go()
        self.redis.start(self.hub, wait=False)
        self._start_nodes(self.nodes)
        self.redis.wait()
        return time.monotonic() - started

    def down(self) -> None:
        """End every process of the lab and remove its link and folder. Safe at any time, also on a lab half made."""
        if self.root.exists() and any(self.root.iterdir()) and not (self.root / "lab.json").exists():
            raise Conflict(f"{self.root} is not a lab's folder (no lab.json)", next="Give another folder")
        for folder in (self.root / "hub", *(self.root / "nodes").glob("*")):
            Space(folder.name, folder, self.mark).power_off()  # also those of an earlier shape of this lab
        kill_marked(self.mark)  # what ran on this machine, and what had no pid file yet
        for space in (self.hub, *self.spaces.values()):
            space.reap()
        self._wait_no_link()
        for child in self._root_children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
        if self.root.exists():
            shutil.rmtree(self.root)

    @staticmethod
    def check() -> None:
        """Invalid unless this machine has what a lab needs: root and the programs."""
        if os.geteuid() != 0:
            raise Invalid("a lab makes namespaces and needs root", next="Run it as root or with sudo")
        path = marked_env("", {})["PATH"]
        missing = [program for program in NEEDED if not shutil.which(program, path=path)]
        if missing:
            raise Invalid(f"a lab needs {', '.join(missing)}, not here", next="Run: ./deploy/run true")

    @classmethod
    def load(cls, root: Path) -> Lab:
        """The lab whose folder ``root`` is; NotFound if there is none."""
        try:
            state: dict[str, Any] = json.loads((root / "lab.json").read_text())
        except (OSError, ValueError) as error:
            raise NotFound(f"no lab in {root} ({error})", next="Start one with: python -m deploy.lab up") from None
        lab = cls(state["name"], root, state["net"], state["domain_nodes"])
        lab.redis.password = state["redis_password"]
        return lab

    # -- processes

    def run(
        self,
        node: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a short command on a server node with its settings; HdcsError if it fails and ``check`` is set."""
        return self.space(node).run(argv, self.env(node) | dict(env or {}), timeout_s, check)

    def spawn(
        self, node: str | None, argv: Sequence[str], env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> int:
        """Start a long-lived process on a server node, or on this machine (``None``), with the settings ``env(node)``.

        ``env`` adds to them. Output goes to ``log`` (default ``logs/<node>-<program>.log``). Returns the host pid. The
        process outlives this one and ends with the lab, or with its server node's power.
        """
        full = self.env(node) | dict(env or {})
        log = log or self.log(f"{node or 'control'}-{Path(argv[0]).name}")
        if node is not None:
            return self.space(node).spawn(argv, full, log)
        with log.open("ab") as out:
            child = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env=marked_env(self.mark, full), cwd=CHECKOUT,
            )  # fmt: skip
        self._root_children.append(child)
        return child.pid

    # -- faults

    def cut(self, node: str) -> None:
        """Pull the node's network cable: its guests run on, nobody reaches it."""
        self._hub_ip("link", "set", self._port(node), "down")

    def mend(self, node: str) -> None:
        self._hub_ip("link", "set", self._port(node), "up")

    def power_off(self, node: str) -> None:
        """Power loss: everything on the node ends at once, its disks stay."""
        self.space(node).power_off()
        # the kernel drops the cable a moment later; a node that is powered on at once needs the port free
        with contextlib.suppress(HdcsError):
            self._hub_ip("link", "del", self._port(node))

    def power_on(self, node: str) -> None:
        """Start a node that is off, with the disks it had, and wait for its libvirtd."""
        if not self.space(node).on:
            self._start_nodes([node])

    def freeze(self, node: str) -> None:
        """Hang the whole node: every process stops, links and connections stay."""
        self.space(node).freeze()

    def thaw(self, node: str) -> None:
        self.space(node).thaw()

    # -- inside

    def _check_net(self) -> None:
        for interface, address in _addresses():
            if interface == self.link or address in self._subnet:
                raise Conflict(
                    f"{interface} has {address}, which is in the lab's net {self._subnet}",
                    next=f"Give another net, for example {free_net()}, or end the lab that has it",
                )

    def _make_folders(self) -> None:
        for folder in ("hub", "redis", "logs", "tokens", "control"):
            (self.root / folder).mkdir(parents=True)
        self.redis.password = secrets.token_urlsafe(18)
        state = {
            "name": self.name,
            "net": self.net,
            "domain_nodes": self.domain_nodes,
            "redis_password": self.redis.password,
        }
        file = self.root / "lab.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps(state, indent=1))
        self.redis.write_files()
        for domain_node in self.domain_nodes:
            self.storage(check_name("domain node", domain_node)).mkdir(parents=True)
            token = self.join_token_file(domain_node)
            token.touch(mode=0o600)
            token.write_text(secrets.token_urlsafe(24) + "\n")
        hosts = [f"{self.ip(n)} {n}" for n in self.nodes]
        (self.root / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{self.net}.2 hub", *hosts]) + "\n")
        if self.tls:
            make_authority(self.root / "authority")
        for node in self.nodes:
            place = self.spaces[node].folder
            write_node_files(place, f"{self.root}/{node}", self.ip(node), tls=self.tls)
            if self.tls:
                write_certificates(place, self.root / "authority", node, self.ip(node))

    def _port(self, node: str) -> str:
        """The hub's end of the node's cable."""
        self.domain_node(node)
        return f"port{self.nodes.index(node) + 1}"

    def _mac(self, node: str) -> str:
        """The same after each power-on, as a real card's: neighbours would go on sending to the old one."""
        return f"02:48:44:00:00:{11 + self.nodes.index(node):02x}"

    def _link_hub(self) -> None:
        # address and route of this end first: before they stand, a packet for the lab would leave the machine
        _ip("link", "add", self.link, "type", "veth", "peer", "name", "up0", "netns", str(self.hub.pid))
        _ip("address", "add", f"{self.net}.1/24", "dev", self.link)
        _ip("link", "set", self.link, "up")
        self._hub_batch(
            "link set lo up",
            "link add br0 type bridge",
            f"address add {self.net}.2/24 dev br0",
            "link set br0 up",
            "link set up0 master br0 up",
        )

    def _start_nodes(self, nodes: Iterable[str]) -> None:
        spaces = {node: self.spaces[node] for node in nodes}
        for node, space in spaces.items():
            space.unshare(
                HERE / "node-boot",
                {
                    "NODE": node, "NODE_IP": self.ip(node), "NODE_FOLDER": str(space.folder), "SRV": str(SRV),
                    "HOSTS": str(self.root / "hosts"), "STORAGE": str(self.storage(self.domain_node(node))),
                },
            )  # fmt: skip
        lines: list[str] = []
        for node, space in spaces.items():
            port = self._port(node)
            lines += [
                f"link add {port} type veth peer name eth0 address {self._mac(node)} netns {space.pid}",
                f"link set {port} master br0 up",
            ]
        self._hub_batch(*lines)
        for space in spaces.values():
            space.go()
        for node, space in spaces.items():
            wait_until(lambda s=space: listening(s.pid), 30, f"{node}: libvirtd does not listen", space.tail)  # type: ignore[misc]

    def _hub_ip(self, *argv: str) -> None:
        self._hub_batch(" ".join(argv))

    def _hub_batch(self, *lines: str) -> None:
        # only the network namespace is entered: pids in these lines are this machine's
        argv = ["nsenter", "-t", str(self.hub.pid), "--net", "--", "ip", "-batch", "-"]
        done = subprocess.run(argv, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
        if done.returncode:
            raise HdcsError(f"the hub's network could not be set up: {done.stderr.strip()}")

    def _wait_no_link(self) -> None:
        """The kernel drops the veth a moment after the hub's last process."""
        with contextlib.suppress(HdcsError):
            wait_until(lambda: not Path("/sys/class/net", self.link).exists(), 3, "link", lambda: "")


def free_net(below: str = "10.99") -> str:
    """Beginning of a /24 that no interface of this machine is in; random, so that two callers rarely get the same."""
    used = {str(address).rpartition(".")[0] for _, address in _addresses()}
    return secrets.choice([net for n in range(1, 255) if (net := f"{below}.{n}") not in used])


def _addresses() -> list[tuple[str, ipaddress.IPv4Address]]:
    """Interface and address of each IPv4 address of this machine; no packet is sent to learn them."""
    shown = json.loads(_ip("-json", "-4", "address", "show"))
    return [(i["ifname"], ipaddress.IPv4Address(a["local"])) for i in shown for a in i.get("addr_info", [])]


def _ip(*argv: str) -> str:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HdcsError(f"ip {' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
