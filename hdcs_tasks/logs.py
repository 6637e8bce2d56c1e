"""Logs: structlog over the standard library; JSON under systemd, colour on a terminal, no secrets.

Every line tells which server node it comes from, and, inside a task, the task, operation, step and VM it is about
(``context_of``, bound by the base task). What looks like a secret is replaced before anything is written.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars as bound_contextvars

from hdcs_tasks.config import Settings

HIDDEN = "***"
_SECRET_KEY = re.compile(
    r"passw|secret|token|ticket|proof|credential|cookie|private_?key|(?:^|_)auth$|authorization", re.I
)
_SECRET_IN_TEXT = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@]*@", re.I), rf"\1{HIDDEN}@"),
    (re.compile(r"(\b(?:password|passwd|secret|token)\b['\"]?\s*[=:]\s*['\"]?)[^\s'\",;&}]+", re.I), rf"\1{HIDDEN}"),
)  # fmt: skip
_DESCRIBED = re.compile(r"(?:^| )(vm|op|node)=(\S+)")
_FIELD = {"op": "operation", "node": "server_node"}
_DEPTH_MAX = 4

Line = MutableMapping[str, Any]


def redact(_logger: Any, _method: str, line: Line) -> Line:
    """Replace what stands under a secret's name, passwords in URLs, and ``password=…`` inside any text."""
    for key, value in line.items():
        if not key.startswith("_"):
            line[key] = _clean(key, value, _DEPTH_MAX)
    return line


def _clean(key: str, value: Any, depth: int) -> Any:
    if value is not None and value != "" and _SECRET_KEY.search(key):
        return HIDDEN
    if isinstance(value, str):
        for pattern, clean in _SECRET_IN_TEXT:
            value = pattern.sub(clean, value)
        return value
    if depth and isinstance(value, Mapping):
        return {k: _clean(str(k), v, depth - 1) for k, v in value.items()}
    if depth and isinstance(value, list | tuple):
        return [_clean("", item, depth - 1) for item in value]
    return value


def _task_of_record(_logger: Any, _method: str, line: Line) -> Line:
    """Celery's own lines about a task carry its name, id and description (app.describe) aside."""
    data = getattr(line.get("_record"), "data", None)
    if isinstance(data, Mapping):
        for key, name in (("name", "task"), ("id", "task_id")):
            if isinstance(data.get(key), str):
                line.setdefault(name, data[key])
        described = data.get("kwargs")
        for name, value in _DESCRIBED.findall(described) if isinstance(described, str) else ():
            line.setdefault(_FIELD.get(name, name), value)
    return line


def context_of(task: str, task_id: str | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What lines logged inside a task tell of it: task, task_id, and operation, step, attempt, vm, server_node where
    its arguments say them."""
    spec = kwargs.get("spec") if isinstance(kwargs.get("spec"), Mapping) else {}
    shown = spec.get("shown") if isinstance(spec, Mapping) else None
    found: dict[str, Any] = {"task": task, "task_id": task_id}
    found |= {key: kwargs.get(key) for key in ("operation", "step", "attempt", "vm")}
    for message in ("report", "event", "sample"):
        if isinstance(inner := kwargs.get(message), Mapping):
            found |= {"step": inner.get("step"), "attempt": inner.get("attempt"), "server_node": inner.get("node")}
            found |= {key: inner[key] for key in ("operation", "vm") if inner.get(key)}
    if isinstance(shown, Mapping):
        found["vm"] = shown.get("vm", found["vm"])
    return {key: value for key, value in found.items() if isinstance(value, str | int)}


def to_journal() -> bool:
    """Whether stderr is systemd's journal: its device and inode stand in JOURNAL_STREAM."""
    try:
        seen = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{seen.st_dev}:{seen.st_ino}"


def as_json(config: Settings) -> bool:
    """JSON unless somebody reads along: under systemd, in a file or a pipe; ``log_format`` says otherwise."""
    return config.log_format == "json" or (config.log_format == "auto" and (to_journal() or not sys.stderr.isatty()))


def configure_logging(config: Settings) -> None:
    """Route standard-library and structlog records to one handler on stderr. Idempotent."""

    def where(_logger: Any, _method: str, line: Line) -> Line:
        if config.server_node:
            line.setdefault("server_node", config.server_node)
        return line

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        where,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(ensure_ascii=False, default=str) if as_json(config)
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )  # fmt: skip
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _task_of_record],
            # Last, over whatever was added before: nobody's line goes out without it.
            processors=[redact, structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.log_level)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


if not structlog.is_configured():
    # In a program that has not called configure_logging (a caller's own), the standard library's rules hold.
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level, structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info, redact, structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(), wrapper_class=structlog.stdlib.BoundLogger,
    )  # fmt: skip


def logger(name: str) -> structlog.stdlib.BoundLogger:
    log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return log
