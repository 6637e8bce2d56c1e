"""The hdcs command on a real control plane (SQLite, Redis) without workers: what is accepted, refused and shown.

Where a test needs a step to end, it settles the outcome a server node would report, by control's own door.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import select

from hdcs_tasks.cli.main import run
from hdcs_tasks.cloud import Cloud
from hdcs_tasks.config import CapacitySettings, Settings
from hdcs_tasks.operations.recovery import settle
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool.profiles import ensure_built_in
from hdcs_tasks.pool.proof import JoinRequest
from hdcs_tasks.pool.rebuild import reservation_sweep
from hdcs_tasks.store.models import Step
from tests.services import RedisServer, free_port

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]
FACTS = {
    "cpu_mhz": 3000, "sockets": 1, "cores_per_socket": 4, "threads_per_core": 1, "max_vcpus": 0, "memory_mib": 8192,
}  # fmt: skip
STORAGE = {"total_bytes": 100 * 2**30, "free_bytes": 90 * 2**30}


@pytest.fixture
def config(redis_service: RedisServer, tmp_path: Path) -> Settings:
    redis.Redis.from_url(redis_service.url).flushall()
    return Settings(
        redis_url=redis_service.url, database_url=f"sqlite:///{tmp_path}/hdcs.sqlite", state_dir=tmp_path,
        capacity=CapacitySettings(host_reserve_mib=512, target_utilisation=1.0),
    )  # fmt: skip


@pytest.fixture
def cloud(config: Settings) -> Iterator[Cloud]:
    """Domain node east with server node node1, and image mini ready in its storage."""
    made = Cloud.from_settings(config)
    assert reservation_sweep(made.control) == "rebuilt"
    token = made.domain_nodes.create("east").token
    request = JoinRequest("east", "node1", "10.0.0.1", "i1", FACTS, STORAGE, time.time())
    pool_control.join(made.control, request.signed(token))
    ensure_built_in(made.control)
    added = made.images.add("mini", "/srv/mini.qcow2")
    answer(made, {"sha256": "0" * 64, "virtual_size_bytes": 2**30, "file_bytes": 2**20})
    assert added.state == "done"
    yield made
    made.control.store.dispose()


Result = tuple[int, str, str]
Hdcs = Callable[..., Result]


@pytest.fixture
def hdcs(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> Hdcs:
    """Run one command on this cloud: its exit code, stdout and stderr."""

    def call(*words: str) -> Result:
        capsys.readouterr()
        code = run(words, lambda: cloud)
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


def started(port: int = 20000, ip: str = "10.128.0.9") -> dict[str, Any]:
    return {"node": "node1", "port": port, "ip": ip}


def answer(cloud: Cloud, result: dict[str, Any] | None = None, error: dict[str, Any] | None = None) -> int:
    """Settle every published step as node1 would report it; how many there were."""
    steps = [
        step for shown in cloud.operations.list(live=True) for step in cloud.operations[shown["id"]].show()["steps"]
        if step["state"] == "published"
    ]  # fmt: skip
    for step in steps:
        report = {"step": step["id"], "attempt": step["attempt"], "node": "node1", "started_at": time.time() - 1,
                  "ended_at": time.time()}  # fmt: skip
        settle(cloud.control, report | ({"error": error} if error else {"result": result or started()}))
    return len(steps)


@pytest.fixture
def answering(cloud: Cloud) -> Iterator[None]:
    """A thread that settles whatever is published as done, until the test ends."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.1):
            answer(cloud)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


def clone(cloud: Cloud, *names: str, tag: str = "", start: bool = False) -> None:
    """VMs that are there: stopped, or running."""
    for name in names:
        cloud.vms.clone("mini", name=name, profile="tiny", tags=[tag] if tag else [], start=start)
        while answer(cloud):
            pass
        assert cloud.vms[name].show()["state"] == ("running" if start else "stopped")


# --- looking


def test_lists_and_shows(cloud: Cloud, hdcs: Hdcs) -> None:
    clone(cloud, "desk-1", tag="lab")
    for words, first in [
        (("node", "list"), "node1"), (("domain", "list"), "east"), (("vm", "list"), "desk-1"),
        (("image", "list"), "mini"), (("profile", "list"), "tiny"),
    ]:  # fmt: skip
        code, table, err = hdcs(*words)
        assert (code, err) == (0, "")
        assert first in [line.split()[0] for line in table.splitlines()[1:]]
        listed = json.loads(hdcs(*words, "-f", "json")[1])
        assert first in [row["name"] for row in listed]
        lines = list(csv.DictReader(io.StringIO(hdcs(*words, "-f", "csv")[1])))
        assert [row["name"] for row in lines] == [row["name"] for row in listed]
    assert json.loads(hdcs("vm", "show", "desk-1", "-f", "json")[1])["memory_mib"] == 128
    assert "128 MiB" in hdcs("vm", "show", "desk-1")[1]
    assert json.loads(hdcs("node", "show", "node1", "-f", "json")[1])["facts"] == FACTS
    assert json.loads(hdcs("domain", "show", "east", "-f", "json")[1])["server_nodes"] == ["node1"]
    assert hdcs("vm", "list", "--tag", "other", "-f", "json")[1] == "[]\n"
    assert hdcs("backup", "list", "-f", "csv")[1].startswith("id,vm_name")


