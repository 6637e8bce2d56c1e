"""Every phase of a move and every fault, in the lab: afterwards one good copy runs, and nothing else is left."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from deploy.lab import SRV
from deploy.lab.center import Center, wait_for
from hdcs_tasks.cloud import Operation
from hdcs_tasks.config import Settings
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.hypervisor import migration
from hdcs_tasks.logs import configure_logging
from tests.chaos import notes
from tests.lab.data_center import data_center, kill_worker, libvirt_of, locked
from tests.lab.test_drain import LONG_S, SLOW_MIB_S, bring, place, under_way
from tests.lab.test_moves import ended, power_cycle, whole

SOURCE = "node1"
SOURCES = ("node1", "node2")
TARGETS = {"live": "node2", "move": "node3", "saved": "node2", "carry": "node3"}
"""The kinds of docs/moves.md, and where to: inside the domain node, or to another."""
PERFORM = "perform"
PHASES = {
    "live": ("prepare", PERFORM, "finish", "clean"),
    "move": ("prepare", PERFORM, "finish", "clean"),
    "saved": ("save", "start"),
    "carry": ("save", "offer", "fetch", "start", "discard"),
}
FAMILY = {"live": "vm.migrate_", "move": "vm.move_", "saved": "vm.", "carry": "vm."}
FAULTS = ("cut source", "cut target", "kill source's worker", "kill target's worker", "source dies", "target dies")
BOTH = "cut source and kill source's worker"
"""Nobody is left who would free a guest whose QEMU waits for what was lost with the network."""
ENDS = "source's guest ends"
FULL = "target's disk full"
ROOM = {("move", "prepare"): "64k", ("move", "perform"): "400k", ("carry", "fetch"): "400k"}
"""How much the target's disk takes, for the step to meet its end: no overlay, or an overlay without its content."""
RESTS = ("stopped", "saved")
FIRST = ("prepare", "save")
TWO_SWEEPS_S = 45.0
"""Of those that tidy up on server nodes, the slowest."""
DESK = "desk"


class Case(NamedTuple):
    """A kind of move, and which fault comes in which phase of it."""

    kind: str
    phase: str
    fault: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.phase}: {self.fault}"


def all_cases() -> list[Case]:
    """Every phase of every kind with every fault; a full disk where something is written to it, a guest that ends (shut
    down by its user, say) and a cut that nobody watches where it has not gone yet."""
    places = [(kind, phase) for kind, phases in PHASES.items() for phase in phases]
    cases = [Case(*at, fault) for at, fault in itertools.product(places, FAULTS)] + [Case(*at, FULL) for at in ROOM]
    live = [(kind, phase) for kind, phase in places if kind in ("live", "move")]
    cases += [Case(*at, ENDS) for at in live if at[1] in ("prepare", PERFORM)]
    return cases + [Case(*at, BOTH) for at in live if at[1] == PERFORM]


