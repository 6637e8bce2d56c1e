"""A seeded run of mixed operations on a real data center while faults are injected, and the judgement at its end.

``operations`` acknowledged requests at least, and every kind of fault at least once. Then the faults stop; within a
minute everything must have settled, and after two more sweeps nothing may be left that has no owner.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.lab import Lab, default_root, free_net
from deploy.lab.center import Center, copy_logs
from hdcs_tasks.config import Settings
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.logs import configure_logging
from hdcs_tasks.store.models import Step
from tests.chaos import checker, notes
from tests.chaos.faults import KINDS, Faults, Interrupted
from tests.chaos.invariants import Violation, violation
from tests.chaos.observer import Observer
from tests.chaos.work import Desk, Ledger, Worker

DOMAIN_NODES = {"east": ["node1", "node2"], "west": ["node3"]}
WORKERS = 4
QUIET_S = 60.0
REBUILT_WITHIN_S = 60.0
OPERATIONS_PER_FAULT = 8
ENV = {"HDCS_NODE_CONCURRENCY": "2", "HDCS_SWEEP_S": "2", "HDCS_LEASE_TTL_S": "9"}


def main(arguments: list[str]) -> int:
    """``python -m tests.chaos real``: JSON alone on stdout, progress on stderr; 1 where there is a violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos real", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=200, metavar="N", help="acknowledged requests, at least")
    parser.add_argument("--faults", default="", metavar="KIND,…", help="only these kinds")
    parser.add_argument("--keep-logs", type=Path, metavar="FOLDER", help="copy the lab's logs and database there")
    parser.add_argument("--json", action="store_true", help="JSON on stdout (else a line each)")
    options = parser.parse_args(arguments)
    configure_logging(Settings(log_format="console"))  # to stderr
    # a kill ends the run like Ctrl-C: its lab is taken down
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = run(options)
    print(json.dumps(found, indent=1) if options.json else "\n".join(f"{k}: {v}" for k, v in found.items()))
    return 1 if found["violations"] else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One run. ``{"operations", "faults", "violations", "recovery_s": {"p50", "max", "bound"}, …}``."""
    lab = Lab(f"chaos-{options.seed}", default_root(f"chaos-{options.seed}"), free_net("10.94"), DOMAIN_NODES)
    center = Center(lab, ENV, flower=False)
    try:
        center.up(say)
        return Run(center, options).run()
    finally:
        if options.keep_logs is not None and lab.root.exists():
            copy_logs(lab, options.keep_logs)
            for file in lab.root.glob("hdcs.sqlite*"):
                (options.keep_logs / file.name).write_bytes(file.read_bytes())
        center.down()


class Run:
    """The work, the faults and the watching of one data center."""

    def __init__(self, center: Center, options: argparse.Namespace) -> None:
        self.center = center
        self.dice = random.Random(options.seed)
        self.began = time.monotonic()
        self.ledger = Ledger(options.operations)
        self.observer = Observer(center.lab.spaces)
        self.faults = Faults(center, self.dice, self.tell)
        self.kinds = [k for k in KINDS if not options.faults or k in options.faults.split(",")]
        self.workers = [Worker(center, self.ledger, n, options.seed, self.tell) for n in range(WORKERS)]
        self.violations: list[Violation] = []

    def tell(self, text: str) -> None:
        say(f"{time.monotonic() - self.began:6.1f} s {len(self.ledger.acknowledged):4} asked  {text}")

    def run(self) -> dict[str, Any]:
        self.prepare()
        self.observer.start()
        for worker in self.workers:
            worker.start()
        self.break_things()
        quiet_s = self.wait_until_quiet()
        self.judge("after the faults")
        self.look_at_content()
        self.delete_all()
        self.judge("after everything was deleted")
        self.observer.stop()
        self.violations += checker.ran_twice(self.center, self.observer, time.time())
        self.violations += checker.deaths(self.center)
        for seconds in self.faults.rebuilt_s:
            if seconds > REBUILT_WITHIN_S:
                self.violations.append(violation("reservations not rebuilt in time", "", f"{seconds:.0f} s"))
        return self.report(quiet_s)

    def prepare(self) -> None:
        image = self.center.lab.root / "blank.qcow2"
        notes.make_image(image)
        self.center.cloud.profiles.create("chip", vcpus=1, memory_mib=64)
        self.center.cloud.images.add("blank", str(image)).result(timeout_s=120)

    def break_things(self) -> None:
        """Every kind in a random order, again and again, until there was enough of both."""
        faults = max(len(self.kinds), self.ledger.wanted // OPERATIONS_PER_FAULT)
        todo: list[str] = []
        time.sleep(4)
        for _ in range(faults if self.kinds else 0):
            todo = todo or self.dice.sample(self.kinds, len(self.kinds))
            self.faults.inject(kind := todo.pop())
            time.sleep(self.dice.uniform(2, 7))
            if kind.startswith("kill_"):
                self.wait_recovered()
        while not self.ledger.enough:
            time.sleep(0.5)

    def wait_recovered(self) -> None:
        """Recovery is measured undisturbed: the next fault comes when what a kill interrupted goes on."""
        recent = [one for one in self.faults.interrupted if time.time() - one.at < self.bound_s]
        while recent and time.time() - recent[-1].at < self.bound_s + 5:
            if all(self._recovered(one) for one in recent):
                return
            time.sleep(0.5)

    def wait_until_quiet(self) -> float:
        """No new work; seconds until all that was asked for has ended."""
        self.ledger.stop.set()
        for worker in self.workers:
            worker.join(ACK_PATIENCE_S)
        began = time.monotonic()
        self.tell("no more faults, no more work")
        left = []
        while time.monotonic() - began < QUIET_S and (left := self._unsettled()):
            time.sleep(0.5)
        quiet_s = time.monotonic() - began
        self.tell(f"quiet after {quiet_s:.1f} s, {len(left)} operations left")
        return quiet_s

    def _unsettled(self) -> list[str]:
        return checker.unsettled(self.center.cloud.control)

    def judge(self, when: str) -> None:
        """Two sweeps later; what is still moving (a cooling port, a spool) may take a few looks, not more."""
        settings = self.center.cloud.control.settings
        time.sleep(2 * settings.sweep_s)
        deadline = time.monotonic() + 15
        while True:
            try:
                found = checker.check(self.center, self.ledger.acknowledged)
                found += checker.processes(self.center, self.observer)
            except HdcsError as error:
                found = [violation("not to be checked", when, str(error))]
            if not found or time.monotonic() > deadline:
                break
            time.sleep(1)
        for one in found:
            self.tell(f"VIOLATION {when}: {one}")
        self.violations += [one | {"when": when} for one in found]

    def look_at_content(self) -> None:
        """What was written is there: in every disk, and in what every VM's newest backup restores."""
        for desk in (desk for worker in self.workers for desk in worker.desks):
            self._guarded(lambda d=desk: self._look_at(d))  # type: ignore[misc]
        for number, desk in enumerate(desk for worker in self.workers for desk in worker.desks if desk.points):
            self._guarded(lambda d=desk, n=number: self._restore(d, f"restored-{n}"))  # type: ignore[misc]

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except HdcsError as error:
            self.violations.append(violation("content not to be checked", "", str(error)))
            self.tell(f"VIOLATION content: {error}")

    def _look_at(self, desk: Desk) -> None:
        found = self.center.cloud.vms.list(names=[desk.name])
        if not found or found[0]["state"] == "failed":
            return
        vm = self.center.cloud.vms[desk.name]
        if found[0]["state"] in ("running", "suspended"):
            vm.stop(force=True).result(timeout_s=120)
        if desk.notes is not None:
            self._compare(desk.name, found[0], desk.notes)

    def _restore(self, desk: Desk, name: str) -> None:
        point, kept = desk.points[-1]
        self.center.cloud.backups.restore(point, name=name, start=False).result(timeout_s=120)
        self._compare(f"{name}, from backup {point[:8]} of {desk.name}", self.center.cloud.vms[name].show(), kept)

    def _compare(self, what: str, vm: dict[str, Any], kept: notes.Notes) -> None:
        wrong = notes.wrong(self.center, vm["home"], vm["id"], kept)
        if wrong:
            self.violations.append(violation("content", what, wrong))
            self.tell(f"VIOLATION content of {what}: {wrong}")

    def delete_all(self) -> None:
        asked = [self.center.cloud.vms[vm["name"]].delete() for vm in self.center.cloud.vms.list()]
        for operation in asked:
            self._guarded(lambda o=operation: o.result(timeout_s=180))  # type: ignore[misc]

    def report(self, quiet_s: float) -> dict[str, Any]:
        return {
            "operations": len(self.ledger.acknowledged), "faults": self.faults.counts, "violations": self.violations,
            "recovery_s": self.recovery(), "rebuild_s": self.rebuild(),
            "quiet_s": round(quiet_s, 1), "asked": dict(sorted(self.ledger.verbs.items())),
            "ended": dict(sorted(self.ledger.ended.items())), "refused": dict(sorted(self.ledger.refused.items())),
            "errors": self.ledger.errors, "starts_seen": sum(one.is_start for one in self.observer.seen()),
            "migrations_seen": sum(one.incoming for one in self.observer.seen()),
            "seconds": round(time.monotonic() - self.began, 1),
        }  # fmt: skip

    def rebuild(self) -> dict[str, Any]:
        """From Redis's return to reservations being given out again; other faults come in between."""
        found = sorted(self.faults.rebuilt_s)
        return {
            "times": len(found), "p50": round(statistics.median(found), 1) if found else None,
            "max": round(found[-1], 1) if found else None, "bound": REBUILT_WITHIN_S,
        }  # fmt: skip

    def recovery(self) -> dict[str, Any]:
        """Of steps whose executor was killed: seconds from the kill to the next attempt's claim, and to its issue
        (where no other fault came in between: ``disturbed`` counts the others). ``bound``: what is promised."""
        found = [(one, times) for one in self.faults.interrupted if (times := self._recovered(one)) is not None]
        clean = [(one, times) for one, times in found if not self._disturbed(one, times[1])]
        claimed = [times[1] - one.at for one, times in clean]
        issued = [times[0] - one.at for one, times in clean if times[0]]
        return {
            "p50": round(statistics.median(claimed), 2) if claimed else None,
            "max": round(max(claimed), 2) if claimed else None, "bound": self.bound_s,
            "issued_max": round(max(issued), 2) if issued else None, "disturbed": len(found) - len(clean),
            "samples": [[one.fault, round(times[1] - one.at, 2)] for one, times in clean],
        }  # fmt: skip

    @property
    def bound_s(self) -> float:
        settings = self.center.cloud.control.settings
        return settings.lease_ttl_s + settings.sweep_s + 5

    def _recovered(self, one: Interrupted) -> tuple[float, float] | None:
        """When the next attempt was issued (0: not by the sweep) and claimed; None: there was none, it had ended."""
        with self.center.cloud.control.store.read() as session:
            step = session.get(Step, one.step)
            history = list(step.history) if step is not None else []
        lost = [e["ended_at"] for e in history if e.get("attempt") == one.attempt and not e.get("started_at")]
        later = [e["started_at"] for e in history if e.get("attempt", 0) > one.attempt and e.get("started_at")]
        return (min(lost, default=0.0), min(later)) if later else None

    def _disturbed(self, one: Interrupted, until: float) -> bool:
        spans = [(a, b) for kind, a, b in self.faults.spans if kind != one.fault or not a <= one.at <= b]
        return any(a < until and b > one.at for a, b in spans)


ACK_PATIENCE_S = 30.0
