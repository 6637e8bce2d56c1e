"""Scheduled storms on real Redis and SQLite: when they begin, what they open, what they tell."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hdcs_tasks import clock
from hdcs_tasks.errors import Conflict, Invalid, NotFound
from hdcs_tasks.monitor.control_samples import take_event
from hdcs_tasks.store.models import Storm
from hdcs_tasks.vm.control_ready import boots_s
from hdcs_tasks.vm.control_storm import storm_sweep
from tests.contract.test_scheduling import Center, center  # noqa: F401 - center is a fixture

pytestmark = pytest.mark.contract

MORNING = datetime(2026, 3, 11, 6, 0, tzinfo=UTC)  # a Wednesday


class Hand(clock.Clock):
    """A clock that stands still until it is set."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def now_s(self) -> float:
        return self.at.timestamp()


def ready(center: Center, at: datetime, *names: str) -> None:  # noqa: F811
    """The agents of these VMs are heard of."""
    for name in names:
        vm = center.cloud.vms[name].show()
        event = {"node": vm["server_node"], "vm_id": vm["id"], "kind": "agent_up", "at": at.timestamp(), "heard": True}
        take_event(center.control, event)


def test_a_storm_begins_early_enough_and_tells_who_was_ready(center: Center) -> None:  # noqa: F811
    hand = Hand(MORNING)
    with clock.driven_by(hand):
        center.node("east", "node1", 4096)
        center.image()
        for name in ("a1", "a2", "b1"):
            center.clone(name, tags=["class-a"] if name < "b" else [])
        made = center.cloud.storms.create("class-a", schedule="weekdays 09:00", selector={"tag": "class-a"}, lead_s=600)
        assert (made["next_at"], made["begins_at"]) == ("2026-03-11T09:00:00+00:00", "2026-03-11T08:50:00+00:00")
        hand.at = MORNING.replace(hour=8, minute=49)
        assert storm_sweep(center.control) == 0
        hand.at = MORNING.replace(hour=8, minute=50)
        assert storm_sweep(center.control) == 1
        assert storm_sweep(center.control) == 0
        center.play()
        assert center.running() == {"a1", "a2"}
        ready(center, MORNING.replace(hour=8, minute=55), "a1")
        ready(center, MORNING.replace(hour=9, minute=1), "a2")
        hand.at = MORNING.replace(hour=9, minute=2)
        storm_sweep(center.control)
        run = center.cloud.storms.show("class-a")["runs"][0]
        assert (run["wanted"], run["ready"], run["in_time"], run["closed"]) == (2, 2, 1, True)
        assert run["ready_at"]["a1"] == "2026-03-11T08:55:00+00:00"
        assert "1 of 2 desktops were ready" in next(
            e["message"] for e in center.cloud.events() if e["kind"] == "storm.ready"
        )
        assert center.cloud.storms.show("class-a")["next_at"] == "2026-03-12T09:00:00+00:00"


def test_the_lead_follows_the_last_run(center: Center) -> None:  # noqa: F811
    hand = Hand(MORNING)
    with clock.driven_by(hand):
        center.node("east", "node1", 4096)
        center.image()
        for name in ("a", "b"):
            center.clone(name)
        storm = center.cloud.storms.create("all", schedule="daily 09:00", selector={"home": "east"})
        assert storm["lead_by"] == "measured"
        hand.at = MORNING.replace(hour=9) - timedelta(seconds=storm["lead_s"])
        assert storm_sweep(center.control) == 1
        center.play()
        ready(center, hand.at + timedelta(seconds=400), "a", "b")
        hand.at = MORNING.replace(hour=9)
        storm_sweep(center.control)
        assert center.cloud.storms.show("all")["lead_s"] == 400 * 1.25 + 30


def test_the_lead_is_measured_by_the_starts_own_record(center: Center) -> None:  # noqa: F811
    """Neither a later start nor an agent that is seen again makes a storm that was over look slow."""
    hand = Hand(MORNING)
    with clock.driven_by(hand):
        center.node("east", "node1", 4096)
        center.image()
        for name in ("a", "b", "up"):
            center.clone(name, tags=["class"])
        center.cloud.vms["up"].start()
        center.play()
        ready(center, hand.at + timedelta(seconds=40), "up")
        hand.at += timedelta(minutes=10)
        center.cloud.storms.create("class", schedule="daily 09:00", selector={"tag": "class"})
        hand.at = MORNING.replace(hour=8, minute=30)
        center.cloud.storms.run("class")
        center.play()
        ready(center, hand.at + timedelta(seconds=30), "a")
        found = {"node": "node1", "kind": "agent_up", "at": (hand.at + timedelta(seconds=900)).timestamp()}
        for name in ("a", "up"):  # a worker that began anew finds them up
            take_event(center.control, found | {"vm_id": center.cloud.vms[name].show()["id"], "heard": False})
        ready(center, hand.at + timedelta(seconds=100), "b")
        ready(center, hand.at + timedelta(seconds=950), "a", "up")  # and they moved: their agents come up once more
        storm_sweep(center.control)
        run = center.cloud.storms.show("class")["runs"][0]
        assert (run["wanted"], run["ready"], run["started"], run["took_s"], run["closed"]) == (3, 3, 2, 100.0, True)
        assert run["ready_at"]["a"] == "2026-03-11T08:30:30+00:00"
        lead = center.cloud.storms.show("class")["lead_s"]
        hand.at += timedelta(hours=5)
        center.cloud.vms["a"].stop()
        center.play()
        center.cloud.vms["a"].start()
        center.play()
        ready(center, hand.at + timedelta(seconds=20), "a")
        assert center.cloud.storms.show("class")["lead_s"] == lead == 3 / 2 * 100 * 1.25 + 30
        with center.control.store.read() as session:
            assert sorted(boots_s(session, "east")) == [20.0, 30.0, 40.0, 100.0], "each start by its own agent's answer"


