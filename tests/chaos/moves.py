"""Every phase of a move and every fault, in the lab: afterwards one good copy runs, and nothing else is left."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deploy.lab.center import Center, wait_for
from hdcs_tasks.config import Settings
from hdcs_tasks.logs import configure_logging
from tests.chaos import notes
from tests.lab.data_center import data_center, kill_worker
from tests.lab.test_drain import LONG_S, PATTERN, SLOW_MIB_S, answers, bring, place, under_way
from tests.lab.test_moves import comes_to, ended, power_cycle, whole

SOURCE = "node1"
TARGETS = {"inside": "node2", "between": "node3"}
PHASES = ("prepare", "perform", "finish", "clean")
FAULTS = ("cut source", "cut target", "kill source's worker", "kill target's worker", "target dies")
DESK = "desk"


class Case(NamedTuple):
    """A move inside its domain node or between two, and which fault comes in which phase of it."""

    kind: str
    phase: str
    fault: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.phase}: {self.fault}"


def main(arguments: list[str]) -> int:
    """``python -m tests.chaos moves``: JSON alone on stdout, progress on stderr; 1 where there is a violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos moves", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the order of the cases")
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="so many of them (else each once)")
    options = parser.parse_args(arguments)
    configure_logging(Settings(log_format="console"))  # to stderr
    cases = [Case(*words) for words in itertools.product(TARGETS, PHASES, FAULTS)]
    random.Random(options.seed).shuffle(cases)
    found = run(cases[: options.cases or None])
    print(json.dumps(found, indent=1))
    return 1 if found["violations"] else 0


def run(cases: list[Case]) -> dict[str, Any]:
    """``{"runs", "moved", "stayed", "violations": [{"case", "what"}], "seconds"}``."""
    began, ends, violations = time.monotonic(), [], []
    with lab() as center:
        assert notes.write(center, center.cloud.vms[DESK].show(), 0, PATTERN)
        for case in cases:
            try:
                ends.append(end := one(center, case))
            except Exception as error:  # a case that went wrong is what is looked for
                violations.append({"case": str(case), "what": f"{error!r}"[:2000]})
                end = f"VIOLATION: {error!r}"
            print(f"{time.monotonic() - began:6.1f} s  {case}: {end}", file=sys.stderr, flush=True)
        violations += content(center, {0: PATTERN})
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
    bring(center, DESK, SOURCE)
    vm, target = center.cloud.vms[DESK], TARGETS[case.kind]
    operation = vm.migrate(target, bandwidth_mib_s=SLOW_MIB_S if case.phase == "perform" else None)
    if case.phase == "perform":
        under_way(center, operation)
    else:
        family = "vm.move" if case.kind == "between" else "vm.migrate"
        comes_to(operation, f"{family}_{case.phase}_on_node")
    hurt(center, case.fault, target)
    seen = ended(operation)
    if case.fault == "target dies":
        power_cycle(center, target)
        wait_for("what ran there to be missed", lambda: place(center, DESK)[2] != target, LONG_S)
    center.wait_for_nodes(center.lab.nodes, LONG_S)
    # A target that is lost when the guest has come could not finish, and that is told.
    assert case.phase == "finish" or not seen["needs_operator"], seen
    settled(center)
    at = place(center, DESK)[2]
    assert at in (SOURCE, target), place(center, DESK)
    wait_for("its QEMU to answer", lambda: answers(center, str(at), vm.show()["id"]), LONG_S)
    whole(center)
    return "moved" if at == target else "stayed"


def hurt(center: Center, fault: str, target: str) -> None:
    """Break it, and mend it, but for a target that died: it stays so while the move ends."""
    node = SOURCE if "source" in fault else target
    if fault.startswith("cut"):
        center.lab.cut(node)
        time.sleep(1.5 * center.cloud.control.settings.lease_ttl_s)
        center.lab.mend(node)
    elif fault.startswith("kill"):
        kill_worker(center, node)
        time.sleep(1.0)
        center.start_node(node)
    else:
        center.lab.power_off(node)


def settled(center: Center) -> None:
    """The desktop rests; one that died with its server node was recorded as stopped, and is started again."""
    vm = center.cloud.vms[DESK]
    wait_for("the desktop to rest", lambda: place(center, DESK)[0] in ("running", "stopped"), LONG_S)
    if place(center, DESK)[0] == "stopped":
        vm.start(node=SOURCE if place(center, DESK)[1] == "east" else None).result(timeout_s=LONG_S)


def content(center: Center, kept: notes.Notes) -> list[dict[str, str]]:
    vm = center.cloud.vms[DESK]
    vm.stop(force=True).result(timeout_s=LONG_S)
    wrong = notes.wrong(center, vm.show()["home"], vm.show()["id"], kept)
    return [{"case": "all of them", "what": f"content of the disk: {wrong}"}] if wrong else []
