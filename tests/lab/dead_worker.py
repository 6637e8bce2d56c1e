"""A worker that is killed in the middle of a job: run as a program by the tests, it begins one and never ends it."""

from __future__ import annotations

import sys
from pathlib import Path

from hdcs_tasks.hypervisor.backup import Backing, backup_running
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.migration import migrate_live


def tell(percent: float, phase: str, _eta_s: float | None) -> None:
    print(f"{percent:.1f} {phase}", flush=True)


def main(what: str, source: str, vm_id: str, *rest: str) -> None:
    host = Host.open(source)
    if what == "migrate":
        target_uri, address = rest
        migrate_live(
            host, vm_id, target_uri=target_uri, target_address=address, unsafe=True, bandwidth_mib_s=2,
            on_progress=tell,
        )  # fmt: skip
    else:
        target, checkpoint, base = rest
        backup_running(host, vm_id, target=Path(target), checkpoint=checkpoint, backing=Backing(base), on_progress=tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
