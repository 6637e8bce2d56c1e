"""Following operations to their end: a live bar on a terminal, a line per change in a pipe, both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hdcs_tasks.cli import output
from hdcs_tasks.cli.failures import Detached, several
from hdcs_tasks.cli.options import Selection
from hdcs_tasks.errors import HdcsError, OperationFailed, Unavailable, WaitTimedOut, from_dict

if TYPE_CHECKING:
    from hdcs_tasks.cloud import Operation

View = dict[str, Any]
Show = Callable[[list[View]], None]

LOOK_EVERY_S = 0.25
AWAY_S = 30.0
"""A control plane that does not answer for this long ends the wait; a restart of Redis takes less."""
CHILDREN_SHOWN = 6
SUMMARY = output.columns("id", "kind", "subject", "state", "seconds", "phase")


# --- opening


def each(names: Sequence[str], ask: Callable[[str], Operation]) -> tuple[list[Operation], list[tuple[str, HdcsError]]]:
    """Open one operation per name; a refused one does not keep the others from theirs."""
    opened: list[Operation] = []
    refused: list[tuple[str, HdcsError]] = []
    for name in names:
        try:
            opened.append(ask(name))
        except HdcsError as error:
            if len(names) == 1:
                raise
            output.message(f"{name}: {error}")
            refused.append((name, error))
    return opened, refused


def act(
    chosen: Selection, ask: Callable[[str, str | None], Operation], *, key: str | None, form: str, wait: bool,
    timeout_s: float | None,
) -> None:  # fmt: skip
    """Open an operation per chosen VM with ``ask(name, idempotency key)`` and conclude them.

    Of one key each VM gets its own: the same key would be answered with the first VM's operation.
    """
    if not chosen.names:
        nothing(form)
        return

    def one(name: str) -> Operation:
        return ask(name, key if key is None or chosen.one else f"{key}:{name}")

    opened, refused = each(chosen.names, one)
    conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=chosen.one, refused=refused)


def nothing(form: str) -> None:
    """A selector that selects nothing: an empty list, and no failure, so that a bulk can be repeated."""
    output.message("no VM that this can be done to is selected: nothing to do")
    if form != "table":
        output.print_rows([], SUMMARY, form)


def conclude(
    operations: Sequence[Operation], *, form: str, wait: bool, timeout_s: float | None, one: bool = True,
    refused: Sequence[tuple[str, HdcsError]] = (),
) -> list[View]:  # fmt: skip
    """Print what became of the operations, after waiting for their end unless told not to; those that ended, done.

    ``one``: print an object instead of a list. Raises what made them fail, WaitTimedOut or Detached.
    """
    if refused and not operations:
        raise several(list(refused), len(refused))
    if not wait:
        _print_accepted([operation.show() for operation in operations], form, one)
        if refused:
            raise several(list(refused), len(operations) + len(refused))
        return []
    stopped: HdcsError | None = None
    try:
        views = follow(operations, timeout_s)
    except (WaitTimedOut, Detached) as error:
        stopped, views = error, [operation.show() for operation in operations]
    if stopped is None or form != "table":
        _print_ended(views, form, one)
    for view in views:
        if view["state"] == "done" and (view["result"] or {}).get("why"):
            output.message(f"{view['subject']}: {view['result']['why']}")
    if stopped is not None:
        raise stopped
    failed = list(refused) + [(view["subject"], why) for view in views if (why := error_of(view))]
    if failed:
        raise several(failed, len(operations) + len(refused))
    return views


def _print_accepted(views: Sequence[View], form: str, one: bool) -> None:
    if form != "table":
        _print_ended(views, form, one)
        return
    for view in views:
        sys.stdout.write(f"{view['id']}\n")


def _print_ended(views: Sequence[View], form: str, one: bool) -> None:
    if form == "json" and one and len(views) == 1:
        output.print_json(views[0])
        return
    rows = [row for view in views for row in (view["children"] or [view])] if form == "table" else list(views)
    output.print_rows(rows, SUMMARY, form)


def error_of(view: View) -> HdcsError | None:
    """Why an ended operation is not done; None if it is."""
    if view["state"] == "done":
        return None
    if view["error"]:
        return from_dict(view["error"])
    return OperationFailed(f"operation {view['id']} ({view['kind']}) {view['state']}")


# --- following


def follow(operations: Sequence[Operation], timeout_s: float | None) -> list[View]:
    """Their views when all have ended. Raises WaitTimedOut after ``timeout_s`` (None: never), Detached on Ctrl-C."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        with _display() as show:
            while True:
                views = _look(operations, end)
                show(views)
                if all(view["ended_at"] for view in views):
                    return views
                if end is not None and time.monotonic() >= end:
                    raise _timed_out(views, timeout_s or 0.0)
                # Many operations are looked at less often: the record has other readers too.
                time.sleep(max(LOOK_EVERY_S, 0.005 * len(operations)))
    except KeyboardInterrupt:
        ids = [operation.id for operation in operations]
        raise Detached(
            f"detached: {'the operation goes' if len(ids) == 1 else f'the {len(ids)} operations go'} on",
            next=_how_to_watch(ids) + f"; cancel with: hdcs op cancel {_ids(ids)}",
        ) from None


