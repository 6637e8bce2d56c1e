"""Bad input, by Python callers and by plain Celery callers: a clear error, and nothing half-made left anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from deploy.lab.center import Center
from hdcs_tasks.app import make_app
from hdcs_tasks.errors import Conflict, HdcsError, Invalid, NoCapacity, NotFound, WrongState
from tests.lab.data_center import BOOT_S, add_image, picture, wait_idle

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Bad:
    """A bad request as both kinds of callers make it, and what its error says: what and why, and what next."""

    python: Callable[[Any], Any]
    task: str
    arguments: dict[str, Any]
    error: type[HdcsError]
    words: str
    next: str


REQUESTS = {
    "unknown VM": Bad(
        lambda cloud: cloud.vms["nobody"].start(), "vm.start", {"vm": "nobody"},
        NotFound, "there is no VM 'nobody'", "hdcs vm list",
    ),
    "VM name with ../": Bad(
        lambda cloud: cloud.vms.clone("plain", name="../etc", profile="tiny"),
        "vm.clone", {"image": "plain", "name": "../etc", "profile": "tiny"},
        Invalid, "'../etc' is not a valid VM name", "Use 1 to 63 of a-z",
    ),
    "VM name with XML": Bad(
        lambda cloud: cloud.vms.clone("plain", name="a</name><devices/>", profile="tiny"),
        "vm.clone", {"image": "plain", "name": "a</name><devices/>", "profile": "tiny"},
        Invalid, "'a</name><devices/>' is not a valid VM name", "Use 1 to 63 of a-z",
    ),
    "image name with ../": Bad(
        lambda cloud: cloud.images.add("../../etc", "/x"), "image.add", {"name": "../../etc", "path": "/x"},
        Invalid, "'../../etc' is not a valid image name", "Use 1 to 63 of a-z",
    ),
    "image name with XML": Bad(
        lambda cloud: cloud.images.add("<x/>", "/x"), "image.add", {"name": "<x/>", "path": "/x"},
        Invalid, "'<x/>' is not a valid image name", "Use 1 to 63 of a-z",
    ),
    "image path that is relative": Bad(
        lambda cloud: cloud.images.add("other", "../disk"), "image.add", {"name": "other", "path": "../disk"},
        Invalid, "'../disk' is not an absolute path", "give its full path",
    ),
    "unknown image": Bad(
        lambda cloud: cloud.vms.clone("nothing", name="new", profile="tiny"),
        "vm.clone", {"image": "nothing", "name": "new", "profile": "tiny"},
        NotFound, "there is no image 'nothing'", "hdcs image list",
    ),
    "unknown profile": Bad(
        lambda cloud: cloud.vms.clone("plain", name="new", profile="enormous"),
        "vm.clone", {"image": "plain", "name": "new", "profile": "enormous"},
        NotFound, "there is no profile 'enormous'", "Known: large, medium, small, tiny",
    ),
    "unknown domain node": Bad(
        lambda cloud: cloud.vms.clone("plain", name="new", profile="tiny", domain_node="north"),
        "vm.clone", {"image": "plain", "name": "new", "profile": "tiny", "domain_node": "north"},
        NotFound, "there is no domain node 'north'", "hdcs domain list",
    ),
    "profile larger than any node": Bad(
        lambda cloud: cloud.vms.clone("plain", name="new", profile="large"),
        "vm.clone", {"image": "plain", "name": "new", "profile": "large"},
        NoCapacity, "no domain node fits profile large (8 vCPU, ", "hdcs pool capacity large",
    ),
    "second VM of the name": Bad(
        lambda cloud: cloud.vms.clone("plain", name="off", profile="tiny"),
        "vm.clone", {"image": "plain", "name": "off", "profile": "tiny"},
        Conflict, "there is a VM named 'off' already", "hdcs vm list",
    ),
    "count of none": Bad(
        lambda cloud: cloud.vms.clone("plain", name="x-{}", count=0, profile="tiny"),
        "vm.clone", {"image": "plain", "name": "x-{}", "count": 0, "profile": "tiny"},
        Invalid, "a count of 0 is not between 1 and 10000", "Ask for 1 VM or more",
    ),
    "count without a number in the name": Bad(
        lambda cloud: cloud.vms.clone("plain", name="same", count=2, profile="tiny"),
        "vm.clone", {"image": "plain", "name": "same", "count": 2, "profile": "tiny"},
        Invalid, "2 VMs cannot all be named 'same'", "same-{:03d}",
    ),
    "name pattern with two fields": Bad(
        lambda cloud: cloud.vms.clone("plain", name="{}-{}", count=2, profile="tiny"),
        "vm.clone", {"image": "plain", "name": "{}-{}", "count": 2, "profile": "tiny"},
        Invalid, "'{}-{}' is not a name pattern", "desk-{:03d}",
    ),
    "stop of a stopped VM": Bad(
        lambda cloud: cloud.vms["off"].stop(), "vm.stop", {"vm": "off"},
        WrongState, "VM off is stopped: it cannot stop", "There is nothing to stop",
    ),
    "start of a running VM": Bad(
        lambda cloud: cloud.vms["on"].start(), "vm.start", {"vm": "on"},
        WrongState, "VM on is running: it cannot start", "There is nothing to start",
    ),
    "unknown backup": Bad(
        lambda cloud: cloud.backups.restore("no-such-backup", name="back"),
        "backup.restore", {"backup": "no-such-backup", "name": "back"},
        NotFound, "there is no backup 'no-such-backup'", "hdcs backup list",
    ),
    "disks by post-copy": Bad(
        lambda cloud: cloud.vms["on"].migrate(to="node3", postcopy=True),
        "vm.migrate", {"vm": "on", "to": "node3", "postcopy": True},
        Invalid, "post-copy moves memory only", "between domain nodes",
    ),
    "migrate a stopped VM inside its domain node": Bad(
        lambda cloud: cloud.vms["off"].migrate(to="node2"), "vm.migrate", {"vm": "off", "to": "node2"},
        WrongState, "VM off is stopped: it cannot migrate", "starts on any server node",
    ),
    "migrate to nowhere": Bad(
        lambda cloud: cloud.vms["on"].migrate(to="node9"), "vm.migrate", {"vm": "on", "to": "node9"},
        NotFound, "there is no server node 'node9'", "hdcs node list",
    ),
    "start on a server node of another domain node": Bad(
        lambda cloud: cloud.vms["off"].start(node="node3"), "vm.start", {"vm": "off", "node": "node3"},
        WrongState, "server node node3 is not of east", "hdcs vm migrate off",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def desks(center: Center) -> Center:
    """VM ``off`` is stopped, VM ``on`` runs and its agent answers; both of east."""
    add_image(center)
    for name in ("off", "on"):
        center.cloud.vms.clone("plain", name=name, profile="tiny", domain_node="east").result(timeout_s=120)
    center.cloud.vms["on"].start().result(timeout_s=120)
    center.cloud.vms["on"].wait_ready(timeout_s=BOOT_S)
    return center


@pytest.fixture
def unchanged(desks: Center) -> Iterator[Center]:
    """The data center; what the test does leaves no change in SQL, Redis, libvirt and storage."""
    wait_idle(desks)
    before = picture(desks)
    yield desks
    wait_idle(desks)
    assert picture(desks) == before


@pytest.fixture(scope="module")
def caller(center: Center) -> Celery:
    """A Celery caller that knows the broker and nothing else."""
    settings = center.cloud.control.settings
    return make_app(settings.model_copy(update={"database_url": "none://"}))


def ask(caller: Celery, task: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    answer = caller.send_task(task, kwargs=arguments, queue="control", **options).get(timeout=30)
    assert isinstance(answer, dict)
    return answer


def refused(request: Callable[[], Any]) -> HdcsError:
    """The error of a request, at once or as its operation's end."""
    with pytest.raises(HdcsError) as caught:
        request().result(timeout_s=120)
    return caught.value


