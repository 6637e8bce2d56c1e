"""A single disk out of a backup: a plain file of the storage's import folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from hdcs_tasks.backup import control_restore
from hdcs_tasks.errors import Invalid
from hdcs_tasks.hypervisor import disks
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.views import show
from hdcs_tasks.states import BackupState
from tests.contract.backup_place import Place
from tests.contract.desk import desk  # noqa: F401 - a fixture
from tests.contract.test_backup_control import place  # noqa: F401 - a fixture

pytestmark = pytest.mark.contract


def test_a_single_disk_comes_back_as_a_plain_file(place: Place, tmp_path: Path) -> None:  # noqa: F811
    vm = place.vm()
    place.take("desk-01")
    place.write(vm, 12, 7)
    backup, then = place.take("desk-01"), place.copy(vm, tmp_path / "then.raw")
    with pytest.raises(Invalid):
        control_restore.extract(place.control, backup.id, "../vms/x", Asked())
    operation = control_restore.extract(place.control, backup.id, "monday", Asked())
    place.work()
    found = show(place.control, operation.id)
    assert (found["state"], found["result"]["path"]) == ("done", "import/monday.qcow2")
    file = place.layout.path("import", "monday.qcow2")
    assert disks.compare(file, then, formats=("qcow2", "raw"))
    assert disks.probe(file).backing is None
    assert [p.name for p in file.parent.iterdir()] == ["monday.qcow2"]
    again = control_restore.extract(place.control, backup.id, "monday", Asked())
    place.work()
    assert show(place.control, again.id)["error"]["code"] == "conflict", "a file that is there is left alone"
    stored = place.repository.file(place.repository.get(vm, backup.id))
    stored.write_bytes(stored.read_bytes() + b"x")
    damaged = control_restore.extract(place.control, backup.id, "tuesday", Asked())
    place.work()
    assert show(place.control, damaged.id)["error"]["code"] == "backup_broken"
    assert place.row(backup.id).state is BackupState.BROKEN
    assert [p.name for p in file.parent.iterdir()] == ["monday.qcow2"]