def _look(operations: Sequence[Operation], end: float | None) -> list[View]:
    """Their views now, waiting out a control plane that is away for a moment."""
    since = time.monotonic()
    while True:
        try:
            return [operation.show() for operation in operations]
        except Unavailable as error:
            away_s = time.monotonic() - since
            if away_s >= AWAY_S or (end is not None and time.monotonic() >= end):
                raise
            output.message(f"{error.message}; looking again (the operation goes on)")
            time.sleep(2.0)


def _timed_out(views: Sequence[View], timeout_s: float) -> WaitTimedOut:
    going = [view for view in views if not view["ended_at"]]
    first = going[0]
    what = f"operation {first['id']} ({first['kind']} {first['subject']}, {first['phase']}) has"
    if len(going) > 1:
        what = f"{len(going)} of {len(views)} operations have"
    return WaitTimedOut(
        f"{what} not ended after {timeout_s:g} s and goes on", next=_how_to_watch([view["id"] for view in going])
    )


def _ids(ids: Sequence[str]) -> str:
    return " ".join(ids[:5]) + (" …" if len(ids) > 5 else "")


def _how_to_watch(ids: Sequence[str]) -> str:
    return f"Watch with: hdcs op watch {ids[0]}" if len(ids) == 1 else "Watch with: hdcs op list --live"


# --- showing


@contextmanager
def _display() -> Iterator[Show]:
    if sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


def _with_children(views: Sequence[View]) -> Iterator[View]:
    for view in views:
        yield from view["children"]
        yield view


def _lines() -> Show:
    """A line on stderr for each change of state or phase, and for each ten percent."""
    last: dict[str, tuple[Any, ...]] = {}

    def show(views: list[View]) -> None:
        for view in _with_children(views):
            # Who waits is told once: each that goes on would move everybody behind it.
            phase = "in line" if view.get("line") else view["phase"]
            now = (view["state"], phase, int(view["percent"] // 10))
            if last.get(view["id"]) != now:
                last[view["id"]] = now
                output.message(line_of(view))

    return show


def line_of(view: View) -> str:
    """One operation in one line: ``vm.start desk-01 running 45 % booting, 12 s to go``."""
    words = [view["kind"], view["subject"], view["state"]]
    if view["ended_at"]:
        words.append(f"after {output.in_seconds(view['seconds'])}")
        if view["error"]:
            words.append(f"({view['error'].get('message', '')})")
    else:
        words += [output.in_percent(view["percent"]), view["phase"]]
        if view.get("eta_s") is not None:
            words.append(f"({output.in_seconds(view['eta_s'])} to go)")
    return " ".join(str(word) for word in words if word)


@contextmanager
def _bars() -> Iterator[Show]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    layout = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
              TextColumn("{task.fields[phase]}"), TimeElapsedColumn())  # fmt: skip
    with Progress(*layout, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def show(views: list[View]) -> None:
            shown = list(_worth_a_bar(views))
            for gone in set(tasks) - {view["id"] for view in shown}:
                progress.remove_task(tasks.pop(gone))
            for view in shown:
                if view["id"] not in tasks:
                    title = escape(output.printable(f"{view['kind']} {view['subject']}"))
                    tasks[view["id"]] = progress.add_task(title, total=100.0, phase="")
                phase = escape(output.printable(_phase_of(view)))
                progress.update(tasks[view["id"]], completed=view["percent"], phase=phase)

        yield show


def _worth_a_bar(views: Sequence[View]) -> Iterator[View]:
    """Each operation, and the first few children at work; of very many operations those at work."""
    busy = [view for view in views if not view["ended_at"]] if len(views) > CHILDREN_SHOWN else list(views)
    for view in busy[: 2 * CHILDREN_SHOWN]:
        yield view
        yield from [child for child in view["children"] if child["state"] == "running"][:CHILDREN_SHOWN]


def _phase_of(view: View) -> str:
    children = view.get("children") or []
    if children:
        ended = sum(1 for child in children if child["ended_at"])
        failed = sum(1 for child in children if child["state"] in ("failed", "cancelled"))
        return f"{ended} of {len(children)}" + (f", {failed} failed" if failed else "") + _eta(view)
    return f"{view['phase']}{_eta(view)}"


def _eta(view: View) -> str:
    return f", {output.in_seconds(view['eta_s'])} to go" if view.get("eta_s") is not None else ""
