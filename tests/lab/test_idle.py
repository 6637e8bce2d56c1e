"""Idle desktops in a real data center: who is used is never taken, who is not is, and logs tell it without secrets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import select

from deploy.lab.center import Center, wait_for
from hdcs_tasks.errors import Cancelled
from hdcs_tasks.hypervisor import agent
from hdcs_tasks.monitor.control_idle import DONE
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.store.models import Vm
from hdcs_tasks.vm import control as vm_control
from tests.lab.consoles import console_client
from tests.lab.data_center import BOOT_S, add_image, at_guest, data_center

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

WARN_S, STOP_S = 4.0, 8.0
LOOK_S = 30.0
"""From the sample by which a rung is found due to the decision: its guest agent is asked (a silent one is given 5 s),
and this machine is busy."""
CPU_PERCENT = 5.0
"""Far above an idle guest, and what a busy machine leaves to a busy one is no more."""
DESKS = ("user", "watched", "busy", "idle", "mute")
THROWAWAY = ["desk-2", "desk-5"]
"""The one that is watched until its client goes, and the mute one, which is stopped by then."""
LADDER = {"suspend": 4.0, "save": 8.0, "delete": 12.0}


@pytest.fixture(scope="module")
def center(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Center]:
    """One server node, logs as under systemd, Flower's too; what each desktop is for is its name."""
    root = tmp_path_factory.mktemp("idle") / "idle"
    env = {"HDCS_LOG_FORMAT": "json", "HDCS_SAMPLES_KEPT": "1000"}
    with data_center(root, env, {"east": ("node1",)}, flower=True) as made:
        add_image(made, "mini")
        made.cloud.vms.clone("mini", name="desk-{}", count=len(DESKS), profile="tiny", start=True).result(
            timeout_s=BOOT_S
        )
        yield made


def name_of(what: str) -> str:
    return f"desk-{DESKS.index(what) + 1}"


def in_guest(center: Center, what: str, command: str) -> str:
    def run(host: Any, vm_id: str) -> str:
        return agent.exec_(host, vm_id, ["/bin/sh", "-c", command], 60).stdout.decode()

    return str(at_guest(center, name_of(what), run))


def seen(center: Center, what: str) -> dict[str, Any]:
    (row,) = center.cloud.idle.preview(names=[name_of(what)])
    return dict(row)


def test_who_is_used_is_never_taken_and_who_is_not_is(center: Center) -> None:
    cloud = center.cloud
    for what in DESKS:
        cloud.vms[name_of(what)].wait_ready(timeout_s=BOOT_S)
    in_guest(center, "user", "sit anna >/dev/null 2>&1 &")
    in_guest(center, "busy", "burn 3000 >/dev/null 2>&1 &")
    in_guest(center, "mute", "(sleep 1; kill -STOP $(pidof qemu-ga)) >/dev/null 2>&1 &")
    port = cloud.vms[name_of("idle")].show()["port"]
    with console_client(center, name_of("watched")) as (_, secret):
        cloud.idle.create("lab", warn=WARN_S, stop=STOP_S, cpu_percent=CPU_PERCENT)
        made_at = time.time()
        for what in ("idle", "mute"):
            wait_for(f"{what} to be taken", lambda what=what: _state(center, what) == "stopped", 300)
        # Both had the whole time, and the others had as long.
        for what in ("idle", "mute"):
            (stop,) = cloud.operations.list(vm=name_of(what), kind="vm.stop")
            assert stop["requested_by"] == "idle policy lab"
        told = {e["subject"]: e["message"] for e in cloud.events(200) if e["kind"] == "vm.warned"}
        assert "was warned in the guest" in told[name_of("idle")]
        assert "the guest agent is silent" in told[name_of("mute")]
        taken = {e["subject"]: e["data"] for e in cloud.events(200) if e["kind"] == "vm.reclaimed"}
        assert set(taken) == {name_of("idle"), name_of("mute")}
        assert all(data["idle_s"] >= STOP_S for data in taken.values()), taken
        warned = {e["subject"]: e["data"] for e in cloud.events(200) if e["kind"] == "vm.warned"}
        for what in ("idle", "mute"):
            _found_by_the_first_sample(center, name_of(what), warned[name_of(what)], made_at)
            found_at = _found_by_the_first_sample(center, name_of(what), taken[name_of(what)], made_at)
            (stop,) = cloud.operations.list(vm=name_of(what), kind="vm.stop")
            decided_at = datetime.fromisoformat(stop["created_at"]).timestamp()
            assert found_at <= decided_at <= found_at + LOOK_S, (what, decided_at - found_at)
        wait_for("two more looks at the user", lambda: seen(center, "user")["signals"]["users"] == ["anna"], 60)
        for what, why in (("user", "anna"), ("watched", "console"), ("busy", "CPU")):
            row = seen(center, what)
            assert row["state"] == "running", what
            if what != "user":  # its look is older than the moment it was used last, now and then
                wait_for(f"{what}: {why}", lambda what=what, why=why: why in seen(center, what)["used"], 60)
        desk = cloud.vms[name_of("idle")].show()
        assert (desk["server_node"], desk["port"], desk["ip"]) == (None, None, None)
        wait_for("its port to cool", lambda: cloud.domain_nodes.list()[0]["ports_used"] == 3, 60)
        assert port not in {cloud.vms[name_of(what)].show()["port"] for what in ("user", "watched", "busy")}
        # From when its client goes on, one more desktop is unused.
        cloud.idle.create("throwaway", selector={"names": THROWAWAY}, rank=1, inside=False, **LADDER)
        made_at = time.time()
    _goes_down_the_whole_ladder(center, made_at)
    _told_in_logs_without_secrets(center, [secret])


