"""Second copies follow what is kept: what is pruned or deleted goes from them, and no kept point there breaks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup import control_drop, control_prune, node_copy
from hdcs_tasks.backup.control_copy import record_copy
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.errors import HypervisorRefused
from hdcs_tasks.hypervisor import storage
from hdcs_tasks.hypervisor.repository import Repository
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.node import Run
from hdcs_tasks.store.models import BackupCopy, DomainNode
from hdcs_tasks.vm import control_delete
from tests.contract.backup_place import REAL, Place
from tests.contract.desk import desk  # noqa: F401 - a fixture
from tests.contract.test_backup_control import place  # noqa: F401 - a fixture

pytestmark = pytest.mark.contract


@pytest.fixture
def west(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:  # noqa: F811
    """The storage of domain node west; node1 does its work, too."""
    root = tmp_path / "west"
    root.mkdir()
    storage.prepare(root, "west")
    with place.control.store.session() as session:
        session.add(DomainNode(name="west", token_key="k", port_first=21000, port_last=21999))

    def drop(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        there = run.ctx.settings.model_copy(update={"storage_root": root, "domain_node": "west"})
        return node_copy.drop(replace(run, ctx=replace(run.ctx, settings=there)), spec)

    monkeypatch.setitem(REAL, control_drop.DROP, drop)
    return Repository(root)


def copied(place: Place, west: Repository, *points: Any) -> None:  # noqa: F811
    """As a copy leaves it."""
    shutil.rmtree(west.folder)
    shutil.copytree(place.repository.folder, west.folder)
    with place.control.transaction() as tx:
        for point in points:
            record_copy(tx, point.id, "west", verified=True)


def held(place: Place, west: Repository, vm: str, *points: Any) -> list[bool]:  # noqa: F811
    """Which of the points are in west; record and storage say the same, and each can be restored."""
    there = {p.id for p in west.points(vm)}
    for point in west.points(vm):
        west.verify(point)
    with place.control.store.read() as session:
        recorded = {p.id for p in points if session.get(BackupCopy, (p.id, "west"))}
    assert recorded == there
    return [p.id in there for p in points]


def test_what_is_pruned_goes_from_the_copies(place: Place, west: Repository) -> None:  # noqa: F811
    vm = place.vm()
    points = [place.take("desk-01"), place.take("desk-01"), place.take("desk-01", full=True)]
    copied(place, west, *points)
    control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1))
    place.work("east", "west")
    assert held(place, west, vm, *points) == [False, False, True]


def test_a_copy_is_not_merged_and_keeps_what_a_kept_one_stands_on(place: Place, west: Repository) -> None:  # noqa: F811
    vm = place.vm()
    points = [place.take("desk-01") for _ in range(3)]
    copied(place, west, *points)
    control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1), merge=True)
    place.work("east", "west")
    assert [p.id for p in place.repository.points(vm)] == [points[2].id]
    assert held(place, west, vm, *points) == [True, True, True]
    backups.delete(place.control, points[2].id, Asked())
    place.work("east", "west")
    assert held(place, west, vm, *points) == [False, False, False]
    assert list(west.bases.folder.glob("*.qcow2")) == []


def test_of_a_vm_that_is_deleted_too_and_a_failure_is_made_good(place: Place, west: Repository) -> None:  # noqa: F811
    vm = place.vm()
    points = [place.take("desk-01", full=True) for _ in range(3)]
    copied(place, west, *points)
    control_delete.delete(place.control, "desk-01", Asked())
    place.work("east", "west", "east@node1.dq2", "east.quick@node1.dq2")
    assert held(place, west, vm, *points) == [True, True, True], "the backups of a deleted VM stay"
    place.fails[control_drop.DROP] = HypervisorRefused("no space")
    control_prune.prune(place.control, vm, Asked(), Keep(last=2))
    place.work("east", "west")
    assert held(place, west, vm, *points) == [True, True, True]
    place.fails.clear()
    backups.delete(place.control, points[1].id, Asked())
    place.work("east", "west")
    assert held(place, west, vm, *points) == [False, False, True]
