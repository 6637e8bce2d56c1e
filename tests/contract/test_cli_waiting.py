"""The hdcs command while it waits: progress in a pipe and on a terminal, Ctrl-C, time-outs, many at once."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import json
import os
import pty
import signal
import sys
from pathlib import Path

import pytest

from hdcs_tasks.cloud import Cloud
from hdcs_tasks.config import Settings
from hdcs_tasks.pool.rebuild import reservation_sweep
from tests.contract.test_cli import (  # noqa: F401 - fixtures
    ROOT,
    Hdcs,
    answer,
    answering,
    clone,
    cloud,
    command,
    config,
    hdcs,
    started,
)
from tests.services import RedisServer

pytestmark = pytest.mark.contract


# --- waiting


def test_waiting_for_the_end(cloud: Cloud, hdcs: Hdcs, answering: None) -> None:
    code, out, err = hdcs("vm", "clone", "mini", "--name", "desk-1", "--profile", "tiny", "--start", "-f", "json")
    final = json.loads(out)
    assert code == 0 and final["state"] == "done" and len(final["steps"]) == 2
    assert "vm.clone desk-1 running" in err and "vm.clone desk-1 done after" in err
    assert cloud.vms["desk-1"].show()["state"] == "running"
    code, out, _ = hdcs("vm", "stop", "desk-1")
    assert code == 0 and out.splitlines()[1].split()[1:4] == ["vm.stop", "desk-1", "done"]


def test_what_was_not_done_is_said(cloud: Cloud, hdcs: Hdcs, answering: None) -> None:
    clone(cloud, "a")
    code, _, err = hdcs("vm", "migrate", "a", "--offline")
    assert code == 0 and "a: it starts on any server node of its domain node" in err


def test_watching_a_parent_counts_its_children(cloud: Cloud, hdcs: Hdcs) -> None:
    clone(cloud, "a", "b")
    operation = hdcs("vm", "start", "a", "b", "--no-wait", "-f", "json")[1]
    (parent,) = json.loads(operation)
    answer(cloud)
    code, out, err = hdcs("op", "watch", parent["id"])
    assert code == 0
    assert [line.split()[2:4] for line in out.splitlines()[1:]] == [["a", "done"], ["b", "done"]]
    assert "vm.start_many" in err


def test_the_wait_may_time_out_and_the_operation_goes_on(cloud: Cloud, hdcs: Hdcs) -> None:
    clone(cloud, "desk-1")
    code, out, err = hdcs("vm", "start", "desk-1", "--timeout", "0.3", "-f", "json")
    view = json.loads(out)
    assert code == 7 and view["state"] == "running"
    assert f"hdcs op watch {view['id']}" in err
    assert cloud.operations[view["id"]].state == "running"


def test_ctrl_c_detaches_and_the_operation_goes_on(cloud: Cloud, config: Settings) -> None:
    clone(cloud, "desk-1")
    process = command(config, "vm", "start", "desk-1")
    assert process.stderr is not None
    assert "vm.start desk-1 running" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    (operation,) = cloud.operations.list(kind="vm.start")
    assert (process.returncode, out) == (130, "")
    assert f"hdcs op watch {operation['id']}" in err and f"hdcs op cancel {operation['id']}" in err
    assert operation["state"] == "running" and not operation["cancel_asked"]


def test_a_restart_of_redis_does_not_end_a_wait(tmp_path: Path, own_redis: RedisServer) -> None:
    config = Settings(redis_url=own_redis.url, database_url=f"sqlite:///{tmp_path}/hdcs.sqlite", state_dir=tmp_path)
    process = None
    try:
        cloud = Cloud.from_settings(config)
        reservation_sweep(cloud.control)
        cloud.domain_nodes.create("east")
        cloud.images.add("mini", "/srv/mini.qcow2")
        (operation,) = cloud.operations.list(kind="image.add_copy")
        process = command(config, "op", "watch", operation["id"])
        assert process.stderr is not None
        process.stderr.readline()
        own_redis.stop()
        assert "looking again" in process.stderr.readline()
        own_redis.start()
        answer(cloud, {"sha256": "0" * 64, "virtual_size_bytes": 2**30, "file_bytes": 2**20})
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and "done" in out, err
    finally:
        if process is not None:
            process.kill()
            process.wait()


# --- on a terminal


def on_a_terminal(config: Settings, words: list[str], question: bytes, answered: bytes) -> tuple[int, str]:
    """Run the program on a terminal of its own, type ``answered`` when ``question`` is there: exit code, screen."""
    environment = os.environ | {"HDCS_REDIS_URL": config.redis_url, "HDCS_DATABASE_URL": config.database_url}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-m", "hdcs_tasks.cli", *words], environment)
    screen = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        screen += data
        if answered and question in screen:
            os.write(terminal, answered)
            answered = b""
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), screen.decode()


def test_harm_is_asked_about_on_a_terminal(cloud: Cloud, config: Settings) -> None:
    clone(cloud, "desk-1")
    code, screen = on_a_terminal(config, ["vm", "delete", "desk-1"], b"[y/N]", b"n\n")
    assert code == 1 and "Delete VM desk-1 with its disk?" in screen and "nothing was done" in screen
    assert cloud.operations.list(kind="vm.delete") == []
    code, screen = on_a_terminal(config, ["vm", "delete", "desk-1", "--no-wait"], b"[y/N]", b"y\n")
    (operation,) = cloud.operations.list(kind="vm.delete")
    assert code == 0 and operation["id"] in screen


def test_a_terminal_shows_a_bar_and_ctrl_c_detaches(cloud: Cloud, config: Settings) -> None:
    clone(cloud, "desk-1")
    code, screen = on_a_terminal(config, ["vm", "start", "desk-1"], b"in line to start", b"\x03")
    assert code == 130 and "━" in screen and "detached: the operation goes on" in screen
    assert "Traceback" not in screen


# --- many at once


def test_a_selector_takes_those_the_command_can_be_given_to(cloud: Cloud, hdcs: Hdcs, answering: None) -> None:
    clone_now = [("a", "lab", True), ("b", "lab", False), ("c", "other", True)]
    for name, tag, start in clone_now:
        words = ["vm", "clone", "mini", "--name", name, "--profile", "tiny", "--tag", tag]
        assert hdcs(*words, *(["--start"] if start else []))[0] == 0
    code, out, _ = hdcs("vm", "stop", "--tag", "lab", "-f", "json")
    assert code == 0 and [view["subject"] for view in json.loads(out)] == ["a"]
    states = {vm["name"]: vm["state"] for vm in cloud.vms.list()}
    assert states == {"a": "stopped", "b": "stopped", "c": "running"}
    code, out, err = hdcs("vm", "stop", "--tag", "lab", "-f", "json")
    assert (code, out) == (0, "[]\n") and "nothing to do" in err
    code, out, _ = hdcs("vm", "start", "--home", "east", "-f", "json")
    (parent,) = json.loads(out)
    assert code == 0 and [child["subject"] for child in parent["children"]] == ["a", "b"]
    code, out, err = hdcs("vm", "start", "--all")
    assert (code, out) == (0, "")
    code, _, err = hdcs("vm", "delete", "--all")
    assert code == 2 and "Delete 3 VMs (a, b, c)" in err
    assert hdcs("vm", "delete", "--all", "-y")[0] == 0
    assert cloud.vms.list() == []


def test_one_refused_does_not_keep_the_others(cloud: Cloud, hdcs: Hdcs, answering: None) -> None:
    assert hdcs("vm", "clone", "mini", "--name", "a", "--profile", "tiny", "--start")[0] == 0
    code, out, err = hdcs("vm", "suspend", "a", "nobody", "-f", "json")
    assert code == 3
    assert [view["state"] for view in json.loads(out)] == ["done"]
    assert "1 of 2 failed: nobody" in err
    assert cloud.vms["a"].show()["state"] == "suspended"
    code, out, err = hdcs("vm", "suspend", "nobody", "noone", "-f", "csv")
    assert (code, out) == (3, "") and "2 of 2 failed" in err
