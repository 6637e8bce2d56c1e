"""A worker killed at every place where it changes the disk, while it takes a point, copies points to another domain
node or sets a disk back, and while file systems are frozen: real guests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.lab import Lab
from deploy.lab.lab import SRV
from hdcs_tasks.hypervisor import storage
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.reservations.link import connect
from tests.lab.desks import open_host, put_image, running_desk
from tests.services import Missing, redis_server, require

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def test_the_next_attempt_ends_it_and_nothing_is_left(lab: Lab, golden_image: Path, tmp_path: Path) -> None:
    root = lab.storage("east")
    storage.prepare(root, "east")
    image = put_image(golden_image, root)
    try:
        with redis_server() as redis, open_host(lab, "node1") as host, running_desk(lab, host, image, 21501) as desk:
            Reservations(connect(redis.url)).epoch.open()
            desk.write("some", 2)
            storage.ensure_pools(host, storage.StorageLayout(SRV))
            (tmp_path / "west").mkdir()
            storage.prepare(tmp_path / "west", "west")
            facts = {
                "vm_id": desk.vm_id, "image": {"name": "mini", "version": 1, "sha256": image.sha256},
                "settings": {
                    "redis_url": redis.url, "storage_root": str(root), "state_dir": str(tmp_path / "state"),
                    "domain_node": "east", "server_node": "node1", "libvirt_uri": host.uri,
                },
                "west": {"domain_node": "west", "server_node": "node3"}, "west_root": str(tmp_path / "west"),
                "sources": [{"node": "node1", "address": lab.ip("node1")}],
            }  # fmt: skip
            file = tmp_path / "facts.json"
            file.write_text(json.dumps(facts))
            argv = [sys.executable, "-m", "tests.lab.killed_steps", str(file)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=800, check=False)
            shutil.rmtree(root / "backups" / desk.vm_id, ignore_errors=True)
    except Missing as error:
        require(error)
    assert done.returncode == 0, done.stderr[-6000:]
    died = json.loads(done.stdout)
    print(died)
    assert len(died["create"]) >= 5
    assert len(died["frozen"]) == 3
    assert len(died["fetch"]) >= 5
    assert len(died["restore_in_place"]) >= 5
