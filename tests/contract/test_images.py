"""Images in and out on a real control plane with real files: what the record says, what is refused, what is left."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hdcs_tasks.errors import Conflict, HypervisorRefused, Invalid, NoCapacity, NotFound, Rejected
from hdcs_tasks.handles.operation import Operation
from hdcs_tasks.hypervisor.disks import compare
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.pool import profiles
from hdcs_tasks.states import ServerNodeState
from hdcs_tasks.store.models import ServerNode, Step
from tests.contract.conftest import _emptied
from tests.contract.desk import Desk, ago, desk  # noqa: F401 - desk is a fixture
from tests.contract.image_place import MIB, ImagePlace, tool

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img"),
]


BOTH = pytest.mark.parametrize("empty_database", ["sqlite", "postgresql"], indirect=True)
"""For what leans on the database; the others run on SQLite alone."""


NO_V2V = pytest.mark.skipif(shutil.which("virt-v2v") is not None, reason="virt-v2v is installed here")


@pytest.fixture
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path}/hdcs.sqlite"
    return _emptied(request.getfixturevalue("postgres_service"))


@pytest.fixture
def place(desk: Desk, tmp_path: Path) -> Iterator[ImagePlace]:  # noqa: F811
    made = ImagePlace(desk, tmp_path / "storage")
    yield made
    made.close()


def ended(place: ImagePlace, operation: Operation) -> dict[str, Any]:
    place.work()
    return operation.show()


# -- import


@BOTH
def test_layer_one_chooses_where_the_file_is(place: ImagePlace) -> None:
    """East has more free storage; the file lies in west's import folder alone."""
    source = place.file("disk.vmdk", "west", fmt="vmdk")
    shown = ended(place, place.images.import_("mini", "disk.vmdk"))
    assert shown["state"] == "done"
    assert [step["name"] for step in shown["steps"]] == ["image.import_on_node"] * 2
    assert shown["result"]["domain_node"] == "west"
    assert place.row()["copies"] == {"west": "ready"}
    assert compare(source, place.image(domain_node="west"))
    assert place.everything() == [
        "west/images/mini", "west/images/mini/1.qcow2"
    ], "nothing but the image"  # fmt: skip
    assert place.row()["sha256"] == hashlib.sha256(place.image(domain_node="west").read_bytes()).hexdigest()
    place.file("disk.vmdk", "east", fmt="vmdk")
    assert ended(place, place.images.import_("mini", "disk.vmdk"))["result"]["domain_node"] == "east"
    assert place.row(version=2)["copies"] == {"east": "ready"}


def test_a_file_that_is_nowhere_leaves_no_name(place: ImagePlace) -> None:
    shown = ended(place, place.images.import_("mini", "none.vdi"))
    assert (shown["state"], shown["error"]["code"]) == ("failed", "not_found")
    assert place.images.list() == [] and place.everything() == []
    place.file("none.vdi", fmt="vdi")
    assert ended(place, place.images.import_("mini", "none.vdi"))["state"] == "done"
    assert place.row()["version"] == 1, "the version was free again"


@BOTH
def test_a_full_storage_sends_it_to_the_next(place: ImagePlace) -> None:
    place.disk(place.outside / "d.qcow2")
    place.fails["image.import_on_node"] = NoCapacity("full")
    operation = place.images.import_("mini", str(place.outside / "d.qcow2"))
    assert place.work() == ["image.import_on_node"] * 2, "east, then west; there it waits"
    assert operation.state == "running"
    place.fails.clear()
    operation.cancel()
    recovery_sweep(place.control)
    assert operation.state == "cancelled"
    assert place.images.list() == []


def test_named_domain_nodes_get_copies(place: ImagePlace) -> None:
    operation = place.add(domain_nodes=("west", "east"))
    assert [step["name"] for step in operation.show()["steps"]] == ["image.import_on_node", "image.copy_on_node"]
    assert operation.show()["result"]["domain_node"] == "west", "the result is the import's"
    assert place.row()["copies"] == {"east": "ready", "west": "ready"}
    assert place.image().read_bytes() == place.image(domain_node="west").read_bytes()


