"""The hdcs command where it needs no service: parsing, usage, formats, exit codes, speed, reference pages."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
import time_machine
from click.testing import CliRunner

from hdcs_tasks import errors
from hdcs_tasks.cli import main, output, reference, waiting
from hdcs_tasks.cli.failures import as_hdcs_error, several
from hdcs_tasks.cli.main import cli
from hdcs_tasks.cli.options import DURATION, SIZE, Selection

ROOT = Path(__file__).parents[2]
LEAVES = list(reference.leaves(cli))
NAMES = [" ".join(path) for path, _ in LEAVES]


class Reached(Exception):
    """The command got as far as asking for the cloud."""


def no_cloud() -> NoReturn:
    raise Reached


def parse(line: str) -> click.Context:
    """The context of the command in this line, its options converted; raises ClickException. Runs nothing."""
    words = shlex.split(line)
    context = cli.make_context("hdcs", words[1:])
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None and name is not None, line
        context = command.make_context(name, rest, parent=context)
    return context


# --- help and reference


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=NAMES)
def test_every_command_has_help_and_examples_that_parse(path: tuple[str, ...], command: click.Command) -> None:
    shown = CliRunner().invoke(cli, [*path, "--help"])
    assert shown.exit_code == 0
    assert "Examples:" in shown.output
    lines = reference.examples(command)
    assert lines
    for line in lines:
        # What follows the command in the shell (a pipe, a file) is the shell's.
        line = re.split(r" [|>] ", line)[0]
        assert parse(line).command is command, line


def test_every_option_says_what_it_does() -> None:
    silent = [
        f"{' '.join(path)} {option.opts[0]}" for path, command in LEAVES for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]  # fmt: skip
    assert silent == []


def test_hints_name_commands_that_exist() -> None:
    """Messages tell the reader to run ``hdcs noun verb``: each of them must be there."""
    nouns = set(cli.commands)
    hints = set()
    for file in [*ROOT.glob("hdcs_tasks/**/*.py"), *ROOT.glob("workers/*.py")]:
        hints |= set(re.findall(rf"\bhdcs ((?:{'|'.join(nouns)}) [a-z]+)", file.read_text()))
    assert len(hints) > 20
    unknown = [hint for hint in hints if hint not in NAMES and hint.split()[0] not in NAMES]
    assert unknown == []


@pytest.mark.parametrize("page", sorted(reference.PAGES))
def test_reference_pages_are_current(page: str) -> None:
    stored = (ROOT / "docs" / f"{page}.md").read_text()
    assert stored == reference.PAGES[page](), f"python -m hdcs_tasks.cli.reference {page} > docs/{page}.md"


def test_every_setting_says_what_it_is() -> None:
    rows = [line for line in reference.configuration_page().splitlines() if line.startswith("| `HDCS_")]
    assert len(rows) > 40
    assert [row for row in rows if row.split("|")[4].strip() in ("",) or row.split("|")[4].strip()[0] == "("] == []


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"], no_cloud) == 0
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared and capsys.readouterr().out == f"hdcs {declared[1]}\n"


def test_help_is_fast_and_loads_no_service() -> None:
    code = (
        "import sys\nfrom hdcs_tasks.cli.main import run\nassert run(['vm', 'clone', '--help']) == 0\n"
        "heavy = {'sqlalchemy', 'celery', 'kombu', 'redis', 'rich', 'pydantic', 'structlog'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    took = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        after = os.times()
        # CPU time: a busy machine makes the wall clock slow, not the command
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0, done.stderr
    assert min(took) < 0.5


def test_shell_completion_knows_the_verbs() -> None:
    environment = {"_HDCS_COMPLETE": "bash_complete", "COMP_WORDS": "hdcs vm s", "COMP_CWORD": "2", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-m", "hdcs_tasks.cli"], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    words = {line.partition(",")[2] for line in done.stdout.splitlines()}
    assert words == {"save", "show", "start", "stop", "suspend"}


# --- usage


@pytest.mark.parametrize(
    "line",
    [
        "", "vm", "nonsense", "vm nonsense", "vm clone", "vm clone mini", "vm show", "vm list -f yaml",
        "vm stop", "vm stop desk-1 --all", "backup create", "vm start a b --on node1", "vm stop a --grace soon",
        "vm start a --timeout 0", "profile create p --vcpus 1 --memory 12", "op list --limit 0", "vm delete",
        "node drain", "op cancel", "dashboard --port 0",
    ],
)  # fmt: skip
def test_usage_errors_end_with_2_before_any_service(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(line.split(), no_cloud) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "Usage: hdcs" in seen.err


@pytest.mark.parametrize(
    ("line", "option"),
    [("image import a a.vmdk --format vmdk", "--source-format"), ("image export a a.x --format vmdk", "--as"),
     ("vm export a a.x -f ova", "--as")],
)  # fmt: skip
def test_who_means_the_images_format_is_told_its_option(
    line: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(line.split(), no_cloud) == 2
    assert f"This is how to print; the image's format: {option}." in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "line",
    ["vm delete a", "vm stop a --force", "vm reboot a --force", "image delete mini", "backup delete 123456",
     "profile delete p", "node remove node1", "policy delete p", "storm delete s", "warm delete w", "quota drop anna",
     "idle delete p"],
)  # fmt: skip
def test_harm_in_a_pipe_needs_a_yes(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(line.split(), no_cloud) == 2
    assert "Add -y" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="reached"):
        main.run([*line.split(), "-y"], lambda: sys.exit("reached"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5s", 1.5), ("10m", 600), ("2h", 7200), ("7d", 604800), (5, 5)]
)
def test_durations(text: Any, seconds: float) -> None:
    assert DURATION.convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "m", "10w", "1e3", "nan"])
def test_no_durations(text: str) -> None:
    with pytest.raises(click.BadParameter):
        DURATION.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 2**29), ("20GiB", 20 * 2**30), ("20g", 20 * 2**30), ("1.5K", 1536), ("2GB", 2 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "512", "GiB", "-1GiB", "1PiB", "1 000MiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)


# --- errors and exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.HdcsError("x"), 1), (errors.HypervisorRefused("x"), 1), (errors.Cancelled("x"), 1),
        (errors.Invalid("x"), 2), (errors.NotFound("x"), 3), (errors.WrongState("x"), 4), (errors.Conflict("x"), 4),
        (errors.NoCapacity("x"), 5), (errors.Unreachable("x"), 6), (errors.RebuildPending("x"), 6),
        (errors.WaitTimedOut("x"), 7), (ValueError("x"), 1),
    ],
)  # fmt: skip
def test_exit_codes(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def connect() -> NoReturn:
        raise error

    assert main.run(["vm", "list"], connect) == code
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "x" in seen.err
    assert "Traceback" not in seen.err


def test_an_error_says_what_and_what_next(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def connect() -> NoReturn:
        raise errors.NoCapacity("no server node fits\x1b[2J", next="See: hdcs pool capacity small")

    main.run(["vm", "list"], connect)
    assert capsys.readouterr().err == "no server node fits\\x1b[2J. See: hdcs pool capacity small\n"
    monkeypatch.setenv("HDCS_DEBUG", "1")
    assert main.run(["vm", "list"], connect) == 5
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def connect() -> NoReturn:
        raise KeyboardInterrupt

    assert main.run(["vm", "list"], connect) == 130
    assert "hdcs op list --live" in capsys.readouterr().err


def test_errors_of_libraries_become_a_sentence() -> None:
    import kombu.exceptions
    import redis.exceptions
    import sqlalchemy.exc

    from hdcs_tasks.config import CapacitySettings, RateSettings, Settings

    class Special(redis.exceptions.ConnectionError):
        pass

    away = [Special("refused"), redis.exceptions.TimeoutError("slow"), kombu.exceptions.OperationalError("gone"),
            sqlalchemy.exc.OperationalError("SELECT", {}, Exception("no file"))]  # fmt: skip
    for error in away:
        assert type(as_hdcs_error(error)) is errors.Unreachable, error
    with pytest.raises(ValueError, match="port_first") as wrong:
        Settings(port_first=1)
    assert "HDCS_PORT_FIRST" in as_hdcs_error(wrong.value).message
    with pytest.raises(ValueError, match="ht_credit") as wrong:
        CapacitySettings(ht_credit=7)
    assert "HDCS_CAPACITY_HT_CREDIT" in as_hdcs_error(wrong.value).message
    with pytest.raises(ValueError, match="vcpu_hour") as other:
        RateSettings(vcpu_hour=-1)
    assert "HDCS_RATES_VCPU_HOUR" in as_hdcs_error(other.value).message
    assert as_hdcs_error(wrong.value).exit_code == 2
    assert as_hdcs_error(sqlalchemy.exc.NoSuchModuleError("nonsense")).exit_code == 2


def test_several_failures_keep_their_kind_when_they_share_it() -> None:
    full, busy = errors.NoCapacity("full"), errors.Conflict("busy", next="wait")
    assert several([("a", busy)], 1) is busy
    assert several([("a", full), ("b", errors.NoCapacity("full"))], 3).exit_code == 5
    mixed = several([("a", busy), ("b", full)], 4)
    assert mixed.exit_code == 1
    assert str(mixed) == "2 of 4 failed: a: busy; b: full. wait"


# --- output


ROWS = [
    {"name": "[red]a\x1b[0m", "memory_mib": 2048, "disk_bytes": None, "tags": ["x", "y"], "on": True, "note": "é,\n"},
    {"name": "b", "memory_mib": 512, "disk_bytes": 1536 * 2**20, "tags": [], "on": False, "note": None},
]


def test_a_table_is_human_and_never_obeys_data(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_rows(ROWS, output.columns("name", "memory_mib", "disk_bytes", "tags", "on"), "table")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "MEMORY", "DISK", "TAGS", "ON"]
    assert lines[1].split() == ["[red]a\\x1b[0m", "2", "GiB", "-", "x,", "y", "yes"]
    assert lines[2].split() == ["b", "512", "MiB", "1.5", "GiB", "-", "no"]


def test_a_table_in_a_pipe_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_rows([{"name": "x" * 500, "state": "up"}], output.columns("name", "state"), "table")
    assert f"{'x' * 500}  up\n" in capsys.readouterr().out


def test_json_and_csv_are_raw(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_rows(ROWS, output.columns("name"), "json")
    assert json.loads(capsys.readouterr().out) == ROWS
    output.print_rows(ROWS, output.columns("name"), "csv")
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert first["memory_mib"] == "2048"
    assert json.loads(first["tags"]) == ["x", "y"]
    assert first["note"] == "é,\n"
    assert (second["on"], second["disk_bytes"], second["note"]) == ("false", str(1536 * 2**20), "")


def test_an_empty_list_keeps_its_form(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output.columns("name", "state")
    seen = []
    for form in ("json", "csv", "table"):
        output.print_rows([], shown, form)
        seen.append(capsys.readouterr().out)
    assert seen == ["[]\n", "name,state\n", "NAME  STATE\n"]


def test_one_thing_by_field(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_one({"name": "a", "memory_mib": 1024, "ended_at": None, "eta_s": 125.0}, "table", hide=("name",))
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()] == [
        ["memory", "1 GiB"], ["ended", "at  -"], ["eta", "2 min 05 s"],
    ]  # fmt: skip


def test_moments_are_short_and_local_in_tables_and_whole_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        with time_machine.travel(datetime(2026, 11, 28, 3, 0, tzinfo=UTC).timestamp(), tick=False):
            monkeypatch.setenv("TZ", "JST-9")
            time.tzset()
            today, before = "2026-11-27T16:00:05.123456+00:00", "2026-11-27T14:59:59+00:00"
            row = {"at": today, "raised_at": before, "found": {"at": today, "late_s": 125, "disk_bytes": 2048}}
            assert (output.in_time(today), output.in_time(before)) == ("01:00:05", "2026-11-27 23:59")
            output.print_rows([row], output.columns("at", "raised_at", "found"), "table")
            shown = capsys.readouterr().out.splitlines()[1]
            assert shown.split("  ") == [
                "01:00:05",
                "2026-11-27 23:59",
                "at: 01:00:05, late_s: 2 min 05 s, disk_bytes: 2 KiB",
            ]
            output.print_rows([row], output.columns("at"), "json")
            assert json.loads(capsys.readouterr().out) == [row]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0.40 s"), (12.3, "12 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_for_humans(seconds: float | None, text: str) -> None:
    assert output.in_seconds(seconds) == text


# --- waiting


def view(**changed: Any) -> dict[str, Any]:
    return {
        "id": "1", "kind": "vm.start", "subject": "desk-1", "state": "running", "percent": 0.0, "phase": "p",
        "ended_at": None, "seconds": None, "error": None, "eta_s": None, "children": [],
    } | changed  # fmt: skip


def test_a_pipe_gets_a_line_per_change(capsys: pytest.CaptureFixture[str]) -> None:
    show = waiting._lines()
    for percent in (0.0, 4.0, 9.9, 10.0, 10.1, 55.0):
        show([view(percent=percent, eta_s=8.0)])
    show([view(state="failed", phase="failed", ended_at="x", seconds=2.0, error={"message": "no\x07room"})])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "vm.start desk-1 running 0 % p (8.00 s to go)",
        "vm.start desk-1 running 10 % p (8.00 s to go)",
        "vm.start desk-1 running 55 % p (8.00 s to go)",
        "vm.start desk-1 failed after 2.00 s (no\\x07room)",
    ]


def test_each_name_gets_its_own_key() -> None:
    keys: list[str | None] = []

    def ask(name: str, key: str | None) -> Any:
        keys.append(key)
        raise errors.WrongState(name)

    for chosen in (Selection(["a"], one=True), Selection(["a", "b"], one=False)):
        with pytest.raises(errors.WrongState):
            waiting.act(chosen, ask, key="k", form="json", wait=False, timeout_s=None)
    assert keys == ["k", "k:a", "k:b"]


def test_every_command_prints_json_too() -> None:
    def commands(group: click.Group) -> Iterator[click.Command]:
        for command in group.commands.values():
            if isinstance(command, click.Group):
                yield from commands(command)
            else:
                yield command

    without = [c.name for c in commands(main.cli) if "form" not in {parameter.name for parameter in c.params}]
    assert without == []
