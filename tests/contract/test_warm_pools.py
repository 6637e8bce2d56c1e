"""Warm pools on real Redis and SQLite: topped up, taken once, followed to a new version. The test plays the nodes."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import redis

from hdcs_tasks.errors import Conflict, Invalid, NoCapacity, NotFound
from hdcs_tasks.reservations import PlaceRequest
from hdcs_tasks.store.models import Vm, now
from hdcs_tasks.vm import control_warm
from hdcs_tasks.vm.control_warm import warm_sweep
from tests.contract.test_scheduling import Center, center  # noqa: F401 - center is a fixture

pytestmark = pytest.mark.contract


def settled(center: Center) -> None:  # noqa: F811
    """Sweep until the pools have what they want; every started guest's agent answers."""
    for _ in range(6):
        warm_sweep(center.control)
        center.play()
        with center.control.transaction() as tx:
            for vm in tx.session.query(Vm).filter(Vm.state == "running", Vm.ready_at.is_(None)):
                vm.ready_at = now()
    assert warm_sweep(center.control) == 0


@pytest.fixture(params=["started", "saved"])
def pool(request: pytest.FixtureRequest, center: Center) -> Center:  # noqa: F811
    center.node("east", "node1", 4096)
    center.image()
    center.cloud.warm_pools.create("lab", image="mini", profile="tiny", size=3, saved=request.param == "saved")
    settled(center)
    return center


def warm(center: Center) -> dict[str, Any]:  # noqa: F811
    return center.cloud.warm_pools.show("lab")


def test_it_is_topped_up_and_shrinks(pool: Center) -> None:
    shown = warm(pool)
    assert (shown["ready"], len(shown["desktops"])) == (3, 3)
    assert set(shown["desktops"].values()) == {"saved" if shown["kept"] == "saved" else "running"}
    pool.cloud.warm_pools.set("lab", size=1)
    settled(pool)
    assert warm(pool)["ready"] == 1
    pool.cloud.warm_pools.delete("lab")
    warm_sweep(pool.control)
    pool.play()
    assert pool.cloud.vms.list() == []


def test_one_is_taken_and_another_made(pool: Center) -> None:
    before = {vm["id"] for vm in pool.cloud.vms.list()}
    wanted = {"name": "desk", "profile": "tiny", "owner": "ann", "tags": ["x"], "warm": True}
    operation = pool.cloud.vms.clone("mini", **wanted, idempotency_key="k")
    pool.play()
    assert operation.state == "done"
    vm = pool.cloud.vms["desk"].show()
    assert vm["id"] in before
    assert (vm["state"], vm["owner"], vm["tags"], vm["warm_pool"]) == ("running", "ann", ["x"], None)
    again = pool.cloud.vms.clone("mini", **wanted, idempotency_key="k")
    assert again.id == operation.id
    assert "vm.clone_on_node" not in [step["name"] for step in operation.show()["steps"]]
    settled(pool)
    assert warm(pool)["ready"] == 3
    assert "desk" not in warm(pool)["desktops"]


def test_the_taker_comes_before_the_next_one_is_made(pool: Center) -> None:
    """The boot of a new one would slow the start of the one that was taken down; where that one runs, nobody waits."""
    client = redis.Redis.from_url(pool.control.settings.redis_url)
    queue = f"{pool.control.settings.key_prefix}control"

    def asked_for() -> int:
        tasks = [json.loads(message)["headers"]["task"] for message in client.lrange(queue, 0, -1)]
        return tasks.count("vm.top_up_warm")

    before, saved = asked_for(), warm(pool)["kept"] == "saved"
    operation = pool.cloud.vms.clone("mini", name="desk", profile="tiny", warm=True)
    assert asked_for() - before == (0 if saved else 1)
    pool.play()
    assert (operation.state, asked_for() - before) == ("done", 1)


def test_more_than_there_are_come_cold(pool: Center) -> None:
    operation = pool.cloud.vms.clone("mini", name="d-{}", count=5, profile="tiny", warm=True)
    pool.play()
    shown = operation.show()
    assert shown["state"] == "done"
    cold = [child for child in shown["children"] if any(
        step["name"] == "vm.clone_on_node" for step in pool.cloud.operations[child["id"]].show()["steps"]
    )]  # fmt: skip
    assert (len(shown["children"]), len(cold)) == (5, 2)
    assert {f"d-{n}" for n in range(1, 6)} <= pool.running()


def test_a_dry_run_tells_which_ready_ones_are_taken(pool: Center) -> None:
    """What it says happens: the desktops it names are those that are given out, and the others are cloned."""
    kept = warm(pool)["kept"]
    before = {vm["id"]: vm["name"] for vm in pool.cloud.vms.list()}
    wanted: dict[str, Any] = {"name": "d-{}", "count": 5, "profile": "tiny", "warm": True}
    plan = pool.cloud.vms.clone("mini", dry_run=True, **wanted).explain()
    assert plan["fits"] and plan["message"].startswith("3 of 5 are taken ready from warm pools; east takes")
    assert [vm["warm_pool"] for vm in plan["vms"]] == ["lab"] * 3 + [None] * 2
    assert {vm["server_node"] for vm in plan["vms"]} == {"node1"}
    # Saved memory must be started, and layer two says where; one that runs stays.
    assert [vm["decision"] is not None for vm in plan["vms"][:3]] == [kept == "saved"] * 3
    assert {vm["id"]: vm["name"] for vm in pool.cloud.vms.list()} == before
    pool.cloud.vms.clone("mini", **wanted)
    pool.play()
    after = {vm["name"]: vm["id"] for vm in pool.cloud.vms.list()}
    assert [before.get(after[vm["name"]]) for vm in plan["vms"]] == [vm["was"] for vm in plan["vms"]]


