"""The demo as a program: killed half-way, begun again, interrupted; its file of figures is written all the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.lab import Lab
from deploy.lab.golden_image import build
from deploy.lab.space import marked
from tests.lab.traces import NOTHING, left_by, namespaces

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("lab_possible"), pytest.mark.timeout(400)]


def start_demo(labs: Path, output: Path, *argv: str) -> subprocess.Popen[bytes]:
    env = os.environ | {"HDCS_LAB_DIR": str(labs), "HDCS_LAB_CACHE": str(build().path.parent), "PYTHONUNBUFFERED": "1"}
    with output.open("wb") as out:
        return subprocess.Popen([sys.executable, "-m", "deploy.lab.demo", *argv], stdout=out, stderr=out, env=env)


def wait_for_line(demo: subprocess.Popen[bytes], output: Path, words: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while words not in output.read_text():
        assert demo.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)


def test_a_killed_demo_is_cleaned_by_the_next_and_an_interrupted_one_cleans_itself(tmp_path: Path) -> None:
    lab = Lab("demo", tmp_path / "labs" / "demo")
    first = start_demo(tmp_path / "labs", tmp_path / "first")
    try:
        wait_for_line(first, tmp_path / "first", "golden image added")
    finally:
        first.kill()
        first.wait()
    left = set(marked(lab.mark))
    assert len(left) > 20, "a killed demo leaves its data center behind"
    figures = tmp_path / "figures.json"
    second = start_demo(tmp_path / "labs", tmp_path / "second", "--json", str(figures))
    try:
        wait_for_line(second, tmp_path / "second", "joined by themselves")
        assert not left & set(marked(lab.mark)), "what the first left is gone"
        lab = Lab.load(lab.root)  # with the net it chose
        inside = namespaces(lab)
        second.send_signal(signal.SIGTERM)
        assert second.wait(30) == 1
    finally:
        second.kill()
        second.wait()
        lab.down()
    told = json.loads(figures.read_text())
    assert (told["ok"], told["error"]) == (False, "interrupted")
    assert [step["name"] for step in told["steps"]][:2] == ["data center up", "4 server nodes joined by themselves"]
    assert (tmp_path / "labs" / "demo-failed" / "control.log").is_file(), "its logs are kept"
    assert left_by(lab, inside) == NOTHING


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, tmp_path / "out", "--json", str(tmp_path / "nowhere" / "figures.json"))
    assert demo.wait(30) == 2
    assert "cannot be written: No such file or directory" in (tmp_path / "out").read_text()
    assert not (tmp_path / "demo").exists()
