"""The whole main job on a real, small data center, step by step, with evidence; then a table of what happened.

Run it by ``deploy/demo``. Every change goes through HDCS's own queues; what a desktop's user would see or do inside
the guest (its clock, a file) is looked at from outside HDCS, through the guest agent.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.lab.center import Center, wait_for
from deploy.lab.flower import Flower
from deploy.lab.golden_image import build
from deploy.lab.keep import print_how_to_use
from deploy.lab.lab import Lab, default_root, free_net
from hdcs_tasks.cloud import Operation
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.hypervisor import agent
from hdcs_tasks.hypervisor.connection import Host

DESKS = 8
READY_S = 240.0
OPERATION_S = 180.0
IDLE_AFTER_S = 6.0
NOTE = "/root/note"

Evidence = dict[str, Any]


@dataclass
class Step:
    """One line of the table. ``where``: queue and server node; ``evidence``: what was seen."""

    name: str
    seconds: float
    where: str = ""
    evidence: Evidence = field(default_factory=dict)


class Demo:
    """The story and what it has measured so far."""

    def __init__(self, center: Center, console: Console) -> None:
        self.center = center
        self.console = console
        self.steps: list[Step] = []

    @property
    def cloud(self) -> Any:
        return self.center.cloud

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Time the block and print its line when it has ended."""
        started = time.monotonic()
        made = Step(name, 0.0)
        with self.console.status(f"{name} …", refresh_per_second=2):  # on a terminal only
            yield made
        made.seconds = round(time.monotonic() - started, 2)
        self.steps.append(made)
        shown = ", ".join(
            f"{key} {value}" for key, value in made.evidence.items() if not isinstance(value, list | dict)
        )
        self.console.print(f"[green]✓[/] {made.seconds:6.1f} s  {name}  [dim]{made.where}  {shown}[/]", soft_wrap=True)

    def done(self, operation: Operation, step: Step) -> dict[str, Any]:
        """Wait for an operation; its steps' queues and server nodes become the line's ``where``."""
        result = operation.result(timeout_s=OPERATION_S)
        shown = operation.show()
        children = [self.cloud.operations[child["id"]].show() for child in shown["children"]]
        steps = [found for each in (shown, *children) for found in each["steps"]]
        step.where = (", " if children else " → ").join(f"{s['name']} ({s['queue']}) on {s['node']}" for s in steps)
        step.evidence["steps"] = [{key: s[key] for key in ("name", "queue", "node", "attempt")} for s in steps]
        return result

    # --- what the user of a desktop sees

    def at_desk(self, name: str, look: Callable[[Host, str], Any]) -> Any:
        """Look at a running guest from outside HDCS, on the server node where its record says it is."""
        vm = self.cloud.vms[name].show()
        with Host.open(f"qemu+tcp://{self.center.lab.ip(vm['server_node'])}/system") as host:
            return look(host, vm["id"])

    def clock(self, name: str) -> tuple[int, float]:
        """The guest's own counter, and its uptime in seconds: both start at 0 with a boot."""
        text = self.at_desk(name, lambda host, vm_id: agent.read_file(host, vm_id, "/run/tick")).decode().split()
        return int(text[0]), int(text[1]) / 100

    def write_note(self, name: str, text: str) -> None:
        argv = ["/bin/sh", "-c", f"echo {text} > {NOTE} && sync"]
        self.at_desk(name, lambda host, vm_id: agent.exec_(host, vm_id, argv))

    def read_note(self, name: str) -> str:
        return str(self.at_desk(name, lambda host, vm_id: agent.read_file(host, vm_id, NOTE)).decode().strip())

    # --- the story

    def run(self) -> None:
        self.join()
        self.add_image()
        self.clone()
        self.answer()
        self.commands()
        self.migrate()
        self.backup()
        self.reclaim()
        self.shrink_and_grow()
        self.look_at_flower()

    def join(self) -> None:
        with self.step("4 server nodes joined by themselves") as step:
            nodes = self.cloud.server_nodes.list()
            step.evidence = {node["name"]: f"{node['domain_node']} {node['subnet']}" for node in nodes}
            primaries = {d["name"]: d["storage_primary"] for d in self.cloud.domain_nodes.list()}
            step.evidence["storage_primary"] = primaries
            step.evidence["capacity_tiny"] = self.cloud.capacity("tiny")["vms"]

    def add_image(self) -> None:
        with self.step("golden image added to both domain nodes") as step:
            image = build()
            self.done(self.cloud.images.add("mini", str(image.path)), step)
            step.evidence |= {"file_bytes": image.path.stat().st_size, "image": "mini:1"}

    def clone(self) -> None:
        with self.step(f"{DESKS} desktops cloned and started at once") as step:
            operation = self.cloud.vms.clone("mini", name="desk-{:03d}", count=DESKS, profile="tiny", start=True)
            self.done(operation, step)
            vms = self.cloud.vms.list()
            keys = ("name", "home", "server_node", "port", "mac", "ip")
            step.evidence["vms"] = [{key: vm[key] for key in keys} for vm in vms]
            step.where = ", ".join(sorted({f"({vm['home']}) {vm['server_node']}" for vm in vms}))
            _check(len({vm["mac"] for vm in vms}) == DESKS, "every desktop has a MAC of its own")
            _check(len({(vm["home"], vm["port"]) for vm in vms}) == DESKS, "every desktop has a port of its own")
            _check(len({vm["home"] for vm in vms}) == 2, "both domain nodes take part")

    def answer(self) -> None:
        with self.step(f"{DESKS} guest agents answer, each with the address HDCS gave it") as step:
            for vm in self.cloud.vms.list():
                self.cloud.vms[vm["name"]].wait_ready(timeout_s=READY_S)
            for vm in self.cloud.vms.list():
                seen = wait_for(f"the address of {vm['name']}", partial(self._addresses, vm["name"]), READY_S)
                _check(vm["ip"] in seen, f"{vm['name']} has {vm['ip']} inside (seen: {seen})")
                step.evidence[vm["name"]] = vm["ip"]

    def _addresses(self, name: str) -> tuple[str, ...]:
        found: tuple[str, ...] = self.at_desk(name, agent.addresses)["agent"]
        return tuple(address for address in found if ":" not in address)

    def commands(self) -> None:
        desk = self.cloud.vms["desk-001"]
        for verb in ("suspend", "resume", "reboot"):
            with self.step(f"desk-001: {verb}") as step:
                self.done(getattr(desk, verb)(), step)
                step.evidence["state"] = desk.show()["state"]
        with self.step("desk-002: stop") as step:
            self.done(self.cloud.vms["desk-002"].stop(), step)
            step.evidence["state"] = self.cloud.vms["desk-002"].show()["state"]

    def migrate(self) -> None:
        with self.step("live migration node1 → node2, the guest's clock running on") as step:
            moving = next(vm for vm in self.cloud.vms.list(server_node="node1") if vm["name"] != "desk-001")
            desk = self.cloud.vms[moving["name"]]
            ticks, uptime_s = self.clock(moving["name"])
            result = self.done(desk.migrate(to="node2"), step)
            after, after_s = self.clock(moving["name"])
            _check(after > ticks and after_s > uptime_s, "the guest's own clock went on")
            moved = desk.show()
            wait_for("the guest's new address", lambda: moved["ip"] in self._addresses(moving["name"]), 180)
            step.evidence |= {
                "vm": moving["name"], "from": result["from"], "to": result["to"], "downtime_ms": result["downtime_ms"],
                "total_ms": result["total_ms"], "bytes": result["bytes"], "port": moved["port"], "ip": moved["ip"],
                "guest_ticks": f"{ticks} → {after}", "guest_uptime_s": f"{uptime_s:.1f} → {after_s:.1f}",
            }  # fmt: skip
            _check(moved["port"] == moving["port"], "it kept its port")

    def backup(self) -> None:
        name = "desk-003"
        for kind, text in (("full", "written-before-the-full-backup"), ("incremental", "written-before-the-increment")):
            with self.step(f"{name}: {kind} backup while it runs") as step:
                self.write_note(name, text)
                result = self.done(self.cloud.backups.create(name), step)
                step.evidence |= {"bytes": result["file_bytes"], "consistency": result["consistency"]}
        self.write_note(name, "written-after-both")
        point = self.cloud.backups.list(name)[-1]
        with self.step("the increment restored as a new desktop that boots with the data of that moment") as step:
            self.done(self.cloud.backups.restore(point["id"], name="restored-001"), step)
            vm = self.cloud.vms["restored-001"].wait_ready(timeout_s=READY_S)
            found = self.read_note("restored-001")
            _check(found == "written-before-the-increment", f"it holds the data of that moment (found {found!r})")
            step.evidence |= {"vm": "restored-001", "ip": vm["ip"], "note": found}

    def reclaim(self) -> None:
        name = "desk-004"
        with self.step("an idle desktop is taken back by the sweep, and its port with it") as step:
            vm = self.cloud.vms[name].show()
            home = vm["home"]
            before = self._ports(home)
            self.cloud.idle.create("demo", selector={"names": [name]}, stop=IDLE_AFTER_S)
            wait_for(f"{name} to be stopped", lambda: self.cloud.vms[name].show()["state"] == "stopped", 120)
            wait_for("its port to cool", lambda: self._ports(home)["ports_used"] == before["ports_used"] - 1
                     and self._ports(home)["ports_cooling"] == 0, 60)  # fmt: skip
            event = next(e for e in self.cloud.events() if e["kind"] == "vm.reclaimed")
            step.evidence = {"vm": name, "port": vm["port"], "why": event["message"], "ports_used":
                             f"{before['ports_used']} → {self._ports(home)['ports_used']}"}  # fmt: skip
            step.where = f"beat: monitor.idle_sweep (control), vm.stop_on_node on {vm['server_node']}"

    def _ports(self, domain_node: str) -> dict[str, Any]:
        return next(dict(d) for d in self.cloud.domain_nodes.list() if d["name"] == domain_node)

    def shrink_and_grow(self) -> None:
        def memory_mib() -> int:
            return int(self._ports("west")["memory_mib"])

        full = memory_mib()
        with self.step("node4's worker stopped: the pool of west shrinks") as step:
            self.center.stop("node4")
            wait_for("the pool to shrink", lambda: memory_mib() < full, 30)
            step.evidence = {"memory_mib": f"{full} → {memory_mib()}"}
        with self.step("node4's worker started again: it grows") as step:
            self.center.start_node("node4")
            wait_for("the pool to grow", lambda: memory_mib() == full, 60)
            step.evidence = {"memory_mib": memory_mib()}

    def look_at_flower(self) -> None:
        if not self.center.with_flower:
            return
        wanted = {"vm.clone_on_node", "vm.start_on_node", "vm.migrate_on_node", "backup.create_on_node"}
        with self.step("Flower: the long steps travelled by the queues named after their domain nodes") as step:
            flower = Flower(self.center.flower_port, self.center.flower_auth)
            keys = wait_for("Flower to know the steps", lambda: flower.routing_keys(wanted), 30)
            for name, queues in keys.items():
                # of a step that was handed on, Flower has the last queue: the server node's own, east@node2
                homes = {queue.partition("@")[0] for queue in queues}
                _check(homes <= {"east", "west"}, f"{name} was published to a domain node's queue ({queues})")
                step.evidence[name] = ", ".join(queues)

    def table(self) -> Table:
        shown = Table(title="HDCS: what the data center did", title_justify="left", show_lines=False)
        for heading in ("step", "s", "where"):
            shown.add_column(heading, justify="right" if heading == "s" else "left", overflow="fold")
        for step in self.steps:
            shown.add_row(step.name, f"{step.seconds:.1f}", step.where or _plain(step.evidence))
        return shown


