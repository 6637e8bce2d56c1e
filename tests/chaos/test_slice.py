"""A slice of the long run, for every day: each kind of fault once, at least 24 acknowledged operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.lab import Lab
from hdcs_tasks.errors import Invalid
from tests.chaos.faults import KINDS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SEED = 24


def test_a_slice_of_chaos_leaves_nothing_wrong(tmp_path: Path) -> None:
    try:
        Lab.check()
    except Invalid as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    command = [sys.executable, "-m", "tests.chaos", "real", "--seed", str(SEED), "--operations", "24", "--json"]
    environment = os.environ | {"HDCS_LAB_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=880)
    assert done.stdout, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["violations"] == [], done.stderr[-8000:]
    assert done.returncode == 0
    assert found["operations"] >= 24
    assert set(found["faults"]) == set(KINDS), "every kind of fault at least once"
    assert found["errors"] == []