def test_domain_tokens_are_data(hdcs: Hdcs) -> None:
    code, out, err = hdcs("domain", "create", "west", "-f", "json")
    made = json.loads(out)
    assert code == 0 and made["name"] == "west" and len(made["token"]) >= 32
    assert "only now" in err
    code, out, _ = hdcs("domain", "token", "west")
    assert code == 0 and len(out.strip()) >= 32 and out.strip() != made["token"]


def test_drain_resume_and_remove(cloud: Cloud, hdcs: Hdcs) -> None:
    shown = json.loads(hdcs("node", "drain", "node1", "-f", "json")[1])
    assert (shown["kind"], shown["state"]) == ("pool.drain", "done")
    assert cloud.server_nodes.show("node1")["state"] == "draining"
    assert json.loads(hdcs("node", "resume", "node1", "-f", "json")[1])[0]["state"] == "up"
    code, _, err = hdcs("node", "remove", "node1", "-y")
    assert code == 4 and "Stop its worker first" in err


def test_profiles(hdcs: Hdcs) -> None:
    code, out, _ = hdcs(
        "profile", "create", "office", "--vcpus", "2", "--memory", "3GiB", "--disk", "40GiB", "-f", "json"
    )
    made = json.loads(out)
    assert code == 0 and (made["memory_mib"], made["disk_bytes"]) == (3072, 40 * 2**30)
    assert hdcs("profile", "create", "office", "--vcpus", "2", "--memory", "3GiB")[0] == 4
    assert hdcs("profile", "create", "odd", "--vcpus", "2", "--memory", "1000GB")[0] == 2
    code, out, err = hdcs("profile", "delete", "office", "-y", "-f", "json")
    assert (code, json.loads(out)) == (0, [{"name": "office", "deleted": True}]) and "office is deleted" in err
    assert hdcs("profile", "delete", "office", "-y")[0] == 3


def test_capacity_and_events(hdcs: Hdcs) -> None:
    whole = json.loads(hdcs("pool", "capacity", "tiny", "-f", "json")[1])
    rows = list(csv.DictReader(io.StringIO(hdcs("pool", "capacity", "tiny", "-f", "csv")[1])))
    assert whole["vms"] > 0
    assert [(r["domain_node"], r["server_node"]) for r in rows] == [("east", "node1"), ("east", ""), ("", "")]
    assert {int(row["vms"]) for row in rows} == {whole["vms"]}
    assert hdcs("pool", "capacity", "nonsense")[0] == 3
    assert "joined east" in hdcs("pool", "events")[1]


def test_doctor(cloud: Cloud, hdcs: Hdcs) -> None:
    code, out, _ = hdcs("doctor", "-f", "json")
    assert code == 0 and all(check["ok"] for check in json.loads(out))
    pool_control.leave(cloud.control, "node1", "i1")
    code, out, _ = hdcs("doctor")
    assert code == 1 and "Start its worker" in out


