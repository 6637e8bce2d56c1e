"""``python -m tests.chaos real|sim … [--json]``: a module here of that name with ``add_arguments`` and ``run``.

``run(options)`` returns what was found as a dict; with ``violations`` in it the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import signal
import sys

from hdcs_tasks.config import Settings
from hdcs_tasks.logs import configure_logging

KINDS = {"real": "in the lab: real libvirt, QEMU, Redis, workers", "sim": "in a simulation with a virtual clock"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text in KINDS.items():
        sub = kinds.add_parser(kind, help=text)
        sub.add_argument("--json", action="store_true", help="JSON alone on stdout")
        if importlib.util.find_spec(f"tests.chaos.{kind}") is not None:
            importlib.import_module(f"tests.chaos.{kind}").add_arguments(sub)
    options = parser.parse_args()
    configure_logging(Settings(log_format="console"))  # to stderr: stdout is for the JSON alone
    # a kill ends the run like Ctrl-C: its lab is taken down
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = importlib.import_module(f"tests.chaos.{options.kind}").run(options)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for key, value in found.items():
            print(f"{key}: {value}")
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
