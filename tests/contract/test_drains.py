"""Drains whose end an operator reads: several server nodes at once, and what is told of VMs that stay."""

from __future__ import annotations

from datetime import timedelta
from threading import Thread
from time import sleep

import pytest
from sqlalchemy import select

from hdcs_tasks.cli.main import run
from hdcs_tasks.errors import Cancelled, Conflict, HypervisorRefused, WrongState
from hdcs_tasks.operations.recovery import recovery_sweep
from hdcs_tasks.store.models import Step, now
from tests.contract.test_moves import Played, consistent, spread
from tests.contract.test_moves import center as center

pytestmark = pytest.mark.contract


def there(center: Played, node: str) -> list[str]:
    return [vm["name"] for vm in center.cloud.vms.list(server_node=node)]


def test_server_nodes_emptied_together_are_closed_before_the_first_move(center: Played) -> None:
    spread(center)
    center.node("east", "node5", 1024)
    before = {node: there(center, node) for node in ("node1", "node2")}
    plan = center.cloud.server_nodes.drain("node1", also=["node2"], dry_run=True).explain()
    assert [(vm["name"], vm["server_node"]) for vm in plan["vms"]] == [
        (name, "node5") for node in before for name in before[node]
    ]
    assert center.cloud.server_nodes.show("node2")["state"] == "up", "a dry run changes nothing"
    assert run(["node", "drain", "node1", "node2", "--no-wait"], lambda: center.cloud) == 0
    assert center.cloud.server_nodes.show("node2")["state"] == "draining"
    center.play()
    drains = {op["subject"]: op["result"] for op in center.cloud.operations.list(kind="pool.drain")}
    assert drains == {node: {"moved": before[node], "left": []} for node in before}
    assert sorted(there(center, "node5")) == ["a", "b", "c", "d"]
    consistent(center)


def test_where_all_are_emptied_together_nothing_goes_from_one_to_the_other(center: Played) -> None:
    spread(center)
    plan = center.cloud.server_nodes.drain("node1", also=["node2"], dry_run=True).explain()
    assert [vm["server_node"] for vm in plan["vms"]] == [None] * 4
    before = there(center, "node1")
    operation = center.cloud.server_nodes.drain("node1", also=["node2"])
    center.play()
    assert operation.state == "failed" and there(center, "node1") == before


def test_a_cancelled_drain_names_everybody_who_was_not_moved(center: Played) -> None:
    first, second = spread(center)
    operation = center.cloud.server_nodes.drain("node1", concurrency=1)
    operation.cancel()
    recovery_sweep(center.control)
    center.play()
    assert operation.state == "cancelled" and operation.show()["percent"] == 0
    with pytest.raises(Cancelled, match="2 of 2 VMs were not moved off node1") as caught:
        operation.result()
    assert caught.value.details["left"].keys() == {first, second}
    assert caught.value.details["left"][second] == "its turn had not come"
    assert second in caught.value.message and "stays closed" in caught.value.message
    assert "hdcs node resume node1" in caught.value.next
    consistent(center)


def test_a_drain_that_resume_ended_stays_where_it_was(center: Played) -> None:
    first, second = spread(center)
    operation = center.cloud.server_nodes.drain("node1", concurrency=1)
    center.cloud.server_nodes.resume("node1")
    center.play()
    with pytest.raises(Cancelled, match="1 of 2 VMs were not moved") as caught:
        operation.result()
    assert caught.value.details == {"moved": [first], "left": {second: "its turn had not come"}}
    assert "closed" not in str(caught.value) and operation.show()["percent"] == 50


def test_a_failed_drain_tells_of_each_or_where_to_read_it(center: Played, capsys: pytest.CaptureFixture[str]) -> None:
    names = [chr(ord("a") + n) for n in range(8)]
    for name in names:
        center.started(name)
    stay = there(center, "node1")
    operation = center.cloud.server_nodes.drain("node1", concurrency=1)
    while operation.state == "running":
        center.fails["vm.migrate_on_node"] = HypervisorRefused("QEMU said no")
        center.play_one()
    with pytest.raises(Conflict, match="4 of 4 VMs could not be moved off node1") as caught:
        operation.result()
    assert caught.value.message.endswith(f"and 1 more: hdcs op show {operation.id}")
    assert caught.value.details["left"] == dict.fromkeys(stay, "QEMU said no")
    capsys.readouterr()
    assert run(["op", "show", operation.id], lambda: center.cloud) == 0
    shown = capsys.readouterr().out
    told = {line.split()[0]: line for line in shown.splitlines() if line.split()[:1] and line.split()[0] in stay}
    assert told.keys() == set(stay) and all(line.endswith("QEMU said no") for line in told.values())


def test_a_move_tells_which_way_and_where_it_went(center: Played, capsys: pytest.CaptureFixture[str]) -> None:
    at = center.started("a")["server_node"]
    capsys.readouterr()
    assert run(["vm", "migrate", "a", "node3", "--dry-run"], lambda: center.cloud) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", "west", "node3", "move"]
    played = Thread(target=play_until_moved, args=(center,), daemon=True)
    played.start()
    assert run(["vm", "migrate", "a", "node3", "--timeout", "60s"], lambda: center.cloud) == 0
    played.join(60)
    assert capsys.readouterr().err.splitlines()[-1] == f"a: {at} -> node3, 900 ms, downtime 50 ms, 7 B"


def play_until_moved(center: Played) -> None:
    while center.vm("a")["home"] == "east" or center.cloud.operations.list(live=True):
        center.play()
        sleep(0.05)


def test_a_move_is_in_no_line_while_its_message_is_on_its_way(center: Played) -> None:
    center.started("a")
    operation = center.cloud.vms["a"].migrate()
    assert "line" not in operation.show() and operation.show()["phase"] == "vm.migrate_prepare_on_node"
    with center.control.store.session() as session:
        for step in session.scalars(select(Step).where(Step.operation_id == operation.id)):
            step.published_at = now() - timedelta(seconds=30)
    assert operation.show()["line"] == {"domain_node": "east", "place": 1, "of": 1}


def test_a_move_to_a_closed_server_node_is_refused_at_once(center: Played) -> None:
    center.started("a")
    for name in ("node1", "node2", "node4"):
        center.cloud.server_nodes.drain(name, move=False)
    closed = "node1" if center.vm("a")["server_node"] == "node2" else "node2"
    for to in (closed, "node4"):
        for dry_run in (True, False):
            with pytest.raises(WrongState, match=f"server node {to} is closed to VMs: it is draining") as caught:
                center.cloud.vms["a"].migrate(to, dry_run=dry_run)
            assert f"hdcs node resume {to}" in caught.value.next
    center.cloud.server_nodes.resume("node4")
    center.cloud.vms["a"].migrate("node4")
    center.play()
    assert center.vm("a")["server_node"] == "node4"


def test_what_is_refused_at_once_took_no_time(center: Played) -> None:
    spread(center)
    center.lose("node1")
    (child, *_) = center.cloud.server_nodes.drain("node1").show()["children"]
    assert child["state"] == "failed" and 0 <= child["seconds"] < 60
