"""The list of kinds is what the code opens: none is missing, none is made up."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hdcs_tasks.errors import NotFound
from hdcs_tasks.operations.kinds import KINDS, check_kind
from hdcs_tasks.vm.rules import COMMANDS

ROOT = Path(__file__).resolve().parents[2] / "hdcs_tasks"
KIND = re.compile(r"(backup|image|pool|vm)\.(?!\w+_on_node)[a-z_]+")
CONTROL = [path for path in ROOT.rglob("control*.py")]


def opened() -> set[str]:
    """Kinds as literals: those given to ``open(…, asked=…)``, and those behind a name in a file that gives a name."""
    found = set()
    for path in CONTROL:
        tree = ast.parse(path.read_text())
        by_name = False
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if function == "open" and any(word.arg == "asked" for word in call.keywords):
                kind = call.args[0]
                by_name = by_name or isinstance(kind, ast.Name)
                found |= {kind.value} if isinstance(kind, ast.Constant) else set()
            elif function == "open_as_new":
                found |= {arg.value for arg in call.args if isinstance(arg, ast.Constant) and KIND.fullmatch(arg.value)}
        if by_name:
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign):
                    found |= {
                        each.value for each in ast.walk(node.value)
                        if isinstance(each, ast.Constant) and isinstance(each.value, str) and KIND.fullmatch(each.value)
                    }  # fmt: skip
    return {str(kind) for kind in found} | {f"vm.{verb}" for verb in COMMANDS}


def test_the_kinds_are_those_the_code_opens() -> None:
    assert set(KINDS) == opened()
    assert list(KINDS) == sorted(set(KINDS))


def test_an_unknown_kind_names_those_there_are() -> None:
    with pytest.raises(NotFound, match=r"there is no kind of operation 'vm\.clones'") as caught:
        check_kind("vm.clones")
    assert "Did you mean vm.clone" in caught.value.next and "image.import" in caught.value.next
    check_kind("vm.clone")
