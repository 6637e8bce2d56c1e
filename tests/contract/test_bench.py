"""The benches themselves: what they count is right, on clusters of every odd kind, and their JSON stands alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.bench.dispatch import NOBODY, Dispatch
from tests.bench.placement_files import BadFileError, read_files
from tests.bench.report import judged, rates
from tests.services import RedisServer

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]


def node(name: str, vcpus: int, memory_mib: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "vcpus": vcpus, "memory_mib": memory_mib} | more


CLUSTERS: dict[str, tuple[list[dict[str, Any]], tuple[int, int], int, int]] = {
    # what, nodes, one request (vCPU, MiB), how many are asked, how many fit
    "one node": ([node("a", 8, 8192)], (1, 1024), 20, 8),
    "full": ([node("a", 4, 4096, used_vcpus=4, used_memory_mib=4096)], (1, 1), 5, 0),
    "over-used": ([node("a", 4, 4096, used_vcpus=6, used_memory_mib=9000), node("b", 2, 512)], (1, 256), 5, 2),
    "used": ([node("a", 8, 8192, used_vcpus=5, used_memory_mib=1024), node("b", 8, 2048)], (1, 512), 20, 3 + 4),
    "groups": ([node("a", 2, 9000, group="x"), node("b", 9, 2000, group="y"), node("c d", 1, 500, group="x y")],
               (1, 500), 20, 2 + 4 + 1),
    "huge and tiny": ([node("a", 512, 8388608), node("b", 1, 64)], (1, 64), 1000, 513),
    "all fit": ([node("a", 8, 8192)], (2, 512), 3, 3),
    "no node": ([], (1, 1), 3, 0),
    "nothing asked": ([node("a", 8, 8192)], (1, 1), 0, 0),
    "no memory": ([node("a", 8, 0), node("b", 0, 8192)], (1, 1), 3, 0),
    "many groups": ([node(f"n{i}", 2, 2048, group=f"g{i}") for i in range(120)], (1, 1024), 300, 240),
    "of all kinds": ([node("a", 256, 2**20, group="x", used_vcpus=250), node("a", 2, 1024, group="x"),
                      node("é|,", 8.0, 4096, group=7), node("", 1, 2**36, group=None)], (1, 512), 60, 6 + 2 + 8 + 1),
    "a huge one": ([node("a", 64, 65536)], (10**20, 10**20), 2, 0),
    "wide": ([node("a", 100_000, 2**30)], (70_000, 1024), 3, 0),
    "a thousand": ([node(f"n{i}", 1 + i % 3, 4096, group=f"g{i % 4}") for i in range(1000)], (3, 1024), 400, 333),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_cluster_from_a_file(kind: str, tmp_path: Path) -> None:
    nodes, (vcpus, memory_mib), asked, fit = CLUSTERS[kind]
    requests = [{"name": f"r{n}", "vcpus": vcpus, "memory_mib": memory_mib} for n in range(asked)]
    (tmp_path / "cluster.json").write_text(json.dumps({"nodes": nodes}))
    (tmp_path / "requests.json").write_text(json.dumps({"requests": requests}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "placement", "--json", "--cluster", str(tmp_path / "cluster.json"),
         "--requests", str(tmp_path / "requests.json")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    figures = {f["name"]: f for f in found["figures"]}
    assert found["bench"] == "placement"
    assert figures["vms_placed"]["value"] == fit
    assert figures["bound"]["value"] >= fit
    assert figures["decisions_per_s"]["value"] > 0 or not asked


BAD = {
    "not JSON": ("{", "is not JSON"),
    "no list": ('{"servers": []}', 'has no list "nodes"'),
    "a list": ("[1]", 'has no list "nodes"'),
    "not an object": ('{"nodes": [3]}', "nodes[0] is 3"),
    "no memory": ('{"nodes": [{"vcpus": 1}]}', "nodes[0] has no memory_mib"),
    "text": ('{"nodes": [{"vcpus": "2", "memory_mib": 3}]}', "vcpus is '2'"),
    "less than nothing": ('{"nodes": [{"vcpus": 1, "memory_mib": 3, "used_vcpus": -1}]}', "used_vcpus is -1"),
    "not a number": ('{"nodes": [{"vcpus": NaN, "memory_mib": 3}]}', "vcpus is nan"),
    "endless": ('{"nodes": [{"vcpus": Infinity, "memory_mib": 3}]}', "vcpus is inf"),
    "too much": ('{"nodes": [{"vcpus": 1, "memory_mib": 1e30}]}', "memory_mib is 1e+30, more than 68719476736"),
    "half": ('{"nodes": [{"vcpus": 1.5, "memory_mib": 3}]}', "vcpus is 1.5"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_told_as_such(kind: str, tmp_path: Path) -> None:
    text, says = BAD[kind]
    (tmp_path / "cluster.json").write_text(text)
    (tmp_path / "requests.json").write_text('{"requests": []}')
    with pytest.raises(BadFileError, match=re.escape(says)):
        read_files(tmp_path / "cluster.json", tmp_path / "requests.json")


def test_bad_requests_and_a_missing_file_are_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"nodes": []}')
    with pytest.raises(BadFileError, match="No such file"):
        read_files(tmp_path / "cluster.json", tmp_path / "requests.json")
    (tmp_path / "requests.json").write_text('{"requests": [{"vcpus": 0, "memory_mib": 1}]}')
    with pytest.raises(BadFileError, match=re.escape("requests[0]: vcpus is 0, not a whole number of at least 1")):
        read_files(tmp_path / "cluster.json", tmp_path / "requests.json")


def test_a_fan_out_is_complete(redis_service: RedisServer, tmp_path: Path) -> None:
    """What the bench times is all of it: every step issued, every message in the queue, each once."""
    bench = Dispatch(redis_service.url, tmp_path)
    bench.control.reservations._link.client.flushall()
    published_s, all_s = bench.many(40)
    queued: Any = bench.control.reservations._link.client.lrange(f"hdcs:{NOBODY}", 0, -1)
    ids = {json.loads(message)["headers"]["id"] for message in queued}
    assert len(queued) == len(ids) == 40
    assert 0 < published_s < all_s
    for task_id in ids:
        step, attempt = task_id.split(".")
        status = bench.control.reservations.steps.status(step)
        assert status is not None
        assert (status.attempt, status.holder) == (int(attempt), None)
    bench.control.store.dispose()


def test_rates_are_paired() -> None:
    """The median of the rounds' ratios, whatever one round did to both."""
    wait = threading.Event().wait  # unlike work, as long on a busy machine
    (base, one), (rate, ratio) = rates(5, lambda: wait(0.05) or 10, lambda: wait(0.05) or 20)
    assert one == 1.0
    assert base > 0 and rate > 0
    assert 1 < ratio < 4


def test_a_verdict() -> None:
    assert judged("a", 8, "per s", 10, 0.75, ">=").met
    assert not judged("a", 8, "per s", 10, 0.75, ">=", ratio=0.7).met
    assert judged("a", 0, "things", None, 0, "<=", "value").met
    assert not judged("a", 1, "things", None, 0, "<=", "value").met
