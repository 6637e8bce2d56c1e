"""Data on stdout as table, JSON or CSV; messages on stderr.

A table shows human units and the columns worth a glance; JSON and CSV hold every field raw, with the unit in its name
(``memory_mib``, ``disk_bytes``, ``ttl_s``).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]

PIPE_WIDTH = 100_000
"""Columns of a table in a pipe: nothing is cut or folded there."""


def plain(value: Any) -> str:
    """``value`` in one cell: '-' for nothing, and no control characters, which a terminal would obey."""
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_inside(str(key), item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return printable(str(value))


def _inside(key: str, value: Any) -> str:
    """A value inside another, in the human form of the unit in its key."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith("at")
    moment = isinstance(value, str) and (key == "at" or key.endswith("_at"))
    return column(key).show(value) if numeric or moment else plain(value)


def printable(text: str) -> str:
    """``text`` with each control character but line feed and tab made visible."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def in_bytes(value: Any) -> str:
    """Bytes in the largest binary unit that leaves at least 1: ``1.5 GiB``."""
    if value is None:
        return "-"
    size, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.1f}".removesuffix(".0") + f" {units[0]}"


def in_mib(value: Any) -> str:
    return "-" if value is None else in_bytes(value * 1024 * 1024)


def in_time(value: Any) -> str:
    """An ISO moment in the reader's own time zone: today's to the second, another day's to the minute."""
    if not value:
        return "-"
    at = datetime.fromisoformat(str(value)).astimezone()
    return f"{at:%H:%M:%S}" if at.date() == datetime.now().astimezone().date() else f"{at:%Y-%m-%d %H:%M}"


def in_seconds(value: Any) -> str:
    """A duration: ``0.42 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if value is None:
        return "-"
    seconds = float(value)
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def in_percent(value: Any) -> str:
    return "-" if value is None else f"{float(value):.0f} %"


def short_id(value: Any) -> str:
    """The first 8 characters of an id: enough to name it again."""
    return str(value)[:8] if value else "-"


@dataclass(frozen=True)
class Column:
    """A column of a table: its field, its heading, and how its value is shown."""

    key: str
    title: str = ""
    show: Callable[[Any], str] = plain

    @property
    def heading(self) -> str:
        return (self.title or self.key.replace("_", " ")).upper()


_SHOW_BY_UNIT: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("_bytes", in_bytes), ("_mib", in_mib), ("_at", in_time), ("_s", in_seconds), ("percent", in_percent),
)  # fmt: skip


def column(key: str, title: str = "") -> Column:
    """A column whose human form follows from the unit in its name."""
    by_name = {"seconds": in_seconds, "at": in_time}.get(key, plain)
    show = next((show for unit, show in _SHOW_BY_UNIT if key.endswith(unit)), by_name)
    heading = "took" if key == "seconds" and not title else title
    if not heading:
        heading = key.replace("_", " ")
        for unit in (" bytes", " mib", " s"):
            heading = heading.removesuffix(unit)
    return Column(key, heading, show)


def columns(*keys: str) -> tuple[Column, ...]:
    return tuple(column(key) for key in keys)


def print_rows(rows: Sequence[Row], shown: Sequence[Column], form: str) -> None:
    """Print a list: ``shown`` in a table; every field in JSON (a list of objects) and CSV (with a header line)."""
    if form == "json":
        print_json(list(rows))
    elif form == "csv":
        print_csv(rows, [c.key for c in shown])
    else:
        print_table(rows, shown)


def print_one(row: Row, form: str, *, hide: Iterable[str] = ()) -> None:
    """Print one thing: field and value line by line; JSON prints an object."""
    if form == "json":
        print_json(dict(row))
    elif form == "csv":
        print_csv([row], list(row))
    else:
        fields = [(column(key), value) for key, value in row.items() if key not in hide]
        pairs = [{"field": c.heading.lower(), "value": c.show(value)} for c, value in fields]
        print_table(pairs, (Column("field"), Column("value")), header=False)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, default=str)
    sys.stdout.write("\n")


def print_csv(rows: Sequence[Row], keys: Sequence[str]) -> None:
    """RFC 4180 lines: ``keys`` first, then whatever else the rows have; a nested value is JSON in its cell."""
    header = list(dict.fromkeys([*keys, *(key for row in rows for key in row)]))
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(header)
    for row in rows:
        out.writerow([_csv_cell(row.get(key)) for key in header])


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else value


def print_table(rows: Sequence[Row], shown: Sequence[Column], *, header: bool = True) -> None:
    """A plain table on stdout; as wide as the terminal, or as its content in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=header, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for c in shown:
        table.add_column(c.heading, overflow="fold")
    for row in rows:
        # Text, not str: a name such as [red] is data, never markup.
        table.add_row(*(Text(printable(c.show(row.get(c.key)))) for c in shown))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")


def message(text: str) -> None:
    """One message for the reader, on stderr."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()
