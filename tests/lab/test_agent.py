"""The node program from the domain node's storage: a server needs Debian's python3 and libvirt, nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from deploy.lab import SRV, Lab
from deploy.publish_agent import publish
from hdcs_tasks.errors import NotFound

pytestmark = pytest.mark.lab


def test_a_server_node_starts_what_was_published(lab: Lab, tmp_path: Path) -> None:
    env_file = tmp_path / "node.env"
    env_file.write_text(
        "# shared\nHDCS_KEY_PREFIX=shared:\nHDCS_SERVER_NODE=not-this\nPATH=/nowhere\nHDCS_X=$(touch /x)\n"
    )
    release = publish(lab.storage("west"), env_file)
    assert not release.reused
    agent = lab.storage("west") / "agent"
    assert stat.S_IMODE((agent / "node.env").stat().st_mode) == 0o600
    ready = lab.run("node3", [f"{SRV}/agent/hdcs-node", "--check"], {"PYTHONPATH": "/nowhere"})
    assert ready.stdout.startswith("ready: Celery 5.7")
    assert not (agent / "current" / "lib" / "sqlalchemy").exists(), "server nodes hold no database code"
    assert not (agent / "current" / "lib" / "pytest").exists()
    # the settings as the program sees them: the node's own environment wins, and no line is run as shell
    shown = lab.run(
        "node3", ["sh", "-c", f"sed 's/^exec .python -m.*/env/' {SRV}/agent/hdcs-node >{SRV}/agent/x; sh {SRV}/agent/x"]
    ).stdout.splitlines()
    assert "HDCS_KEY_PREFIX=shared:" in shown
    assert "HDCS_SERVER_NODE=node3" in shown
    assert "HDCS_X=$(touch /x)" in shown
    assert "PATH=/nowhere" not in shown


def test_publishing_again_reuses_and_old_releases_go(tmp_path: Path) -> None:
    first = publish(tmp_path)
    releases = tmp_path / "agent" / "releases"
    for number in range(4):
        (releases / f"old{number}").mkdir()
        os.utime(releases / f"old{number}", (number, number))
    again = publish(tmp_path)
    assert again.reused
    assert sorted(p.name for p in releases.iterdir()) == sorted([first.path.name, "old2", "old3"])
    assert (tmp_path / "agent" / "current").resolve() == first.path.resolve()


def test_a_server_without_a_release_or_libvirt_says_what_is_missing(lab: Lab, tmp_path: Path) -> None:
    publish(lab.storage("west"))
    node = lab.space("node4")
    hidden = "mount -t tmpfs none /run/libvirt"
    refused = node.run(["unshare", "-m", "sh", "-c", f"{hidden}; exec {SRV}/agent/hdcs-node --check"], check=False)
    assert refused.returncode == 2
    assert "apt-get install libvirt-daemon-system" in refused.stderr
    (lab.storage("west") / "agent" / "current").unlink()
    refused = node.run([f"{SRV}/agent/hdcs-node"], check=False)
    assert refused.returncode == 2
    assert "Run deploy/agent" in refused.stderr
    with pytest.raises(NotFound, match="is not a folder"):
        publish(tmp_path / "missing")
