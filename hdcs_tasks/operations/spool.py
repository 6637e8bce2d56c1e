"""The outcome spool: what a server node did, on its own disk until control has acknowledged it.

Hashes, downtimes and bytes cannot be observed afterwards, so an outcome must survive the death of worker and Redis.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hdcs_tasks.clock import now_s
from hdcs_tasks.logs import logger

log = logger(__name__)

FIRST_RESEND_S = 3.0


class Spool:
    """A folder of JSON files, one per (step, attempt)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sent: dict[str, tuple[float, float]] = {}  # file name: when to send next, and the pause after that

    def write(self, report: dict[str, Any]) -> None:
        """Keep a report durably: written beside, synced, renamed, folder synced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(report)
        partial = path.with_suffix(f".partial.{os.getpid()}")
        with partial.open("w") as file:
            json.dump(report, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def pending(self) -> list[dict[str, Any]]:
        """Every report still kept, oldest first."""
        reports: list[dict[str, Any]] = []
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return reports
        for name in names:
            if not name.endswith(".json"):
                continue
            try:
                reports.append(json.loads((self.folder / name).read_text()))
            except (OSError, ValueError) as error:
                log.error("spooled outcome unreadable", path=str(self.folder / name), error=str(error))
        return sorted(reports, key=lambda report: (report["ended_at"], report["step"]))

    def drop(self, report: dict[str, Any]) -> None:
        self._path(report).unlink(missing_ok=True)
        self._sent.pop(self._path(report).name, None)

    def is_due(self, report: dict[str, Any]) -> bool:
        """Whether to send a report (again): 3 s after it was made, then in pauses that grow from 5 to 60 s, so that
        a control plane that was away for long finds a handful of copies and not thousands."""
        name, at_s = self._path(report).name, now_s()
        due_s, pause_s = self._sent.get(name, (report["ended_at"] + FIRST_RESEND_S, 5.0))
        if at_s < due_s:
            return False
        self._sent[name] = (at_s + pause_s, min(60.0, 2 * pause_s))
        return True

    def _path(self, report: dict[str, Any]) -> Path:
        return self.folder / f"{report['step']}.{report['attempt']}.json"
