"""The reference pages, written from the code: ``python -m hdcs_tasks.cli.reference cli|configuration``.

    python -m hdcs_tasks.cli.reference cli > docs/cli.md
    python -m hdcs_tasks.cli.reference configuration > docs/configuration.md

A unit test fails when a page is not what this prints.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from hdcs_tasks.cli.main import cli

_CLI_HEAD = """\
# The command line

*Written from the commands themselves (`python -m hdcs_tasks.cli.reference cli`); edit their texts, not this page.*

`hdcs NOUN VERB …` is a face on `hdcs_tasks.Cloud` and reads the same `HDCS_*` settings (`docs/configuration.md`). Run
it where the control plane's database is reached.

- **Output.** Data on stdout, messages on stderr. `-f table` shows human units; `-f json` and `-f csv` hold every field
  raw, with the unit in its name (`memory_mib`, `disk_bytes`, `eta_s`). A command that was given one name prints an
  object, one that was given several or a selector a list.
- **Waiting.** A command that opens an operation waits for its end: with live bars on a terminal, with a line per change
  in a pipe. `--no-wait` prints the operation's id instead; `--timeout 10m` stops waiting (exit code 7); Ctrl-C detaches
  (130). In both cases the operation goes on: `hdcs op watch ID`.
- **Many VMs.** Several names, or a selector: `--all`, `--tag`, `--home`, `--node`, `--owner`, `--state`. A selector
  chooses, of the VMs it describes, those the command can be given to as they are; one that chooses none is no failure.
- **Harm.** Deleting and forcing ask on a terminal; in a pipe they need `-y`.
- **Errors** say what, why and what to do next. `HDCS_DEBUG=1` adds the traceback.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | failed |
| 2 | usage: a bad name, option or setting |
| 3 | not found |
| 4 | conflict, or wrong state |
| 5 | no capacity |
| 6 | unreachable: Redis, the database or a server node |
| 7 | wait timed out; the operation goes on |
| 130 | detached by Ctrl-C; the operation goes on |

Completion of nouns, verbs and options, in the shell's start-up file:

```
eval "$(_HDCS_COMPLETE=bash_source hdcs)"         # ~/.bashrc
eval "$(_HDCS_COMPLETE=zsh_source hdcs)"          # ~/.zshrc
_HDCS_COMPLETE=fish_source hdcs | source          # ~/.config/fish/completions/hdcs.fish
```
"""

_CONFIGURATION_HEAD = """\
# Configuration

*Written from `hdcs_tasks/config.py` (`python -m hdcs_tasks.cli.reference configuration`); edit the fields there.*

Every setting is an environment variable, read once when a program starts. The unit stands in the name: `_S` seconds,
`_MIB` mebibytes, `_BYTES` bytes, `_PERCENT` percent. Control plane and server nodes read the same settings and each
uses its own.
"""

_TABLE_HEAD = ("| variable | default | unit | meaning |", "| --- | --- | --- | --- |")
_UNITS = (
    ("_mib", "MiB"),
    ("_bytes", "bytes"),
    ("_percent", "percent"),
    ("_s", "s"),
    ("_days", "days"),
    ("_hour", "per hour"),
    ("_month", "per 30 days"),
    ("mhz_per_vcpu", "MHz"),
)


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below ``group`` that does something, by its words, in order."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


def examples(command: click.Command) -> list[str]:
    """The example lines of a command's help."""
    _, _, shown = (command.help or "").partition("Examples:")
    return [line.strip() for line in shown.splitlines() if line.strip().startswith("hdcs ")]


def cli_page() -> str:
    """docs/cli.md."""
    parts = [_CLI_HEAD]
    noun = ""
    for path, command in leaves(cli):
        if path[0] != noun:
            noun = path[0]
            parts.append(f"\n## hdcs {noun}\n")
            if len(path) > 1:
                parts.append(f"\n{_prose(cli.commands[noun])}\n")
        parts.append(_command(path, command))
    return "".join(parts)


def _command(path: tuple[str, ...], command: click.Command) -> str:
    title = f"hdcs {' '.join(path)}"
    context = click.Context(command, info_name=title)
    usage = " ".join([title, *command.collect_usage_pieces(context)])
    heading = f"\n### {title}\n" if len(path) > 1 else ""
    shown = "\n".join(examples(command))
    return f"{heading}\n{_prose(command)}\n\n```\n{usage}\n```\n\n{_options(command, context)}```\n{shown}\n```\n"


def _prose(command: click.Command) -> str:
    text, _, _ = inspect.cleandoc(command.help or "").partition("\b")
    return text.strip()


def _options(command: click.Command, context: click.Context) -> str:
    rows = [p.get_help_record(context) for p in command.params if isinstance(p, click.Option)]
    lines = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in filter(None, rows)]
    return "\n".join(["| option | meaning |", "| --- | --- |", *lines, "", ""]) if lines else ""


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def configuration_page() -> str:
    """docs/configuration.md."""
    from pydantic_settings import BaseSettings

    from hdcs_tasks.config import AlarmSettings, CapacitySettings, KeepSettings, MetricsSettings, RateSettings, Settings

    tables: list[tuple[str, type[BaseSettings]]] = [
        ("Services, timing, network and nodes", Settings),
        ("Capacity", CapacitySettings),
        ("Alarms", AlarmSettings),
        ("Rates", RateSettings),
        ("Keeping", KeepSettings),
        ("Metrics", MetricsSettings),
    ]
    parts = [_CONFIGURATION_HEAD]
    for title, cls in tables:
        prefix = str(cls.model_config.get("env_prefix", ""))
        fields = [
            (name, field)
            for name, field in cls.model_fields.items()
            if name not in ("capacity", "alarm", "rates", "metrics", "keep")
        ]
        rows = [_setting(prefix + name.upper(), name, field) for name, field in fields]
        parts.append("\n".join(["", f"## {title}", "", *_TABLE_HEAD, *rows, ""]))
    return "".join(parts) + _CLI_VARIABLE


_CLI_VARIABLE = """
## The command line alone

| variable | default | unit | meaning |
| --- | --- | --- | --- |
| `HDCS_DEBUG` | `0` |  | `1` makes `hdcs` print the traceback of an error |
"""


def _setting(variable: str, name: str, field: Any) -> str:
    unit = next((unit for ending, unit in _UNITS if name.endswith(ending)), "")
    default = "" if field.default is None else str(field.default)
    choices = getattr(field.annotation, "__args__", ())
    texts = [choice for choice in choices if isinstance(choice, str)]
    meaning = field.description or ""
    if texts:
        meaning = f"{meaning}{': ' if meaning else ''}one of {', '.join(texts)}"
    limits = [text for rule in field.metadata if (text := _limit(rule))]
    if limits:
        meaning = f"{meaning} ({', '.join(limits)})".strip()
    return f"| `{variable}` | {f'`{default}`' if default else ''} | {unit} | {_cell(meaning)} |"


def _limit(rule: Any) -> str:
    """A bound of a field in words: ``at least 1``."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return next((f"{word} {getattr(rule, key)}" for key, word in words.items() if hasattr(rule, key)), "")


PAGES = {"cli": cli_page, "configuration": configuration_page}


def main(args: list[str]) -> int:
    """Print one page on stdout."""
    if len(args) != 1 or args[0] not in PAGES:
        sys.stderr.write(f"usage: python -m hdcs_tasks.cli.reference {'|'.join(PAGES)}\n")
        return 2
    sys.stdout.write(PAGES[args[0]]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