def test_a_failed_copy_fails_the_import_and_leaves_what_is_there(place: ImagePlace) -> None:
    place.fails["image.copy_on_node"] = HypervisorRefused("no link")
    place.file("d.qcow2")
    shown = ended(place, place.images.import_("mini", "d.qcow2", domain_nodes=("east", "west")))
    assert shown["state"] == "failed"
    assert place.row()["copies"] == {"east": "ready", "west": "failed"}


@pytest.mark.parametrize("source_format", [None, "vhd"])
def test_an_import_of_a_server_nodes_own_path(place: ImagePlace, source_format: str | None) -> None:
    tool("qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", place.outside / "d.vhd", "8M")
    operation = place.images.import_("mini", str(place.outside / "d.vhd"), node="node3", format=source_format)
    assert ended(place, operation)["result"]["node"] == "node3"


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        ({"path": "/etc/passwd"}, Invalid, "HDCS_IMPORT_PATHS"), ({"path": "../x"}, Invalid, "without '..'"),
        ({"path": "/dev/sdb"}, Invalid, "--node NODE"), ({"path": "d", "format": "iso"}, Invalid, "Use raw"),
        ({"path": "d", "name": "../x"}, Invalid, "Use 1 to 63"), ({"path": "d", "disk": 0}, Invalid, "--disk 1"),
        ({"path": "d", "domain_nodes": ["north"]}, NotFound, "hdcs domain list"), ({"path": ""}, Invalid, "one file"),
        ({"path": "d.ova", "profile": "small"}, Conflict, "hdcs profile list"),
        ({"path": "d", "profile": "p1"}, Invalid, "only an OVA does. Leave --profile out, then: hdcs profile"),
        ({"path": "d.ova", "format": "qcow2", "profile": "p1"}, Invalid, "only an OVA does"),
        ({"path": "none"}, NotFound, "on server node node3: there is no file"),
        ({"path": "d", "format": "iso"}, Invalid, "Use raw, qcow2, vmdk, vdi, vhdx, vhd, ova"),
        ({"path": "d", "node": "node1", "domain_nodes": ["west"]}, Invalid, "Add --domain-node east"),
        ({"path": "a\nb"}, Invalid, "one file"),
        pytest.param({"path": "d", "drivers": True}, Invalid, "apt install virt-v2v", marks=NO_V2V),
    ],
)  # fmt: skip
def test_bad_imports_say_why(place: ImagePlace, wanted: dict[str, Any], error: type[Exception], words: str) -> None:
    place.file("d", fmt="qcow2")
    request = {"name": "mini"} | wanted
    with pytest.raises(error) as caught:
        operation = place.images.import_(**request)
        place.work()
        operation.result(timeout_s=1)
    assert words in str(caught.value)
    assert place.images.list() == [] and place.everything() == []


def test_a_strangers_overlay_on_another_vms_disk_is_refused(place: ImagePlace) -> None:
    """It lies inside of the storage, and yet is not theirs."""
    disk = place.disk(place.roots["east"] / "vms" / "d.qcow2")
    evil = place.roots["east"] / "import" / "evil.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "../vms/d.qcow2", "-F", "qcow2", evil)
    shown = ended(place, place.images.import_("mini", "evil.qcow2", domain_nodes=("east",)))
    assert shown["error"]["code"] == "invalid"
    assert "outside" in shown["error"]["message"]
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", evil)
    shown = ended(place, place.images.add("mini", str(evil), domain_nodes=("east",)))
    assert "outside" in shown["error"]["message"], "nor may it be added"
    assert place.everything() == []


def test_what_was_cut_off_on_its_way_becomes_no_image(place: ImagePlace) -> None:
    """Neither imported nor added; the refusal says where, why and what to do, and the next copy of it is taken."""
    path = place.file("d.qcow2")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - MIB // 2])
    for ask in (place.images.import_("mini", "d.qcow2", domain_nodes=("east",)),
                place.images.add("mini", str(path), domain_nodes=("east",))):  # fmt: skip
        shown = ended(place, ask)
        error = shown["children"][0]["error"] if shown["children"] else shown["error"]
        assert error["code"] == "invalid"
        assert error["message"].startswith(f"on server node node1: {path} is refused: it is cut off or damaged")
        assert "Copy it again" in error["next"]
    assert place.images.list() == [] and place.everything() == []
    path.write_bytes(whole)
    assert ended(place, place.images.import_("mini", "d.qcow2"))["state"] == "done"