@pytest.mark.parametrize("name", REQUESTS)
def test_a_python_caller_is_told_what_why_and_what_next(unchanged: Center, name: str) -> None:
    bad = REQUESTS[name]
    error = refused(lambda: bad.python(unchanged.cloud))
    assert type(error) is bad.error
    assert bad.words in error.message
    assert bad.next in error.next


def test_a_celery_caller_is_told_the_same(unchanged: Center, caller: Celery) -> None:
    for name, bad in REQUESTS.items():
        answer = ask(caller, bad.task, bad.arguments)
        assert set(answer) == {"error"}, f"{name}: {answer}"
        assert answer["error"]["code"] == bad.error.code, name
        assert bad.words in answer["error"]["message"], name
        assert bad.next in answer["error"]["next"], name


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("vm.start", {}, "vm"),
        ("vm.start", {"vm": "on", "colour": "red"}, "colour"),
        ("vm.start", {"vm": {"name": "on"}}, "vm"),
        ("vm.clone", {"image": "plain", "name": ["a", "b"], "profile": "tiny"}, "name"),
        ("vm.clone", {"image": "plain", "name": "x-{}", "profile": "tiny", "count": "all"}, "count"),
    ],
)
def test_arguments_of_the_wrong_kind_are_told_to_a_celery_caller(
    unchanged: Center, caller: Celery, task: str, arguments: dict[str, Any], words: str
) -> None:
    error = ask(caller, task, arguments)["error"]
    assert error["code"] == "invalid"
    assert words in error["message"]
    assert error["next"]


