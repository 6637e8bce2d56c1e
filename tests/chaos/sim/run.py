"""``python -m tests.chaos sim``: many seeded histories, at most two processes; or one, told."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import structlog

PROCESSES = 2
COLLECT_EVERY = 2000
"""Histories between two garbage collections: each leaves about 0.4 MB, and looking more often costs more time."""
SHOWN = 50
"""Violations told in full; all are counted."""


def _quiet() -> None:
    silent = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=silent, cache_logger_on_first_use=False)
    logging.disable(logging.CRITICAL)
    gc.freeze()
    gc.disable()


def simulate(first: int, count: int, every: int = 1) -> dict[str, Any]:
    """Histories ``first``, ``first + every``, …: ``{histories, faults, violations, settled_s}``."""
    from tests.chaos.sim.center import Ground
    from tests.chaos.sim.history import History

    _quiet()
    faults: Counter[str] = Counter()
    violations: list[dict[str, Any]] = []
    settled: list[float] = []
    seeds = range(first, first + count * every, every)
    with tempfile.TemporaryDirectory(prefix="hdcs-sim-", dir=_fast_folder()) as folder:
        ground = Ground(Path(folder))
        for number, seed in enumerate(seeds, 1):
            if number % COLLECT_EVERY == 0:
                gc.collect()
            history = History(ground, seed).run()
            faults += history.kernel.faults
            violations += [{"seed": seed} | v for v in history.kernel.violations]
            settled.append(history.settled_s)
    return {"histories": len(seeds), "faults": dict(faults), "violations": violations, "settled_s": settled}


def _fast_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def replay(seed: int) -> list[str]:
    """The history of one seed, told line by line; the same lines each time."""
    from tests.chaos.sim.center import Ground
    from tests.chaos.sim.history import History

    _quiet()
    with tempfile.TemporaryDirectory(prefix="hdcs-sim-", dir=_fast_folder()) as folder:
        history = History(Ground(Path(folder)), seed, tell=True).run()
    lines = history.kernel.story or []
    return [*lines, f"violations: {len(history.kernel.violations)}"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many histories")
    parser.add_argument("--first-seed", type=int, default=1, metavar="S")
    parser.add_argument("--replay", type=int, metavar="SEED", help="tell one history instead")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--processes", type=int, default=PROCESSES, choices=range(1, PROCESSES + 1))
    asked = parser.parse_args(arguments)
    if asked.replay is not None:
        lines = replay(asked.replay)
        print("\n".join(lines))
        return 0 if lines[-1] == "violations: 0" else 1
    began = time.monotonic()
    result = histories(asked.first_seed, asked.seeds, asked.processes) | {"seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(result, indent=1) if asked.json else _words(result))
    return 1 if result["violations"] else 0


def histories(first: int, count: int, processes: int) -> dict[str, Any]:
    """Dealt out like cards, so that each process has its share of slow ones."""
    shares = [(first + at, len(range(at, count, processes)), processes) for at in range(processes)]
    if processes == 1:
        parts = [simulate(*shares[0])]
    else:
        with get_context("spawn").Pool(processes) as pool:
            parts = pool.starmap(simulate, shares)
    faults: Counter[str] = Counter()
    for part in parts:
        faults += Counter(part["faults"])
    violations = sorted((v for part in parts for v in part["violations"]), key=lambda v: int(v["seed"]))
    settled = sorted(s for part in parts for s in part["settled_s"])
    return {
        "histories": sum(part["histories"] for part in parts), "faults": dict(sorted(faults.items())),
        "violations": violations[:SHOWN], "violations_in_all": len(violations),
        "settled_after_s": {"p50": settled[len(settled) // 2], "p99": settled[len(settled) * 99 // 100],
                            "max": settled[-1]},
    }  # fmt: skip


def _words(result: dict[str, Any]) -> str:
    lines = [f"{result['histories']} histories in {result['seconds']} s, {result['violations_in_all']} violations"]
    lines += [f"{count:8}  {kind}" for kind, count in result["faults"].items()]
    lines += [f"seed {v['seed']}: {v['what']}: {v['where']}" for v in result["violations"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