def main(arguments: list[str]) -> int:
    """``python -m tests.chaos moves``: JSON alone on stdout, progress on stderr; 1 where there is a violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos moves", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the order of the cases")
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="so many of them (else each once)")
    parser.add_argument("--only", default="", metavar="WORDS", help="those with these words, such as 'carry, fetch'")
    options = parser.parse_args(arguments)
    configure_logging(Settings(log_format="console"))  # to stderr
    cases = [case for case in all_cases() if options.only in str(case)]
    random.Random(options.seed).shuffle(cases)
    found = run(cases[: options.cases or None])
    print(json.dumps(found, indent=1))
    return 1 if found["violations"] else 0


def run(cases: list[Case]) -> dict[str, Any]:
    """``{"runs", "moved", "stayed", "violations": [{"case", "what"}], "seconds"}``."""
    began, ends, violations = time.monotonic(), [], []
    with lab() as center:
        for case in cases:
            try:
                ends.append(end := one(center, case))
            except Exception as error:  # a case that went wrong is what is looked for
                violations.append({"case": str(case), "what": "".join(traceback.format_exception(error))[-4000:]})
                end = f"VIOLATION: {error!r}"
            print(f"{time.monotonic() - began:6.1f} s  {case}: {end}", file=sys.stderr, flush=True)
    counts = {end: ends.count(end) for end in ("moved", "stayed")}
    return {"runs": len(cases), **counts, "violations": violations, "seconds": round(time.monotonic() - began, 1)}


@contextmanager
def lab() -> Iterator[Center]:
    """east (node1, node2) and west (node3), over TLS, with one desktop that runs."""
    with tempfile.TemporaryDirectory(prefix="moves-") as folder:
        root = Path(folder) / "moves"
        with data_center(root, domain_nodes={"east": ["node1", "node2"], "west": ["node3"]}, tls=True) as center:
            image = center.lab.root / "blank.qcow2"
            notes.make_image(image)
            center.cloud.profiles.create("chip", vcpus=1, memory_mib=64)
            center.cloud.images.add("blank", str(image)).result(timeout_s=120)
            clone = center.cloud.vms.clone("blank", name=DESK, profile="chip", domain_node="east", start=True)
            clone.result(timeout_s=LONG_S)
            yield center


def one(center: Center, case: Case) -> str:
    """One move with its fault; "moved" or "stayed". Raises where anything is not as it should be then."""
    settled(center)
    bring(center, DESK, SOURCE)
    vm, target = center.cloud.vms[DESK], TARGETS[case.kind]
    # A new one each time: an older copy of the disk would tell of itself.
    kept = dict.fromkeys(range(notes.SLOTS), random.randrange(1, 256))
    for slot, pattern in kept.items():
        assert notes.write(center, vm.show(), slot, pattern)
    hurt = SOURCE if "source" in case.fault else target
    with full(center, target, ROOM[case.kind, case.phase]) if case.fault == FULL else nullcontext():
        with ExitStack() as locks:
            operation = begin(center, case, locks)
            strike(center, case.fault, hurt)
        seen = mend(center, case, hurt, operation)
    center.wait_for_nodes(center.lab.nodes, LONG_S)
    # A target that is lost when the guest has come could not finish, and that is told.
    assert case.phase == "finish" or not seen["needs_operator"], seen
    settled(center)
    at = str(place(center, DESK)[2])
    assert at == target or at in SOURCES, place(center, DESK)
    wait_for("its QEMU to answer", lambda: answers(center, at, vm.show()["id"]), LONG_S)
    assert not (wrong := notes.wrong_running(center, vm.show(), kept)), wrong
    nothing_left(center)
    return "moved" if at == target else "stayed"


def begin(center: Center, case: Case, locks: ExitStack) -> Operation:
    """A move whose phase is in the hands of its server node, which cannot go on with it until ``locks`` are open; where
    bytes travel, they do."""
    target, vm = TARGETS[case.kind], center.cloud.vms[DESK]
    doers = {"prepare": [target], "finish": [target], "start": [target], "clean": [SOURCE], "save": [SOURCE],
             "discard": SOURCES}.get(case.phase, [])  # fmt: skip
    first = case.phase in FIRST or case.kind == "saved"
    if first:
        hold(center, doers, vm.show()["id"], locks)
    slow = SLOW_MIB_S if not first and case.fault != FULL else None
    operation = vm.migrate(target, live=case.kind in ("live", "move"), bandwidth_mib_s=slow)
    if case.fault == FULL:
        return operation  # it meets its end by itself
    if case.phase == PERFORM:
        under_way(center, operation)
        return operation
    if not first:
        travels(center, operation, case.kind)
        hold(center, doers, vm.show()["id"], locks)
    in_hand(center, operation, f"{FAMILY[case.kind]}{case.phase}_on_node")
    return operation


def hold(center: Center, nodes: Iterable[str], vm_id: str, locks: ExitStack) -> None:
    for node in nodes:
        locks.enter_context(locked(center, node, vm_id))


def travels(center: Center, operation: Operation, kind: str) -> None:
    """Wait until the guest, or the files it consists of, are on their way."""
    if kind == "carry":
        in_hand(center, operation, "vm.fetch_on_node")
    else:
        under_way(center, operation)


def in_hand(center: Center, operation: Operation, step: str) -> None:
    """Wait until a server node has ``step`` in its hands (or, a short one, had)."""

    def look() -> bool:
        shown = operation.show()
        assert shown["state"] in ("queued", "running"), shown["error"]
        names = [found["name"] for found in shown["steps"]]
        seen = center.cloud.control.reservations.steps.status(shown["steps"][-1]["id"])
        return step in names[:-1] or (names[-1] == step and seen is not None and seen.holder is not None)

    wait_for(f"{step} to be in hand", look, LONG_S, every_s=0.005)


def strike(center: Center, fault: str, node: str) -> None:
    if "cut" in fault:
        center.lab.cut(node)
    if "kill" in fault:
        kill_worker(center, node)
    if fault == ENDS:
        vm_id = center.cloud.vms[DESK].show()["id"]
        (pid,) = [pid for pid, line in center.lab.space(node).processes() if "qemu" in line and vm_id in line]
        os.kill(pid, signal.SIGKILL)
    if fault.endswith("dies"):
        center.lab.power_off(node)


def mend(center: Center, case: Case, node: str, operation: Operation) -> dict[str, Any]:
    """Have the server node back, and the operation's end. One that died comes back after that; but where it was to save
    or to start the guest, nobody but it can tell what became of that, and it is waited for."""
    if "cut" in case.fault:
        time.sleep(1.5 * center.cloud.control.settings.lease_ttl_s)
        center.lab.mend(node)
    if "kill" in case.fault:
        time.sleep(1.0)
        joined_at = center.cloud.server_nodes.show(node)["joined_at"]
        center.start_node(node)
        seen = ended(operation)
        # Its predecessor's lease may have to run out first, and the server node be lost until it has joined.
        wait_for(f"{node} to join", lambda: center.cloud.server_nodes.show(node)["joined_at"] != joined_at, LONG_S)
        return seen
    if case.fault.endswith("dies"):
        awaited = case.phase in ("save", "start")
        wait_for(f"{node} to be lost", lambda: center.cloud.server_nodes.show(node)["state"] == "lost", LONG_S)
        seen = None if awaited else ended(operation)
        power_cycle(center, node)
        seen = seen or ended(operation)
        wait_for("what ran there to be missed", lambda: lives(center, node), LONG_S)
        return seen
    seen = ended(operation)
    if case.fault == ENDS:
        wait_for("the guest to be missed", lambda: lives(center, node), LONG_S)
    return seen


def lives(center: Center, node: str) -> bool:
    """Whether the desktop, recorded on this server node, runs there; or is not recorded there."""
    if place(center, DESK)[2] != node:
        return True
    with libvirt_of(center, node) as host:
        guest = host.lookup(center.cloud.vms[DESK].show()["id"])
        return guest is not None and bool(guest.isActive())


@contextmanager
def full(center: Center, node: str, size: str) -> Iterator[None]:
    """The storage of VMs there takes no more than ``size``."""
    center.lab.run(node, ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", f"{SRV}/vms"])
    try:
        yield
    finally:
        center.lab.run(node, ["umount", f"{SRV}/vms"])


def answers(center: Center, node: str, vm_id: str) -> bool:
    """Whether the guest's QEMU tells of its disk."""
    with libvirt_of(center, node) as host:
        try:
            return migration.disk_sizes(host, vm_id)[0] > 0
        except HdcsError:
            return False


def nothing_left(center: Center) -> None:
    """Everything agrees, at the latest when two sweeps have given back what a lost server node could not."""
    end = time.monotonic() + TWO_SWEEPS_S
    while True:
        try:
            return whole(center)
        except AssertionError:
            if time.monotonic() > end:
                raise
        time.sleep(1.0)


def settled(center: Center) -> None:
    """The desktop rests; one that died with its server node was recorded as stopped, and is started again."""
    vm = center.cloud.vms[DESK]
    wait_for("the desktop to rest", lambda: place(center, DESK)[0] in ("running", *RESTS), LONG_S)
    if place(center, DESK)[0] in RESTS:
        vm.start(node=SOURCE if place(center, DESK)[1] == "east" else None).result(timeout_s=LONG_S)