def _plain(evidence: Evidence) -> str:
    return ", ".join(f"{key} {value}" for key, value in evidence.items() if not isinstance(value, list | dict))


def _check(good: bool, what: str) -> None:
    if not good:
        raise HdcsError(f"the demo expected that {what}, and it is not so", next="Look at the logs it names below")


def _as_json(demo: Demo, seconds: float, error: str | None) -> str:
    steps = [{"name": s.name, "seconds": s.seconds, "where": s.where, "evidence": s.evidence} for s in demo.steps]
    return json.dumps({"ok": error is None, "error": error, "seconds": seconds, "steps": steps}, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the data center and Flower running")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    args = parser.parse_args()
    if args.json:
        _check_writable(parser, args.json)
    # a terminal that closes or a kill ends the story like Ctrl-C: nothing is left behind
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    console = Console(stderr=False, highlight=False)
    demo = Demo(Center(Lab("demo", net=free_net())), console)
    started = time.monotonic()
    keep = False
    try:
        error = _tell(demo)
        seconds = round(time.monotonic() - started, 1)
        if args.json:
            args.json.write_text(_as_json(demo, seconds, error))
        console.print(demo.table())
        keep = args.keep and error is None
        if keep:
            print_how_to_use(demo.center, console)
    finally:
        if not keep:
            _take_down(demo.center)
    if not keep and error is None:
        console.print(
            f"Done in {seconds:.0f} s, and all of it is gone again. To look around in it, and at Flower: "
            "[bold]./deploy/demo --keep[/]"
        )
    return 1 if error else 0


def _check_writable(parser: argparse.ArgumentParser, file: Path) -> None:
    """Not after minutes of work."""
    try:
        file.touch()
    except OSError as error:
        parser.error(f"--json {file} cannot be written: {error.strerror}")


def _tell(demo: Demo) -> str | None:
    """The whole story; what made it fail, told and with the logs kept, or None."""
    console = demo.console
    try:
        with demo.step("data center up"):
            demo.center.up(lambda text: console.print(f"  [dim]{text}[/]"))
        demo.run()
    except (KeyboardInterrupt, Exception) as failure:  # noqa: BLE001 - whatever it was: told, logged, and cleaned up after
        interrupted = isinstance(failure, KeyboardInterrupt)
        error = "interrupted" if interrupted else str(failure) or type(failure).__name__
        console.print(f"[red]✗ {error}[/]\n  logs: {_keep_logs(demo.center)}", soft_wrap=True)
        if not isinstance(failure, HdcsError | KeyboardInterrupt):
            console.print_exception()
        return error
    return None


def _take_down(center: Center) -> None:
    """A second Ctrl-C must not leave half of it; it takes under a second."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    center.down()


def _keep_logs(center: Center) -> Path:
    """The logs of a failed demo outlive its lab."""
    kept = default_root("demo-failed")
    shutil.rmtree(kept, ignore_errors=True)
    logs = center.lab.root / "logs"
    if logs.is_dir():
        shutil.copytree(logs, kept)
    return kept


if __name__ == "__main__":
    sys.exit(main())