def test_a_file_that_is_no_image_is_refused(unchanged: Center, tmp_path: Path) -> None:
    text = tmp_path / "letter.qcow2"
    text.write_text("Dear reader, this is no disk.\n" * 100)
    error = refused(lambda: unchanged.cloud.images.add("letter", str(text)))
    assert isinstance(error, Invalid), error
    assert str(text) in error.message and "not" in error.message
    assert error.next
    assert "letter" not in {image["name"] for image in unchanged.cloud.images.list()}


def test_an_image_file_that_is_not_there_is_refused(unchanged: Center, tmp_path: Path) -> None:
    error = refused(lambda: unchanged.cloud.images.add("ghost", str(tmp_path / "ghost.qcow2")))
    assert isinstance(error, NotFound), error
    assert str(tmp_path / "ghost.qcow2") in error.message
    assert error.next


@pytest.mark.parametrize("name", ["../north", "<north/>", "north/south", "control", "North", ""])
def test_a_domain_nodes_name_is_a_queues_name(unchanged: Center, name: str) -> None:
    with pytest.raises(Invalid, match="is not a valid domain node name") as caught:
        unchanged.cloud.domain_nodes.create(name)
    assert "Use 1 to 63 of a-z" in caught.value.next


def test_a_busy_vm_names_the_operation_in_the_way(desks: Center, caller: Celery) -> None:
    running = desks.cloud.vms["on"].migrate()
    try:
        for request in (
            desks.cloud.vms["on"].suspend,
            desks.cloud.vms["on"].stop,
            lambda: desks.cloud.backups.create("on"),
        ):
            with pytest.raises(Conflict) as caught:
                request()
            assert f"VM on is busy: operation {running.id} (vm.migrate, " in caught.value.message
            assert f"hdcs op watch {running.id}" in caught.value.next
            assert caught.value.details == {"operation": running.id}
        told = ask(caller, "vm.reboot", {"vm": "on"})["error"]
        assert told["code"] == "conflict" and running.id in told["message"]
    finally:
        desks.cloud.operations[running.id].result(timeout_s=120)


def test_asked_twice_with_one_key_is_done_once(desks: Center, caller: Celery) -> None:
    first = desks.cloud.vms["on"].suspend(idempotency_key="suspend-once")
    again = desks.cloud.vms["on"].suspend(idempotency_key="suspend-once")
    assert again.id == first.id
    first.result(timeout_s=120)
    assert desks.cloud.vms["on"].suspend(idempotency_key="suspend-once").id == first.id, "also when it has ended"
    answers = [ask(caller, "vm.resume", {"vm": "on"}, task_id="resume-once") for _ in range(2)]
    assert answers[0]["id"] == answers[1]["id"]
    desks.cloud.operations[answers[0]["id"]].result(timeout_s=120)
    assert desks.cloud.vms["on"].show()["state"] == "running"
    assert len(desks.cloud.operations.list(vm="on", kind="vm.resume")) == 1
