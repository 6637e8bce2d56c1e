"""The lab: comes up real, breaks as asked, and leaves nothing behind, not even after a kill -9 half-way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab import LOCAL, SRV, Lab, free_net
from deploy.lab.center import wait_for
from deploy.lab.space import marked, start_time
from hdcs_tasks.errors import Conflict, NotFound
from tests.lab.traces import NOTHING, left_by, namespaces

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("lab_possible")]
NET = free_net("10.95")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Lab]:
    made = Lab("small", tmp_path / "small", NET, {"east": ["node1", "node2"], "west": ["node3"]})
    made.up()
    try:
        yield made
    finally:
        made.down()


def test_up_answers_everywhere_and_down_leaves_nothing(tmp_path: Path) -> None:
    lab = Lab("whole", tmp_path / "whole", NET)
    try:
        seconds = lab.up()
        print(f"4 server nodes up in {seconds:.2f} s")
        uuids = set()
        for node in lab.nodes:
            capabilities = lab.run(node, ["virsh", "-q", "capabilities"]).stdout
            uuids.add(re.search(r"<uuid>(.+)</uuid>", capabilities)[1])  # type: ignore[index]
            ping = f"AUTH {lab.redis.password}\r\nPING\r\nQUIT\r\n"
            reach = (
                "import socket,sys; s=socket.create_connection((sys.argv[1],6390),3); s.sendall(sys.argv[2].encode())"
            )
            answer = f"{reach}; print(s.makefile().read())"
            assert "PONG" in lab.run(node, [sys.executable, "-c", answer, f"{NET}.2", ping]).stdout
            peer = lab.ip(lab.nodes[0])
            assert "qemu" in lab.run(node, ["virsh", "-q", "-c", f"qemu+tcp://{peer}/system", "uri"]).stdout
        assert len(uuids) == 4, "every server node is a host of its own"
        inside = namespaces(lab)
        assert len(inside) == 15
    finally:
        lab.down()
    assert left_by(lab, inside) == NOTHING


def test_storage_is_shared_inside_a_domain_node_only(small: Lab) -> None:
    small.run("node1", ["sh", "-c", f"echo shared >{SRV}/file; echo own >{LOCAL}/file"])
    assert small.run("node2", ["cat", f"{SRV}/file"]).stdout == "shared\n"
    assert small.run("node3", ["test", "-e", f"{SRV}/file"], check=False).returncode == 1
    assert small.run("node2", ["test", "-e", f"{LOCAL}/file"], check=False).returncode == 1
    assert (small.storage("east") / "file").read_text() == "shared\n"
    assert not SRV.exists() or not (SRV / "file").exists(), "nothing of it is seen on the machine itself"


def test_faults(small: Lab) -> None:
    pid = small.spawn("node2", ["sleep", "1000"])
    started = start_time(pid)
    assert _reaches(small, "node1", "node2")
    small.cut("node2")
    assert not _reaches(small, "node1", "node2")
    assert start_time(pid) == started, "a cut node runs on"
    small.mend("node2")
    assert _reaches(small, "node1", "node2", timeout_s=10)
    small.freeze("node2")
    wait_for("the node to hang", lambda: _state(pid) == "T", 60)  # on a busy machine a signal takes its time
    small.thaw("node2")
    small.run("node2", ["sh", "-c", f"echo kept >{LOCAL}/file"])
    small.power_off("node2")
    assert start_time(pid) == 0
    with pytest.raises(NotFound, match="node2 is off"):
        small.run("node2", ["true"])
    small.power_on("node2")
    assert small.run("node2", ["cat", f"{LOCAL}/file"]).stdout == "kept\n"
    assert _reaches(small, "node1", "node2", timeout_s=10)


def test_redis_keeps_what_it_wrote_and_libvirtd_comes_back(small: Lab) -> None:
    redis = pytest.importorskip("redis").Redis.from_url(small.redis.url)
    redis.set("key", "value")
    time.sleep(1.2)
    small.redis.kill()
    assert not small.redis.answers()
    small.redis.start(small.hub)
    assert redis.get("key") == b"value"
    assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    libvirtd = next(p for p, line in small.space("node1").processes() if line.startswith("libvirtd"))
    os.kill(libvirtd, signal.SIGKILL)
    time.sleep(0.5)
    assert "qemu" in small.run("node1", ["sh", "-c", "sleep 1; virsh -q uri"]).stdout


def test_what_is_spawned_ends_with_the_lab(small: Lab) -> None:
    on_node = small.spawn("node1", ["sleep", "1000"], log=small.root / "logs" / "x.log")
    here = small.spawn(None, ["sh", "-c", "env; exec sleep 1000"])
    time.sleep(0.2)
    assert "HDCS_DATABASE_URL" in small.log("control-sh").read_text()
    assert "HDCS_DATABASE_URL" not in small.env("node1"), "server nodes hold no database credentials"
    assert start_time(on_node)
    assert start_time(here)
    small.down()
    assert not start_time(on_node)
    assert not start_time(here)


@pytest.mark.parametrize("after_s", [0.02, 0.15, 0.4, 3])
def test_a_lab_killed_half_way_is_cleaned_by_the_next_up(tmp_path: Path, after_s: float) -> None:
    lab = Lab("killed", tmp_path / "killed", NET)
    code = "import sys, pathlib; from deploy.lab import Lab; print(flush=True); "
    code += "Lab('killed', pathlib.Path(sys.argv[1]), sys.argv[2]).up()"
    maker = subprocess.Popen([sys.executable, "-c", code, str(lab.root), NET], stdout=subprocess.PIPE)
    maker.stdout.readline()  # type: ignore[union-attr]
    time.sleep(after_s)
    maker.kill()
    maker.wait()
    left = list(marked(lab.mark))
    print(f"killed after {after_s} s: {len(left)} processes left")
    try:
        lab.up()
        assert not set(left) & set(marked(lab.mark))
        inside = namespaces(lab)
    finally:
        lab.down()
    assert left_by(lab, inside) == NOTHING


def test_it_refuses_a_net_in_use_and_a_folder_that_is_no_lab(small: Lab, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="which is in the lab's net"):
        Lab("other", tmp_path / "other", NET).up()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis").write_text("years of work")
    with pytest.raises(Conflict, match="not a lab's folder"):
        Lab("papers", tmp_path / "papers", "10.99.73").down()
    assert (tmp_path / "papers" / "thesis").exists()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _reaches(lab: Lab, node: str, other: str, timeout_s: float = 1) -> bool:
    argv = ["bash", "-c", f"exec 3<>/dev/tcp/{lab.ip(other)}/16509"]
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if lab.run(node, argv, timeout_s=1, check=False).returncode == 0:
                return True
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