def test_clones_are_made_once_and_started_again(center: Center) -> None:  # noqa: F811
    hand = Hand(MORNING)
    with clock.driven_by(hand):
        center.node("east", "node1", 4096)
        center.image()
        clone = {"image": "mini", "count": 3, "name": "a-{:02d}", "profile": "tiny", "tag": "lab"}
        center.cloud.storms.create("class-a", schedule="daily 09:00", clone=clone, lead_s=0)
        hand.at = MORNING.replace(hour=9)
        storm_sweep(center.control)
        center.play()
        assert center.running() == {"a-01", "a-02", "a-03"}
        assert {vm["name"] for vm in center.cloud.vms.list(tag="lab")} == center.running()
        center.cloud.vms["a-02"].stop()
        center.cloud.vms["a-03"].delete()
        center.play()
        hand.at += timedelta(days=3)  # two moments missed: one run catches up
        assert storm_sweep(center.control) == 1
        assert storm_sweep(center.control) == 0
        center.play()
        assert len(center.running()) == 3
        assert center.cloud.storms.show("class-a")["runs"][0]["slot_at"] == "2026-03-14T09:00:00+00:00"


def test_as_many_as_fit_rather_than_none(center: Center) -> None:  # noqa: F811
    center.node("east", "node1", 2 * 128)
    center.image()
    clone = {"image": "mini", "count": 5, "name": "a-{:02d}", "profile": "tiny"}
    center.cloud.storms.create("class-a", schedule="daily 09:00", clone=clone)
    run = center.cloud.storms.run("class-a")["runs"][0]
    center.play()
    assert center.running() == {"a-01", "a-02"}
    assert (run["wanted"], len(run["vms"])) == (5, 2)
    assert "no domain node fits" in run["refused"]


def test_a_run_that_lost_its_process_is_opened_by_the_next_sweep(center: Center) -> None:  # noqa: F811
    center.node("east", "node1", 4096)
    center.image()
    center.clone("a")
    center.cloud.storms.create("all", schedule="daily 09:00", selector={"names": ["a"]})
    center.cloud.storms.run("all")
    with center.control.transaction() as tx:
        storm = tx.session.get_one(Storm, "all")
        opened = storm.runs[0]["operations"]
        storm.runs = [storm.runs[0] | {"opened": False, "operations": [], "vms": []}]
    storm_sweep(center.control)
    again = center.cloud.storms.show("all")["runs"][0]
    assert again["opened"] and len(center.cloud.operations.list(kind="vm.start_many")) == len(opened) == 1


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"schedule": "sometimes", "selector": {"tag": "a"}}, Invalid, "does not say when"),
    ({"schedule": "daily 09:00", "selector": {"home": "eats"}}, NotFound, "no domain node 'eats'"),
    ({"schedule": "daily 09:00", "selector": {"names": ["ghost"]}}, NotFound, "no VM 'ghost'"),
    ({"schedule": "daily 09:00"}, Invalid, "needs either"),
    ({"schedule": "daily 09:00", "selector": {"colour": "red"}}, Invalid, "not selected by 'colour'"),
    ({"schedule": "daily 09:00", "clone": {"image": "mini"}}, Invalid, "needs count, name"),
    ({"schedule": "daily 09:00", "clone": {"image": "no", "count": 1, "name": "a"}}, NotFound, "no image"),
    ({"schedule": "daily 09:00", "clone": {"image": "mini", "count": 2, "name": "a"}}, Invalid, "cannot all be named"),
]


@pytest.mark.parametrize(("wanted", "error", "words"), BAD)
def test_what_is_no_storm(center: Center, wanted: dict[str, Any], error: type[Exception], words: str) -> None:  # noqa: F811
    center.node("east", "node1", 4096)
    center.image()
    with pytest.raises(error, match=words):
        center.cloud.storms.create("x", **wanted)


def test_storms_are_switched_and_deleted(center: Center) -> None:  # noqa: F811
    with clock.driven_by(hand := Hand(MORNING)):
        center.cloud.storms.create("x", schedule="daily 09:00", selector={"tag": "a"})
        with pytest.raises(Conflict):
            center.cloud.storms.create("x", schedule="daily 09:00", selector={"tag": "a"})
        center.cloud.storms.enable("x", False)
        hand.at = MORNING.replace(hour=10)
        assert storm_sweep(center.control) == 0
        center.cloud.storms.enable("x")
        assert storm_sweep(center.control) == 1  # caught up
        center.cloud.storms.delete("x")
        with pytest.raises(NotFound):
            center.cloud.storms.show("x")