# --- refusals


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("vm show nobody", 3, "no VM 'nobody'. Known: desk-1. See: hdcs vm list"),
        ("vm start nobody", 3, "no VM"),
        ("op show 123456", 3, "no operation"),
        ("op watch nonsense", 3, "no operation"),
        ("backup show 123456", 3, "no backup"),
        ("node show nobody", 3, "no server node"),
        ("domain show nobody", 3, "no domain node"),
        ("vm clone nothing --name a", 3, "no image"),
        ("vm clone mini --name a --profile nothing", 3, "no profile"),
        ("vm clone mini --name Bad_Name --profile tiny", 2, "not a valid VM name"),
        ("vm clone mini --name a --count 2 --profile tiny", 2, "{:03d}"),
        ("vm clone mini --name a --profile large", 5, "node1"),
        ("vm clone mini --name a --profile tiny --memory-overcommit 0", 2, "overcommit"),
        ("vm list --home eats", 3, "Did you mean east?"), ("vm stop --node nowhere", 3, "no server node"),
        ("vm list --state sleepy", 2, "Known: creating"),
        ("vm stop --state sleepy", 2, "Known: creating"),
        ("image add mini mini.qcow2", 2, "absolute path"),
        ("vm console desk-1", 4, "Start it: hdcs vm start desk-1"),
        ("vm stop desk-1", 4, "nothing to stop"),
        ("vm migrate desk-1", 4, "is stopped"),
        ("vm usb desk-1 maybe", 2, "USB policy"),
        ("vm wait desk-1 --timeout 0.1", 7, "guest agent"),
        ("image delete mini -y", 4, "desk-1"),
        ("op list --vm desk-2", 3, "there is no VM 'desk-2'. Did you mean desk-1?"),
        ("op list --kind vm.clones", 3, "Did you mean vm.clone"),
    ],
)  # fmt: skip
def test_refusals(cloud: Cloud, hdcs: Hdcs, line: str, code: int, words: str) -> None:
    clone(cloud, "desk-1")
    before = len(cloud.operations.list())
    seen = hdcs(*line.split())
    assert (seen[0], seen[1]) == (code, "")
    assert words in seen[2]
    assert len(cloud.operations.list()) == before, "a refusal opens no operation"


def test_a_busy_vm_is_a_conflict_that_names_the_operation(cloud: Cloud, hdcs: Hdcs) -> None:
    clone(cloud, "desk-1")
    operation = hdcs("vm", "start", "desk-1", "--no-wait")[1].strip()
    code, _, err = hdcs("vm", "start", "desk-1")
    assert code == 4
    code, _, err = hdcs("backup", "create", "desk-1")
    assert code == 4
    code, _, err = hdcs("vm", "stop", "desk-1")
    assert code == 4 and f"hdcs op cancel {operation}" in err


def test_without_settings_no_record_is_made_by_the_way(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HDCS_")}
    environment["PYTHONPATH"] = str(ROOT)
    asked = [sys.executable, "-m", "hdcs_tasks.cli", "vm", "list"]
    done = subprocess.run(asked, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 3 and list(tmp_path.iterdir()) == []
    assert "there is no record here" in done.stderr and "Set HDCS_DATABASE_URL" in done.stderr


def command(config: Settings, *words: str, **changed: str) -> subprocess.Popen[str]:
    """The real program, in its own process, with these settings."""
    environment = os.environ | {
        "HDCS_REDIS_URL": config.redis_url, "HDCS_DATABASE_URL": config.database_url, "HDCS_SWEEP_S": "5",
    } | changed  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "hdcs_tasks.cli", *words], env=environment, cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"HDCS_REDIS_URL": "redis://127.0.0.1:{port}/0"}, 6, "Redis"),
        ({"HDCS_DATABASE_URL": "postgresql://hdcs@127.0.0.1:{port}/hdcs"}, 6, "HDCS_DATABASE_URL"),
        ({"HDCS_DATABASE_URL": "sqlite:////nowhere/at/all.sqlite"}, 6, "database"),
        ({"HDCS_DATABASE_URL": "nonsense"}, 2, "HDCS_DATABASE_URL"),
        ({"HDCS_SWEEP_S": "often"}, 2, "HDCS_SWEEP_S"),
    ],
)
def test_what_is_away_or_wrong_is_a_sentence(
    config: Settings, cloud: Cloud, changed: dict[str, str], code: int, words: str
) -> None:
    closed = str(free_port())
    process = command(config, "node", "list", **{key: text.replace("{port}", closed) for key, text in changed.items()})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, ""), err
    assert words in err
    assert len(err.splitlines()) == 1, err