def test_a_dry_run_tells_and_changes_nothing(place: ImagePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    place.file("d.vdi", fmt="vdi")
    looked: list[Operation] = []

    def result(operation: Operation, **_: Any) -> dict[str, Any]:
        looked.append(operation)
        place.work()
        return original(operation, timeout_s=5)

    original = Operation.result
    monkeypatch.setattr(Operation, "result", result)  # the test works where server nodes would meanwhile
    plan = place.images.import_("mini", "d.vdi", dry_run=True).explain()
    assert (plan["fits"], plan["version"], plan["domain_node"]) == (True, 1, "east")
    assert (plan["found"]["format"], plan["found"]["virtual_size_bytes"]) == ("vdi", 8 * MIB)
    assert [d["domain_node"] for d in plan["domain_nodes"]] == ["east", "west"]
    plan = place.images.import_("mini", "none", dry_run=True).explain()
    assert not plan["fits"] and plan["refusal"]["code"] == "not_found"
    assert place.images.list() == [] and place.everything() == []
    assert {operation.show()["kind"] for operation in looked} == {"image.probe"}


# -- OVA


def ova_of(place: ImagePlace, name: str = "office") -> Path:
    """An OVA as HDCS exports it, lying in east's import folder."""
    place.add(name)
    shown = ended(place, place.images.export(name, f"{name}.ova"))
    assert shown["state"] == "done", shown["error"]
    target = place.roots["east"] / "import" / f"{name}.ova"
    (place.roots["east"] / "export" / f"{name}.ova").rename(target)
    return target


@BOTH
def test_an_ovas_machine_becomes_a_profile(place: ImagePlace) -> None:
    ova_of(place)
    shown = ended(place, place.images.import_("desk", "office.ova", profile="like-office"))
    assert shown["state"] == "done", shown["error"]
    assert place.row("desk")["shape"]["vcpus"] == 2
    made = next(p for p in profiles.list_profiles(place.control) if p["name"] == "like-office")
    assert (made["vcpus"], made["memory_mib"], made["disk_bytes"]) == (2, 2048, 8 * MIB)
    assert shown["result"]["profile"]["vcpus"] == 2
    assert compare(place.image(name="office"), place.image(name="desk"))


def test_a_damaged_ova_is_refused(place: ImagePlace) -> None:
    path = ova_of(place)
    data = bytearray(path.read_bytes())
    at = data.index(b"KDMV") + 70_000
    data[at] ^= 1
    path.write_bytes(bytes(data))
    shown = ended(place, place.images.import_("desk", "office.ova"))
    assert "not what its manifest says" in shown["error"]["message"]


# -- export


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vmdk", "vdi", "vhdx", "vhd"])
def test_an_export_is_the_image(place: ImagePlace, fmt: str) -> None:
    place.add()
    shown = ended(place, place.images.export("mini", f"out.{fmt}"))
    assert shown["state"] == "done", shown["error"]
    target = place.roots["east"] / "export" / f"out.{fmt}"
    assert compare(place.image(), target, formats=("qcow2", {"vhd": "vpc"}.get(fmt, fmt)))
    manifest = json.loads(target.with_name(f"out.{fmt}.json").read_text())
    assert manifest["files"] == shown["result"]["files"]
    assert manifest["origin"] == {
        "image": "mini:1", "sha256": place.row()["sha256"], "domain_node": "east", "operation": shown["id"]
    }  # fmt: skip
    again = ended(place, place.images.export("mini", f"out.{fmt}"))
    assert again["error"]["code"] == "conflict" and "--force" in again["error"]["next"]
    assert ended(place, place.images.export("mini", f"out.{fmt}", force=True))["state"] == "done"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"path": "/etc/x.raw"}, "HDCS_EXPORT_PATHS"), ({"path": "/dev/sdb"}, "--node"),
        ({"path": "/dev/sdb", "node": "node1", "format": "vdi"}, "takes raw"), ({"path": "../x"}, "without '..'"),
        ({"path": "x", "format": "iso"}, "not known"), ({"path": "x.vdi", "compress": True}, "compressed"),
        ({"path": "x", "domain_node": "west"}, "hdcs image copy mini:1 west"), ({"path": "x", "node": "node3"}, "west"),
        ({"path": "/dev/hdcs-none", "node": "node1"}, "no device"), ({"path": "sub/x.raw"}, "no folder"),
        ({"path": "/dev/null", "node": "node1"}, "not a block device"),
    ],
)  # fmt: skip
def test_bad_exports_say_why(place: ImagePlace, wanted: dict[str, Any], words: str) -> None:
    place.add()
    before = place.everything()
    with pytest.raises(Rejected) as caught:
        operation = place.images.export("mini", **wanted)
        place.work()
        operation.result(timeout_s=1)
    assert words in str(caught.value)
    assert place.everything() == before


