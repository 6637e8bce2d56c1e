"""``python -m tests.chaos sim|real|moves …``: histories with faults, simulated or in the lab; each parses its own."""

from __future__ import annotations

import importlib
import sys

HALVES = {"sim": "tests.chaos.sim.run", "real": "tests.chaos.real", "moves": "tests.chaos.moves"}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in HALVES:
        print(f"usage: python -m tests.chaos {'|'.join(HALVES)} …", file=sys.stderr)
        return 2
    return int(importlib.import_module(HALVES[arguments[0]]).main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