def test_the_program_itself(config: Settings, cloud: Cloud) -> None:
    clone(cloud, "desk-1")
    process = command(config, "vm", "list", "-f", "json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert [row["name"] for row in json.loads(out)] == ["desk-1"]


# --- accepted


def test_no_wait_prints_the_id_of_an_operation_that_is_there(cloud: Cloud, hdcs: Hdcs) -> None:
    code, out, err = hdcs(
        "vm", "clone", "mini", "--name", "desk-{:02d}", "--count", "3", "--profile", "tiny", "--no-wait"
    )
    assert (code, err) == (0, "")
    shown = cloud.operations[out.strip()].show()
    assert shown["kind"] == "vm.clone_many"
    assert [child["subject"] for child in shown["children"]] == ["desk-01", "desk-02", "desk-03"]


def test_the_same_key_is_the_same_operation(cloud: Cloud, hdcs: Hdcs) -> None:
    words = ("vm", "clone", "mini", "--name", "a", "--profile", "tiny", "--no-wait", "--idempotency-key", "k1")
    assert hdcs(*words)[1] == hdcs(*words)[1] != ""
    assert len(cloud.vms.list()) == 1
    code, out, err = hdcs("vm", "start", "a", "--no-wait", "--idempotency-key", "k1")
    assert (code, out) == (4, "") and "(vm.clone a, " in err and "hdcs op show" in err


def test_dry_run_tells_and_changes_nothing(cloud: Cloud, hdcs: Hdcs) -> None:
    words = ("vm", "clone", "mini", "--name", "a-{}", "--count", "2", "--profile", "tiny", "--dry-run")
    code, out, _ = hdcs(*words)
    rows = [line.split() for line in out.splitlines()[1:3]]
    assert code == 0 and rows == [["a-1", "east", "node1"], ["a-2", "east", "node1"]]
    assert "node1" in out.splitlines()[-1]  # every server node, and why or why not
    assert json.loads(hdcs(*words, "-f", "json")[1])["fits"] is True
    assert cloud.vms.list() == []


def test_a_ratio_of_nothing_is_refused(hdcs: Hdcs) -> None:
    code, _, err = hdcs("profile", "create", "thin", "--vcpus", "1", "--memory", "1GiB", "--memory-overcommit", "0")
    assert code == 2 and "memory_overcommit 0.0 is not a ratio above 0" in err
    code, _, err = hdcs("vm", "clone", "mini", "--name", "a", "--vcpu-overcommit", "0", "--dry-run")
    assert code == 2 and "vcpu_overcommit 0.0 is not a ratio above 0" in err
    code, _, err = hdcs("vm", "list", "--home", "eats")
    assert code == 3 and "Did you mean east?" in err


def test_a_refused_dry_run_still_explains(cloud: Cloud, hdcs: Hdcs) -> None:
    code, out, err = hdcs("vm", "clone", "mini", "--name", "a", "--profile", "large", "--dry-run")
    assert code == 5 and "node1" in out and "7680 MiB free" in out
    assert (
        "no domain node fits profile large (8 vCPU, 16715 MiB: 16384 guest + 331 overhead): east: node1 7680 MiB free"
        in err
    )


def test_op_list_show_and_cancel(cloud: Cloud, hdcs: Hdcs) -> None:
    clone(cloud, "desk-1")
    operation = hdcs("vm", "start", "desk-1", "--no-wait", "--reason", "because")[1].strip()
    live = json.loads(hdcs("op", "list", "--live", "-f", "json")[1])
    assert [row["id"] for row in live] == [operation]
    assert live[0]["reason"] == "because"
    table = hdcs("op", "show", operation[:8])[1]
    assert "vm.start_on_node" in table and "QUEUE" in table and "because" in table
    step = json.loads(hdcs("op", "show", operation, "-f", "json")[1])["steps"][0]
    assert (step["queue"], step["attempt"], step["state"]) == ("east", 1, "published")
    code, out, _ = hdcs("op", "cancel", operation, "-f", "json")
    assert code == 0 and json.loads(out)[0]["cancel_asked"] is True
    assert len(json.loads(hdcs("op", "list", "--vm", "desk-1", "--kind", "vm.start", "-f", "json")[1])) == 1
    assert json.loads(hdcs("op", "list", "--kind", "vm.stop", "-f", "json")[1]) == []


def test_op_show_tells_every_attempt(cloud: Cloud, hdcs: Hdcs) -> None:
    clone(cloud, "desk-1")
    operation = hdcs("vm", "start", "desk-1", "--no-wait")[1].strip()
    answer(cloud, error={"code": "hypervisor_refused", "message": "image is locked"})
    table = hdcs("op", "show", operation)[1]
    assert "hypervisor_refused: image is locked" in table and "node1" in table
    (row,) = [line.split() for line in table.splitlines() if "vm.start_on_node" in line]
    assert row[:6] == ["1", "vm.start_on_node", "east", "failed", "1", "node1"]
    assert 0.9 < float(row[row.index("s", 8) - 1]) < 5, "answer() began a second ago"
    code, out, err = hdcs("op", "watch", operation)
    assert code == 1 and "failed" in out and "image is locked" in err


def test_op_show_tells_an_attempt_whose_executor_was_lost(cloud: Cloud, hdcs: Hdcs) -> None:
    clone(cloud, "desk-1")
    operation = hdcs("vm", "start", "desk-1", "--no-wait")[1].strip()
    with cloud.control.store.session() as session:
        step = session.scalars(select(Step).where(Step.operation_id == operation)).one()
        lost = {"code": "outcome_unknown", "message": "executor lost"}
        step.history = [{"attempt": 1, "node": "node1", "ended_at": 1.0, "error": lost}]
        step.attempt = 2
    code, table, _ = hdcs("op", "show", operation)
    assert code == 0 and "executor lost" in table
