"""The outcome spool: what a server node did, on its own disk until control has acknowledged it.

Hashes, downtimes and bytes cannot be observed afterwards, so an outcome must survive the death of worker and Redis.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hdcs_tasks.logs import logger

log = logger(__name__)


class Spool:
    """A folder of JSON files, one per (step, attempt)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
        reports = []
        for path in sorted(self.folder.glob("*.json"), key=_mtime):
            try:
                reports.append(json.loads(path.read_text()))
            except (OSError, ValueError) as error:
                log.error("spooled outcome unreadable", path=str(path), error=str(error))
        return reports

    def drop(self, report: dict[str, Any]) -> None:
        self._path(report).unlink(missing_ok=True)

    def _path(self, report: dict[str, Any]) -> Path:
        return self.folder / f"{report['step']}.{report['attempt']}.json"


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
