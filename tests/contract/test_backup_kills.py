"""A worker killed in every step of backups that works on files: the next attempt ends it, and nothing is left over.

The steps run as on a server node, claimed and fenced in a real Redis, on real qcow2 files. What needs libvirt is killed
in ``tests/lab/test_backup_kills.py``.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hdcs_tasks.backup import node_chains, node_restore
from hdcs_tasks.hypervisor import disks
from hdcs_tasks.operations.node import Run
from hdcs_tasks.vm.node import remove_folder
from tests.contract.backup_place import Handler, Place
from tests.contract.desk import desk  # noqa: F401 - a fixture
from tests.contract.test_backup_control import place  # noqa: F401 - a fixture
from tests.kills import killed_at

pytestmark = pytest.mark.contract


@pytest.fixture(params=["sqlite"])
def empty_database(tmp_path: Path) -> str:
    """The record takes no part in these steps: one database is enough."""
    return f"sqlite:///{tmp_path}/hdcs.sqlite"


def attempt(place: Place, handler: Handler, spec: dict[str, Any], step: str, number: int) -> dict[str, Any]:  # noqa: F811
    """One attempt of a step, as the executor begins it."""
    ctx = place.desk.nodes["node1"]
    steps = ctx.reservations.steps
    holder = f"node1:{number}"
    steps.issue(step, number)
    steps.claim(step, number, holder, "node1", 60)
    run = Run(ctx, step, number, "op", holder, lambda _: None, time.monotonic() + 600, "east", time.monotonic() + 600)
    return handler(run, spec)


def killed_everywhere(
    place: Place, handler: Handler, prepare: Callable[[int], dict[str, Any]], good: Callable[[dict[str, Any]], None]  # noqa: F811
) -> list[str]:  # fmt: skip
    """For each point where the step changes the disk: a fresh start, a worker that dies there, and the next attempt."""
    died = []
    for number in itertools.count(1):
        spec = prepare(number)
        name = f"step-{handler.__name__}-{number}"
        event = killed_at(number, lambda: attempt(place, handler, spec, name, 1))  # noqa: B023 - it runs at once
        if event is not None:
            attempt(place, handler, spec, name, 2)
        good(spec)
        if event is None:
            print(f"{handler.__name__}: {len(died)} places to die at: {died}")
            assert len(died) >= 3
            return died
        died.append(event)
    raise AssertionError


def spec_of(place: Place, point_id: str) -> dict[str, Any]:  # noqa: F811
    row = place.row(point_id)
    return {"source_vm_id": row.vm_id, "chain": row.chain, "seq": row.seq, "point": row.id}


def test_restore(place: Place, tmp_path: Path) -> None:  # noqa: F811
    vm = place.vm()
    for number in range(2):
        place.write(vm, 10 + number, 100 + number)
        newest = place.take("desk-01")
    then = place.copy(vm, tmp_path / "then.raw")

    def prepare(number: int) -> dict[str, Any]:
        new = place.vm(f"back-{number}")
        remove_folder(place.layout.vm_dir(new))
        return spec_of(place, newest.id) | {"vm_id": new, "image": {"name": "mini", "version": 1}, "compare": True}

    def good(spec: dict[str, Any]) -> None:
        disk = place.layout.disk(spec["vm_id"])
        assert disks.compare(disk, then, formats=("qcow2", "raw"))
        assert [p.name for p in disk.parent.iterdir()] == [disk.name], "no partial file stays"

    killed_everywhere(place, node_restore.restore, prepare, good)


def test_prune_with_merges(place: Place, tmp_path: Path) -> None:  # noqa: F811
    vm = place.vm()
    points, moments = [], []
    for number in range(4):
        place.write(vm, 10 + number, 100 + number)
        points.append(place.take("desk-01"))
        moments.append(place.copy(vm, tmp_path / f"{number}.raw"))
    repository = place.repository
    kept = tmp_path / "kept"
    shutil.copytree(repository.folder / vm, kept)

    def prepare(_number: int) -> dict[str, Any]:
        shutil.rmtree(repository.folder / vm)
        shutil.copytree(kept, repository.folder / vm)
        chain = points[0].chain
        return {
            "vm_id": vm, "merge": [{"point": points[2].id, "below": None}],
            "drop": [{"point": points[n].id, "chain": chain, "seq": n + 1} for n in (1, 0)],
        }  # fmt: skip

    def good(_spec: dict[str, Any]) -> None:
        left = repository.points(vm)
        assert [p.id for p in left] == [points[2].id, points[3].id]
        for point, then in zip(left, moments[2:], strict=True):
            repository.verify(point)
            assert disks.compare(repository.file(point), then, formats=("qcow2", "raw"))
        assert list(repository.leftovers(vm)) == []
        assert len(list(repository.chain_folder(vm, points[0].chain).iterdir())) == 4

    killed_everywhere(place, node_chains.prune, prepare, good)


def test_delete(place: Place, tmp_path: Path) -> None:  # noqa: F811
    vm = place.vm()
    points = [place.take("desk-01") for _ in range(2)]
    kept = tmp_path / "kept"
    shutil.copytree(place.repository.folder, kept)

    def prepare(_number: int) -> dict[str, Any]:
        shutil.rmtree(place.repository.folder)
        shutil.copytree(kept, place.repository.folder)
        return spec_of(place, points[1].id)

    def good(_spec: dict[str, Any]) -> None:
        (left,) = place.repository.points(vm)
        place.repository.verify(left)
        assert list(place.repository.leftovers()) == []

    killed_everywhere(place, node_chains.delete, prepare, good)
