"""The walls: what each side of the house may load, at rest (import-linter) and at run time."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODE = ("workers.server_node", "workers.node_worker")
CONTROL = ("workers.control", "workers.metrics", "hdcs_tasks.cloud")
RECORD = ("sqlalchemy", "alembic", "psycopg", "sqlite3", "hdcs_tasks.store", "hdcs_tasks.operations.control")
WORLD = ("libvirt", "libvirtmod", "hdcs_tasks.hypervisor", "hdcs_tasks.operations.node")


def loaded_by(module: str) -> set[str]:
    """Every module in memory after this one was imported in a process of its own."""
    code = f"import sys, importlib; importlib.import_module({module!r}); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def below(modules: set[str], roots: tuple[str, ...]) -> list[str]:
    return sorted(m for m in modules if any(m == root or m.startswith(root + ".") for root in roots))


@pytest.mark.parametrize("module", [m for m in NODE if find_spec(m)])
def test_a_server_node_never_loads_the_record(module: str) -> None:
    assert below(loaded_by(module), RECORD) == []


@pytest.mark.parametrize("module", [m for m in CONTROL if find_spec(m)])
def test_the_control_plane_never_loads_the_hypervisor(module: str) -> None:
    assert below(loaded_by(module), WORLD) == []


def test_the_package_itself_is_neither_side() -> None:
    assert below(loaded_by("hdcs_tasks"), RECORD + WORLD) == []


def test_every_room_stands_behind_a_wall() -> None:
    """A room that is new must be named in pyproject's contracts, or nothing looks at its imports."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = [source for contract in contracts for source in contract.get("source_modules", [])]
    for path in sorted((ROOT / "hdcs_tasks").glob("*/*.py")):
        if path.parent.name == "cli":
            continue  # the words of a command line, not rooms
        if path.stem.startswith(("node", "control")) or path.stem == "rules":
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert any(fnmatch(module, source) for source in named), module


def test_import_contracts() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_state_columns_have_one_writer() -> None:
    """``.state = …`` stands in transitions.py only (records are born with a state, by keyword)."""
    writers = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "hdcs_tasks").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (".state = " in line and "session" not in line) or 'setattr(record, "state"' in line
    ]
    assert [w.rpartition(":")[0] for w in writers] == ["hdcs_tasks/store/transitions.py"], writers