def test_an_export_leads_out_of_no_folder(place: ImagePlace) -> None:
    place.add()
    (place.outside / "link").symlink_to("/tmp")
    shown = ended(place, place.images.export("mini", str(place.outside / "link" / "hdcs-test-x.raw")))
    assert shown["error"]["code"] == "invalid" and "linked out" in shown["error"]["message"]


def test_an_export_whose_outcome_was_lost_is_not_written_again(place: ImagePlace) -> None:
    """The next attempt finds its own file whole: no Conflict with itself, and another's file is still one."""
    place.add()
    operation = place.images.export("mini", "out.raw")
    (message,) = place.desk.messages("east")
    context = place.contexts["east"]
    place.desk.nodes["here"] = context
    place.desk.work(message, place._handler("image.export_on_node"), "here")
    place.desk.messages("control")  # lost on the way; the node's spool has it, and is lost too
    first = (place.roots["east"] / "export" / "out.raw").stat().st_ino
    with place.control.store.session() as session:
        step = session.get_one(Step, message["step"])
        step.finished_seen_at = ago(3600)
    recovery_sweep(place.control)
    assert ended(place, operation)["state"] == "done"
    assert (place.roots["east"] / "export" / "out.raw").stat().st_ino == first


# -- publish


def test_what_a_killed_import_left_is_swept_by_the_next_attempt(place: ImagePlace) -> None:
    place.file("d.qcow2")
    operation = place.images.import_("mini", "d.qcow2", domain_nodes=("east",))
    folder = place.image().parent
    (folder / "1.qcow2.0.v2v").mkdir(parents=True)
    for name in ("1.qcow2.0.partial", "1.qcow2.0.v2v/mini-sda"):
        (folder / name).write_bytes(b"half")
    assert ended(place, operation)["state"] == "done"
    assert place.everything() == ["east/images/mini", "east/images/mini/1.qcow2"]


def test_a_cancelled_import_whose_worker_was_killed_leaves_nothing(place: ImagePlace) -> None:
    """Killed in the middle, then cancelled: the attempt that observes sweeps, and the operation is cancelled."""
    place.file("d.qcow2")
    operation = place.images.import_("mini", "d.qcow2", domain_nodes=("east",))
    (message,) = place.desk.messages("east")
    folder = place.image().parent
    folder.mkdir()
    (folder / "1.qcow2.1.partial").write_bytes(b"half")
    steps = place.control.reservations.steps
    assert steps.claim(message["step"], 1, "node1:1:dead", "node1", 0.05)
    with place.control.store.session() as session:
        session.get_one(Step, message["step"]).node = "node1"
    time.sleep(0.1)
    operation.cancel()
    recovery_sweep(place.control)
    place.before = lambda: recovery_sweep(place.control)  # it asks as soon as there is an executor
    place.work()
    assert operation.state == "cancelled", operation.show()
    assert place.everything() == [] and place.images.list() == []


def test_no_server_node_no_import(place: ImagePlace) -> None:
    with place.control.store.session() as session:
        for node in session.query(ServerNode):
            session.execute(ServerNode.__table__.update().where(  # type: ignore[attr-defined]
                ServerNode.name == node.name).values(state=ServerNodeState.LEFT))  # fmt: skip
    with pytest.raises(NoCapacity, match="east: no server node is up; west: no server node is up"):
        place.images.import_("mini", "d.qcow2")


def test_raw_needs_a_word(place: ImagePlace) -> None:
    (place.roots["east"] / "import" / "disk").write_bytes(b"x" * MIB)
    shown = ended(place, place.images.import_("mini", "disk", domain_nodes=("east",)))
    assert "--source-format raw" in shown["error"]["next"]
    assert ended(place, place.images.import_("mini", "disk", format="raw"))["state"] == "done"
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", place.roots["east"] / "import" / "disk",
                    place.image()], check=True)  # fmt: skip