def test_a_dry_run_of_saved_ones_without_room_says_so(center: Center) -> None:  # noqa: F811
    center.node("east", "node1", 256)
    center.image()
    center.cloud.warm_pools.create("lab", image="mini", profile="tiny", size=2, saved=True)
    settled(center)
    center.pool.place(PlaceRequest("east", "other", "s", 1, 128))
    plan = center.cloud.vms.clone("mini", name="d-{}", count=2, profile="tiny", warm=True, dry_run=True).explain()
    assert [vm["server_node"] for vm in plan["vms"]] == ["node1", None]
    assert not plan["fits"] and "node1 0 MiB free (1 of 2 VMs fit)" in plan["refusal"]["message"]


def test_nobody_gets_an_old_version_or_another_profile(pool: Center) -> None:
    old = set(warm(pool)["desktops"])
    pool.image()  # version 2
    operation = pool.cloud.vms.clone("mini", name="desk", profile="tiny", warm=True)
    pool.play()
    assert [step["name"] for step in operation.show()["steps"]] == ["vm.clone_on_node", "vm.start_on_node"]
    settled(pool)
    assert warm(pool)["ready"] == 3
    assert not old & set(warm(pool)["desktops"])
    other = pool.cloud.vms.clone("mini", name="other", profile="small", warm=True)
    assert other.show()["steps"][0]["name"] == "vm.clone_on_node"


def test_a_running_one_is_not_given_to_who_asks_for_a_place(center: Center) -> None:  # noqa: F811
    center.node("east", "node1", 4096)
    center.image()
    center.cloud.warm_pools.create("lab", image="mini", profile="tiny", size=1)
    settled(center)
    asked = center.cloud.vms.clone("mini", name="a", profile="tiny", warm=True, rules={"pin": "node1"})
    assert asked.show()["steps"][0]["name"] == "vm.clone_on_node"
    center.play()
    # One beside it is kept apart from tag x.
    center.clone("rests", tags=["x"])
    center.clone("shy", rules={"apart": ["x"]}, start=True)
    with pytest.raises(NoCapacity, match="kept apart from tag x"):
        center.cloud.vms.clone("mini", name="b", profile="tiny", warm=True, tags=["x"])
    assert center.cloud.vms.clone("mini", name="c", profile="tiny", warm=True).state == "done"


def test_two_sweeps_at_once_make_what_one_would(center: Center, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Both have seen the pool empty before either makes its first."""
    center.node("east", "node1", 4096)
    center.image()
    center.cloud.warm_pools.create("lab", image="mini", profile="tiny", size=3)
    both = threading.Barrier(2)
    carry_out = control_warm._carry_out

    def together(*given: Any) -> int:
        both.wait(60)
        return carry_out(*given)

    monkeypatch.setattr(control_warm, "_carry_out", together)
    with ThreadPoolExecutor(2) as sweeps:
        begun = [sweep.result() for sweep in [sweeps.submit(warm_sweep, center.control) for _ in range(2)]]
    assert (sum(begun), len(warm(center)["desktops"])) == (3, 3)
    monkeypatch.undo()
    settled(center)
    assert warm(center)["ready"] == 3


def test_it_is_left_in_peace(pool: Center) -> None:
    with pool.control.transaction() as tx:
        for vm in tx.session.query(Vm):
            vm.active_at, vm.observed_at = vm.created_at - timedelta(hours=1), now()
    pool.cloud.idle.create("all", stop=60)
    assert pool.cloud.idle.sweep() == []
    assert {row["exempt"][:17] for row in pool.cloud.idle.preview()} == {"of the warm pool "}
    for verb in ("stop", "start", "delete"):
        assert pool.cloud.vms.that_can(verb) == []


def test_a_broken_one_is_replaced(pool: Center) -> None:
    victim = min(warm(pool)["desktops"])
    pool.cloud.vms[victim].delete()
    pool.play()
    settled(pool)
    assert warm(pool)["ready"] == 3


def test_bad_pools(center: Center) -> None:  # noqa: F811
    center.node("east", "node1", 4096)
    center.image()
    make = center.cloud.warm_pools.create
    with pytest.raises(NotFound):
        make("x", image="nothing", profile="tiny", size=1)
    with pytest.raises(NotFound):
        make("x", image="mini", profile="nothing", size=1)
    with pytest.raises(Invalid, match="follows the newest"):
        make("x", image="mini:1", profile="tiny", size=1)
    with pytest.raises(Invalid):
        make("x", image="mini", profile="tiny", size=-1)
    make("x", image="mini", profile="tiny", size=0)
    with pytest.raises(Conflict):
        make("x", image="mini", profile="tiny", size=1)
