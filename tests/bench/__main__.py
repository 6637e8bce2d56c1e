"""``python -m tests.bench NAME [--json] [--quick]``: NAME is a module here with ``run(options) -> list[Figure]``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from tests.bench.report import report

NAMES = (
    "backup",
    "boot_storm",
    "dispatch",
    "migrate",
    "placement",
    "rebalance",
    "reservations",
    "scale",
    "sweep",
    "warm",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true", help="JSON on stdout (else a table)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: seconds instead of a minute")
    parser.add_argument("--cluster", type=Path, help="placement: server nodes from a file (format: placement.py)")
    parser.add_argument("--first-seed", type=int, default=0, help="placement: the first of the seeds drawn")
    parser.add_argument("--requests", type=Path, help="placement: VMs to place, in this order")
    parser.add_argument("--rounds", type=int, help="boot_storm: storms of each side (else 2; quick: 1)")
    options = parser.parse_args()
    found = report(options.name, importlib.import_module(f"tests.bench.{options.name}").run(options))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for f in found["figures"]:
            verdict = "" if f["met"] is None else ("met" if f["met"] else "NOT MET")
            print(f"{f['name']:34} {f['value']:>12} {f['unit']:12} baseline {f['baseline']}  ratio {f['ratio']}  "
                  f"{f['goal']} {verdict}")  # fmt: skip
    return 0 if found["goal_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
