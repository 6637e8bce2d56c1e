"""The ladder of idle policies: what is next, whose policy it is, and what counts as use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.errors import Invalid
from hdcs_tasks.monitor.idle_rules import (
    EXEMPT_TAG,
    GIVEN_IN,
    RUNGS,
    Desktop,
    Limits,
    Next,
    Policy,
    check_selector,
    exempt,
    ladder_of,
    next_rung,
    policy_of,
    sample_use,
    use_inside,
    use_seen,
)
from hdcs_tasks.states import VmState

DESK = Desktop("desk-001", VmState.RUNNING, "east", "anna", "small", ["office"], None, 0.0)
LADDER = ladder_of({"warn": 100, "suspend": 200, "stop": 500, "delete": 1000})
QUIET: dict[str, Any] = {
    "state": "running", "console_clients": 0, "cpu_percent": 1.0, "disk_bytes_s": 10, "net_bytes_s": 10,
}  # fmt: skip


@pytest.mark.parametrize(("idle_s", "did", "did_s", "state", "expected"), [
    (0, None, 0, "running", Next("warn", 100)),
    (40, None, 0, "running", Next("warn", 60)),
    (100, None, 0, "running", Next("warn", 0)),
    (5000, None, 0, "running", Next("warn", 0, late_s=4900)),  # however long it was idle: first it is warned
    (5000, "warn", 0, "running", Next("suspend", 100)),  # and then has the time between
    (5000, "warn", 99, "running", Next("suspend", 1)),
    (150, "warn", 50, "running", Next("suspend", 50)),
    (200, "warn", 100, "running", Next("suspend", 0)),
    (200, "suspend", 0, "suspended", Next("stop", 300)),
    (500, "stop", 0, "stopped", Next("delete", 500)),
    (10, None, 0, "stopped", Next("delete", 990)),  # somebody stopped it
    (250, None, 0, "suspended", Next("stop", 250)),
    (9999, "delete", 0, "stopped", None),
])  # fmt: skip
def test_rungs_are_climbed_one_by_one(
    idle_s: float, did: str | None, did_s: float, state: str, expected: Next | None
) -> None:
    vm = replace(DESK, idle_s=float(idle_s), did=did, did_s=float(did_s), state=VmState(state))
    assert next_rung(LADDER, vm) == expected


def test_what_is_not_observed_or_exempt_is_never_taken() -> None:
    for vm in (
        replace(DESK, idle_s=None), replace(DESK, idle_s=9e9, tags=["office", EXEMPT_TAG]),
        replace(DESK, idle_s=9e9, warm_pool="morning"),
    ):  # fmt: skip
        assert next_rung(LADDER, vm) is None
    assert exempt(replace(DESK, warm_pool="morning")) == "of the warm pool morning"
    assert exempt(DESK) == ""


times = st.dictionaries(st.sampled_from(RUNGS), st.floats(1, 1e6), min_size=1)


@given(times, st.floats(0, 1e7), st.sampled_from([*RUNGS, None]), st.floats(0, 1e7), st.sampled_from(list(VmState)))
def test_no_rung_comes_before_its_time_or_in_a_state_that_forbids_it(
    times: dict[str, float | None], idle_s: float, did: str | None, did_s: float, state: VmState
) -> None:
    try:
        ladder = ladder_of(times)
    except Invalid:
        return
    found = next_rung(ladder, replace(DESK, idle_s=idle_s, did=did, did_s=did_s, state=state))
    if found is None:
        return
    rung = next(rung for rung in ladder if rung.do == found.do)
    assert state in GIVEN_IN[rung.do]
    assert found.in_s >= 0 and idle_s + found.in_s >= rung.after_s - 1e-6 * rung.after_s
    if did in times:
        assert RUNGS.index(did or "") < RUNGS.index(found.do)
    if found.do == "delete":
        assert state in (VmState.STOPPED, VmState.SAVED)


@pytest.mark.parametrize("wrong", [
    {}, {"warn": None}, {"stop": 0}, {"warn": 20, "stop": 10}, {"stop": 10, "save": 20}, {"delete": 10},
    {"warn": 5, "delete": 10}, {"stop": 1e9},
])  # fmt: skip
def test_ladders_that_cannot_be_climbed(wrong: dict[str, float | None]) -> None:
    with pytest.raises(Invalid):
        ladder_of(wrong)


def test_of_several_policies_the_lowest_rank_counts() -> None:
    everybody = Policy("everybody", LADDER, {})
    office = Policy("office", LADDER, {"tag": "office"}, rank=50)
    named = Policy("named", LADDER, {"names": ["desk-002"]}, rank=1)
    both = Policy("both", LADDER, {"owner": "anna", "home": "west"}, rank=0)
    policies = [everybody, office, named, both]
    assert policy_of(policies, DESK) is office
    assert policy_of(policies, replace(DESK, tags=[])) is everybody
    assert policy_of(policies, replace(DESK, name="desk-002")) is named
    assert policy_of(policies, replace(DESK, home="west")) is both
    assert policy_of([], DESK) is None
    with pytest.raises(Invalid, match="colour"):
        check_selector({"colour": "red"})


@pytest.mark.parametrize(("more", "word"), [
    ({}, ""), ({"console_clients": 1}, "console"), ({"cpu_percent": None}, "not measured"),
    ({"cpu_percent": 10.1}, "CPU"), ({"disk_bytes_s": 1 << 20}, "disk"), ({"net_bytes_s": 1 << 20}, "network"),
    ({"disk_bytes_s": None, "net_bytes_s": None}, ""),  # a hung QEMU elsewhere on the host
    ({"state": "paused", "cpu_percent": None}, ""), ({"state": "paused", "console_clients": 2}, "console"),
])  # fmt: skip
def test_what_counts_as_use(more: dict[str, Any], word: str) -> None:
    used = use_seen(Limits(), **(QUIET | more))
    assert (word in used) if word else used == ""


def test_the_work_of_answering_us_is_nobodys_use() -> None:
    busy = QUIET | {"cpu_percent": 90.0, "looked": True}
    assert sample_use(Limits(), busy) == ""
    assert "console" in sample_use(Limits(), busy | {"console_clients": 1})
    assert "CPU" in sample_use(Limits(), busy | {"looked": False})


@pytest.mark.parametrize(("look", "word"), [
    ({"users": [], "processes": []}, ""), ({"users": None, "processes": None, "says": "silent"}, ""),
    ({"users": ["anna"]}, "logged in: anna"), ({"users": [], "processes": ["firefox"]}, "firefox"),
    ({"console_clients": 1}, "console"), ({"users": None, "unsure": True, "says": "not known: slow"}, "slow"),
])  # fmt: skip
def test_what_is_seen_inside(look: dict[str, Any], word: str) -> None:
    used = use_inside(look)
    assert (word in used) if word else used == ""