def _found_by_the_first_sample(center: Center, name: str, told: dict[str, Any], made_at: float) -> float:
    """Within its time and one sweep: the sample before was taken before the time was over, or before there was the
    policy (``made_at``). When it was found (Unix)."""
    found_at = datetime.fromisoformat(told["found"]["at"]).timestamp()
    taken_at = [sample["at"] for sample in center.cloud.control.reservations.samples.host_history("node1", 1000)]
    assert any(abs(at - found_at) < 0.001 for at in taken_at), "it was found by a sample"
    before = max(at for at in taken_at if at < found_at - 0.001)
    due_at = found_at - told["found"]["late_s"]
    # A guest that could not be looked into (a slow machine) is found by the next sample again.
    log = (center.lab.root / "logs" / "node1-worker.log").read_text()
    failed = [line for line in log.splitlines() if "not looked at" in line and seen_id(center, name) in line]
    assert before <= max(due_at, made_at) + 0.001 or failed, (told, found_at - before)
    return found_at


def seen_id(center: Center, name: str) -> str:
    """A VM's id, also of one that is deleted."""
    with center.cloud.control.store.read() as session:
        return session.scalars(select(Vm.id).where(Vm.name == name)).one()


def _goes_down_the_whole_ladder(center: Center, made_at: float) -> None:
    """Suspended, saved, deleted, each within its time and a sweep; of one that is at rest already the rest is left."""
    cloud, (watched, mute) = center.cloud, THROWAWAY
    wait_for("both to be gone", lambda: not cloud.vms.list(names=THROWAWAY), 180)
    told = [e for e in cloud.events(200) if e["kind"] == "vm.reclaimed" and e["data"]["policy"] == "throwaway"]
    found = {
        (e["subject"], do): e["data"] for e in told for do, word in DONE.items() if f"was {word}" in e["message"]
    }  # fmt: skip
    assert set(found) == {(watched, do) for do in LADDER} | {(mute, "delete")}
    for do, after_s in LADDER.items():
        assert found[watched, do]["idle_s"] >= after_s, found
        if do != "delete":  # what is at rest is found by a sweep of the control plane
            _found_by_the_first_sample(center, watched, found[watched, do], made_at)
    left = {vm["id"] for vm in cloud.vms.list()}
    storage = center.lab.storage("east")
    assert {path.name for path in (storage / "vms").iterdir()} == left
    assert not list((storage / "state").glob("*.memory"))


def _state(center: Center, what: str) -> str:
    return str(center.cloud.vms[name_of(what)].show()["state"])


def test_in_the_last_second_its_server_node_looks_again(center: Center) -> None:
    """As if the look before had found nobody: the step itself must leave the desktop alone."""
    control = center.cloud.control
    for what, word in (("user", "anna"), ("busy", "CPU")):
        guard = {"policy": "lab", "inside": True, "limits": {"cpu_percent": CPU_PERCENT}, "rung": "suspend"}
        asked = vm_control.command(control, "suspend", name_of(what), Asked(by="idle policy lab"), guard=guard)
        with pytest.raises(Cancelled, match=word):
            center.cloud.operations[asked.id].result(timeout_s=60)
        assert _state(center, what) == "running"


def _told_in_logs_without_secrets(center: Center, secrets: list[str]) -> None:
    """Every log of the run is JSON, says which operation, VM and server node, and holds no secret that was used."""
    token = center.lab.join_token_file("east").read_text().strip()
    texts = {log.stem: log.read_text() for log in (center.lab.root / "logs").iterdir()}
    for name, text in texts.items():
        for secret in (*secrets, token, center.flower_auth, center.flower_auth.split(":")[1]):
            assert secret not in text, f"a secret stands in {name}"
    lines = [json.loads(line) for line in texts["node1-worker"].splitlines() if line.startswith("{")]
    stops = [line for line in lines if line.get("vm") == name_of("idle") and line.get("task") == "vm.stop_on_node"]
    (operation,) = center.cloud.operations.list(vm=name_of("idle"), kind="vm.stop")
    assert stops and all(line["server_node"] == "node1" for line in stops)
    assert {line["operation"] for line in stops} == {operation["id"]}, "Celery's own lines, too"
