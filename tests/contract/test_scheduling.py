"""Scheduling on real Redis and SQLite: the line, re-planning, rules, dry runs. The test plays the server nodes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from hdcs_tasks.cli.main import run
from hdcs_tasks.clock import now_s
from hdcs_tasks.cloud import Cloud
from hdcs_tasks.config import CapacitySettings, Settings
from hdcs_tasks.errors import HdcsError, Invalid, NoCapacity, NotFound, WrongState
from hdcs_tasks.operations.recovery import recovery_sweep, settle
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.pool.admission import storage_sweep
from hdcs_tasks.pool.profiles import ensure_built_in
from hdcs_tasks.pool.proof import JoinRequest
from hdcs_tasks.pool.rebuild import reservation_sweep
from hdcs_tasks.pool.waiting import waiting_sweep
from hdcs_tasks.reservations import MixEntry, PlaceRequest
from tests.services import RedisServer

pytestmark = pytest.mark.contract

GIB = 2**30


class Center:
    """A control plane whose server nodes are played by the test: layer two is real, the guests are not there."""

    def __init__(self, config: Settings) -> None:
        self.cloud = Cloud.from_settings(config)
        self.control = self.cloud.control
        self.pool = self.control.reservations.pool
        self.tokens: dict[str, str] = {}
        self.slow: dict[str, float] = {}
        """Names of VMs whose agent never answers -> how long their starts count as under way (s)."""
        assert reservation_sweep(self.control) == "rebuilt"
        ensure_built_in(self.control)

    def node(self, domain_node: str, name: str, memory_mib: int, cores: int = 16, disk_gib: int = 1000) -> None:
        if domain_node not in self.tokens:
            self.tokens[domain_node] = self.cloud.domain_nodes.create(domain_node).token
        facts = {"cpu_mhz": 0, "sockets": 1, "cores_per_socket": cores, "threads_per_core": 1, "max_vcpus": 0,
                 "memory_mib": memory_mib}  # fmt: skip
        storage = {"total_bytes": disk_gib * GIB, "free_bytes": disk_gib * GIB}
        request = JoinRequest(domain_node, name, "10.0.0.1", f"i-{name}", facts, storage, now_s())
        pool_control.join(self.control, request.signed(self.tokens[domain_node]))

    def image(self) -> None:
        self.cloud.images.add("mini", "/srv/mini.qcow2")
        self.play(result={"sha256": "0" * 64, "virtual_size_bytes": GIB, "file_bytes": 2**20})

    def clone(self, name: str, **more: Any) -> None:
        operation = self.cloud.vms.clone("mini", name=name, profile=more.pop("profile", "tiny"), **more)
        self.play()
        assert operation.state == "done"

    def steps(self, *states: str) -> list[dict[str, Any]]:
        shown = [self.cloud.operations[op["id"]].show() for op in self.cloud.operations.list(live=True, limit=500)]
        found = [step | {"operation": op["id"]} for op in shown for step in op["steps"] if step["state"] in states]
        return sorted(found, key=lambda step: str(step["published_at"]))

    def spec(self, step: dict[str, Any]) -> dict[str, Any]:
        from hdcs_tasks.store.models import Step

        with self.control.store.read() as session:
            record = session.get(Step, step["id"])
            assert record is not None
            return record.spec

    def play(self, result: dict[str, Any] | None = None) -> list[str]:
        """Do every published step as a server node would, until none is left; the names of those done."""
        done: list[str] = []
        while steps := self.steps("published"):
            for step in steps:
                done.append(step["name"])
                settle(self.control, self._report(step, result))
        return done

    def _report(self, step: dict[str, Any], result: dict[str, Any] | None) -> dict[str, Any]:
        spec = self.spec(step)
        report: dict[str, Any] = {"step": step["id"], "attempt": step["attempt"], "node": step["node"] or "played"}
        report |= {"started_at": now_s(), "ended_at": now_s()}
        try:
            if step["name"] in ("vm.start_on_node", "vm.migrate_prepare_on_node"):
                report |= self._placed(step, spec)
            elif step["name"] in ("vm.stop_on_node", "vm.save_on_node"):
                self.pool.release(self.home(spec["vm_id"]), spec["vm_id"], self.node_of(spec["vm_id"]), 0)
                report["result"] = {"node": step["node"], "ran": True, "bytes": 99}
            else:
                report["result"] = result or {}
        except HdcsError as error:
            report["error"] = error.to_dict()
        return report

    def _placed(self, step: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
        vm_id = spec["guest"]["vm_id"] if "guest" in spec else spec["vm_id"]
        placed = self.pool.place(PlaceRequest(
            step["queue"], vm_id, step["id"], **spec["need"], pin=spec["pin"], exclude=tuple(spec["exclude"]),
            order=spec["order"], tags=tuple(spec["node_tags"]), marks=tuple(spec["marks"]),
            shuns=tuple(spec["shuns"]), seeks=tuple(spec["seeks"]),
            mix=tuple(MixEntry(*entry) for entry in spec["mix"]), label=spec["label"], hint=spec["hint"],
            start_s=self.slow.get(spec["shown"]["vm"], 120.0), prefer=spec.get("prefer"),
        ))  # fmt: skip
        if spec["shown"]["vm"] not in self.slow:
            # The played guests boot at once: they do not count as starts under way.
            self.pool.started(step["queue"], placed.node, vm_id)
        return {"node": placed.node, "result": {"node": placed.node, "port": placed.port, "ip": placed.ip}}

    def home(self, vm_id: str) -> str:
        return str(self.cloud.vms[vm_id].show()["home"])

    def node_of(self, vm_id: str) -> str:
        return str(self.cloud.vms[vm_id].show()["server_node"])

    def running(self) -> set[str]:
        return {vm["name"] for vm in self.cloud.vms.list(state="running")}


@pytest.fixture
def center(redis_service: RedisServer, tmp_path: Path) -> Iterator[Center]:
    redis.Redis.from_url(redis_service.url).flushall()
    capacity = CapacitySettings(
        host_reserve_mib=0, overhead_mib=0, overhead_per_vcpu_mib=0, overhead_graphics_mib=0, overhead_ratio=0,
    )  # fmt: skip
    config = Settings(
        redis_url=redis_service.url, database_url=f"sqlite:///{tmp_path}/hdcs.sqlite", state_dir=tmp_path,
        capacity=capacity, port_cooling_s=0,
    )  # fmt: skip
    made = Center(config)
    yield made
    made.control.store.dispose()


# --- the line


def test_freed_capacity_wakes_the_oldest_that_fits_and_only_it(center: Center) -> None:
    center.node("east", "node1", 1024)
    center.image()
    center.cloud.profiles.create("half", vcpus=1, memory_mib=512)
    center.cloud.profiles.create("whole", vcpus=1, memory_mib=1024)
    for name in ("a", "b", "c", "d"):
        center.clone(name, profile="half")
    center.clone("big", profile="whole")
    for name in ("a", "b", "big", "c", "d"):
        center.cloud.vms[name].start()
        center.play()
    assert center.running() == {"a", "b"}
    waiting = [center.cloud.operations.list(vm=name, kind="vm.start")[0]["id"] for name in ("big", "c", "d")]
    lines = [center.cloud.operations[op].show() for op in waiting]
    assert [op["line"] for op in lines] == [{"domain_node": "east", "place": n, "of": 3} for n in (1, 2, 3)]
    assert [op["eta_s"] for op in lines] == [None] * 3, "when room is given up nobody knows, whoever found some before"
    assert lines[0]["phase"] == "1 of 3 in line for room in east"

    center.cloud.vms["a"].stop()
    done = center.play()
    # The oldest does not fit into what a left; c does; d was not even tried.
    assert done == ["vm.stop_on_node", "vm.start_on_node"]
    assert center.running() == {"b", "c"}
    for name in ("b", "c"):
        center.cloud.vms[name].stop()
    center.play()
    assert center.running() >= {"d"} or center.running() == {"big"}


def test_a_storm_knows_its_line_and_its_pace(center: Center) -> None:
    center.node("east", "node1", 4096)
    center.image()
    center.cloud.vms.clone("mini", name="d-{:02d}", count=8, profile="tiny")
    center.play()
    parent = center.cloud.vms.start_all(home="east")
    line = center.cloud.line("east")
    assert [(row["subject"], row["place"], row["of"]) for row in line] == [(f"d-{n:02d}", n, 8) for n in range(1, 9)]
    assert {(row["waits_for"], row["eta_s"]) for row in line} == {("its turn", None)}
    for step in center.steps("published")[:4]:
        settle(center.control, center._report(step, None))
    shown = parent.show()
    places = [child["line"]["place"] for child in shown["children"] if child["state"] == "running"]
    assert places == [1, 2, 3, 4]
    # Four in what is counted as at least a second: the last of four comes in as long again.
    last = [child["eta_s"] for child in shown["children"] if child.get("line")][-1]
    assert 0 < last == shown["eta_s"] < 300
    center.play()
    assert center.cloud.line() == []


def test_who_waits_is_not_tried_again_for_nothing(center: Center) -> None:
    center.node("east", "node1", 128)
    center.image()
    center.clone("a")
    center.clone("b")
    for name in ("a", "b"):
        center.cloud.vms[name].start()
        center.play()
    parked = center.steps("parked")[0]
    for _ in range(3):
        assert waiting_sweep(center.control) == 0
        assert recovery_sweep(center.control)["woken"] == 0
    assert center.steps("parked")[0]["attempt"] == parked["attempt"] == 1


@pytest.mark.parametrize("what", ["join", "overcommit", "resume"])
def test_new_room_of_any_kind_wakes(center: Center, what: str) -> None:
    center.node("east", "node1", 128)
    center.image()
    if what == "resume":
        center.node("east", "node2", 128)
        center.cloud.server_nodes.drain("node2")
    center.clone("a")
    center.clone("b")
    for name in ("a", "b"):
        center.cloud.vms[name].start()
        center.play()
    assert center.running() == {"a"}
    if what == "join":
        center.node("east", "node2", 128)
    elif what == "overcommit":
        center.cloud.domain_nodes.set("east", memory_overcommit=2.0)
    else:
        center.cloud.server_nodes.resume("node2")
    center.play()
    assert center.running() == {"a", "b"}


def test_the_deadline_ends_the_wait_with_its_reason(center: Center) -> None:
    center.node("east", "node1", 128)
    center.image()
    center.clone("a")
    center.clone("b")
    center.cloud.vms["a"].start()
    center.play()
    center.control.settings.park_deadline_s = 2.0
    operation = center.cloud.vms["b"].start()
    center.play()
    assert operation.state == "running"
    time.sleep(2.1)
    recovery_sweep(center.control)
    with pytest.raises(
        NoCapacity, match=r"waited .* for room: no server node of east fits profile tiny \(1 vCPU, 128 MiB\)"
    ) as e:
        operation.result(timeout_s=5)
    assert "node1 0 MiB free" in e.value.message and e.value.next == "See: hdcs pool capacity tiny"
    assert operation.show()["decision"]["counts"] == {"memory": 1}
    assert center.cloud.vms["b"].show()["state"] == "stopped"


# --- re-planning a clone


def test_a_clone_refused_by_layer_two_goes_to_the_next_domain_node(center: Center) -> None:
    center.node("east", "node1", 256)
    center.node("west", "node9", 128)
    center.image()
    operation = center.cloud.vms.clone("mini", name="a", profile="tiny", start=True)
    assert center.cloud.vms["a"].show()["home"] == "east"
    # Somebody else takes east's room before the clone's start comes to layer two.
    for number in range(2):
        center.pool.place(PlaceRequest("east", f"other{number}", f"s{number}", 1, 128))
    done = center.play()
    assert done == [
        "vm.clone_on_node",
        "vm.start_on_node",
        "vm.discard_on_node",
        "vm.clone_on_node",
        "vm.start_on_node",
    ]
    assert operation.state == "done"
    vm = center.cloud.vms["a"].show()
    assert (vm["home"], vm["server_node"], vm["state"]) == ("west", "node9", "running")
    disks = center.control.reservations.disks
    assert (disks.used("east"), disks.used("west")) == (0, GIB)


def test_a_pinned_clone_waits_and_a_clone_without_another_home_too(center: Center) -> None:
    center.node("east", "node1", 128)
    center.node("west", "node9", 128)
    center.image()
    center.cloud.vms.clone("mini", name="pinned", profile="tiny", start=True, domain_node="east")
    center.pool.place(PlaceRequest("east", "other", "s", 1, 128))
    center.play()
    assert [step["queue"] for step in center.steps("parked")] == ["east"]
    center.pool.release("east", "other", "node1", 0)
    assert waiting_sweep(center.control) == 1
    center.play()
    assert center.running() == {"pinned"}


def test_storage_counts_in_capacity_and_in_layer_one(center: Center) -> None:
    """East has memory for 512 and, with 2 bytes promised for each it has, storage for 6; west the other way round."""
    center.node("east", "node1", 65536, cores=512, disk_gib=3)
    center.node("west", "node9", 256, disk_gib=1000)
    center.image()
    center.cloud.profiles.create("room", vcpus=1, memory_mib=128, disk_bytes=GIB)
    found = center.cloud.capacity("room")["domain_nodes"]
    assert [(found[d]["vms"], found[d]["limit"]) for d in ("east", "west")] == [(6, "disk"), (2, "server nodes")]
    # A profile without a disk of its own: its clones get their image's, of 1 GiB, and that counts.
    by_image = center.cloud.capacity("tiny", image="mini")
    assert (by_image["disk_bytes"], by_image["disk_by"]) == (GIB, "image mini:1")
    assert {d: by_image["domain_nodes"][d]["vms"] for d in ("east", "west")} == {"east": 6, "west": 2}
    assert center.cloud.capacity("tiny")["domain_nodes"]["east"]["limit"] == "disk"
    assert center.cloud.capacity(mix={"tiny": 1})["mix"]["vms"] == 8
    with pytest.raises(NotFound, match="image 'none'"):
        center.cloud.capacity("tiny", image="none")
    for number in range(8):
        center.clone(f"d{number}", profile="room")  # not started: storage is promised at the clone
    homes = [vm["home"] for vm in center.cloud.vms.list()]
    disks = center.control.reservations.disks
    assert {d: disks.used(d) // GIB for d in ("east", "west")} == {d: homes.count(d) for d in ("east", "west")}
    assert homes.count("east") <= 6
    with pytest.raises(NoCapacity, match="storage"):
        for number in range(7):
            center.clone(f"e{number}", profile="room", domain_node="east")
    assert disks.used("east") == 6 * GIB


def test_packing_goes_by_what_the_domain_node_has(center: Center) -> None:
    center.node("east", "node1", 65536)
    center.image()
    center.cloud.profiles.create("big", vcpus=4, memory_mib=1024)
    for number in range(3):
        center.clone(f"s{number}")
    center.clone("b", profile="big")
    assert center.cloud.vms["b"].start()
    assert center.spec(center.steps("published")[0])["mix"] == [[1, 128, 0.75], [4, 1024, 0.25]]  # to spread too
    center.play()
    center.cloud.domain_nodes.set("east", placement="pack")
    plan = center.cloud.vms["s0"].start(dry_run=True).explain()["vms"][0]["decision"]
    assert (plan["order"], plan["mix"]) == ("pack", [[1, 128, 0.75], [4, 1024, 0.25]])
    assert plan["nodes"][0]["score"] > 0
    center.cloud.vms.start_all(home="east")
    assert center.spec(center.steps("published")[0])["mix"] == [[1, 128, 0.75], [4, 1024, 0.25]]
    center.play()
    assert center.running() == {"s0", "s1", "s2", "b"}


# --- rules


def test_apart_and_together(center: Center) -> None:
    for number in (1, 2, 3):
        center.node("east", f"node{number}", 8192)
    center.image()
    center.cloud.vms.clone(
        "mini", name="db-{}", count=3, profile="tiny", tags=["db"], rules={"apart": ["db"]}, start=True
    )
    center.play()
    assert len({vm["server_node"] for vm in center.cloud.vms.list(tag="db")}) == 3
    with pytest.raises(NotFound, match="no VM with tag 'db1'") as typo:
        center.clone("cache", rules={"together": ["db1"]}, start=True)
    assert "Did you mean db?" in str(typo.value.next)
    center.clone("web", tags=["db1"])
    center.clone("cache", rules={"together": ["db1"]}, start=True)  # none with it runs yet
    center.cloud.vms["web"].start()
    center.play()
    center.clone("near", rules={"together": ["db1"]}, start=True)
    assert center.node_of("near") == center.node_of("web")
    with pytest.raises(NoCapacity, match="runs a VM tagged db, to be kept apart"):
        center.cloud.vms.clone("mini", name="db-9", profile="tiny", tags=["db"], rules={"apart": ["db"]})
    # Both ways: a VM tagged db without a rule of its own must not join those that shun db.
    plan = center.cloud.vms.clone("mini", name="plain", profile="tiny", tags=["db"], dry_run=True).explain()
    assert not plan["fits"] and "kept apart from tag db" in plan["refusal"]["message"]


def test_tags_pins_and_limits_of_server_nodes(center: Center) -> None:
    center.node("east", "node1", 8192)
    center.node("east", "node2", 1024)
    center.image()
    center.cloud.server_nodes.set("node2", tags=["gpu"])
    center.clone("gpu", rules={"node_tags": ["gpu"]}, start=True)
    assert center.node_of("gpu") == "node2"
    center.clone("pin", rules={"pin": "node2"}, start=True)
    assert center.node_of("pin") == "node2"
    center.cloud.domain_nodes.set("east", placement="pack")
    center.clone("packed", start=True)
    assert center.node_of("packed") == "node2"
    for wanted in ({"node_tags": ["gpuu"]}, {"apart": ["nobody"]}, {"pin": "node9"}):
        with pytest.raises(NotFound):
            center.clone("typo", rules=wanted)
    for chosen in ({"home": "eats"}, {"server_node": "node9"}, {"profile": "tinny"}):
        with pytest.raises(NotFound) as caught:
            center.cloud.vms.list(**chosen)
        assert caught.value.next.startswith(("Known: ", "Did you mean "))
        with pytest.raises(NotFound):
            center.cloud.vms.that_can("start", **chosen)
    plan = center.cloud.vms["pin"].migrate(dry_run=True).explain()
    assert plan["vms"][0]["server_node"] == "node1"
    with pytest.raises(Invalid, match="ratio above 0"):
        center.cloud.domain_nodes.set("east", memory_overcommit=0)
    with pytest.raises(Invalid, match="no placement rule 'colour'"):
        center.cloud.server_nodes.set("node1", colour="red")


def test_starts_under_way_are_bounded_per_server_node_and_storage(center: Center) -> None:
    center.node("east", "node1", 8192)
    center.node("east", "node2", 8192)
    center.image()
    center.cloud.server_nodes.set("node1", max_starts=1)
    center.cloud.domain_nodes.set("east", max_starts=2)

    def place(vm: str, **more: Any) -> str:
        return center.pool.place(PlaceRequest("east", vm, f"s-{vm}", 1, 128, **more)).node

    assert {place("a", pin="node1"), place("b", pin="node2")} == {"node1", "node2"}
    with pytest.raises(NoCapacity, match="as many starts are under way on its storage"):
        place("c")
    assert place("moved", start_s=0) in ("node1", "node2"), "a migration is no start"
    assert center.pool.started("east", "node2", "b")
    with pytest.raises(NoCapacity, match="node1 has as many starts under way as it may"):
        place("c", pin="node1")
    assert place("c") == "node2"
    snapshot = center.control.reservations.dump()
    center.control.reservations.rebuild(snapshot)
    assert center.pool.start_limit("east") == 2, "the rebuild keeps the limit"


def test_one_slow_vm_holds_up_nobody(center: Center) -> None:
    """Its start takes one place of those bounded, and the others pass it; where there is one place only, they wait no
    longer than a boot counts."""
    center.node("east", "node1", 8192)
    center.image()
    center.cloud.vms.clone("mini", name="d-{}", count=5, profile="tiny")
    center.play()
    center.cloud.server_nodes.set("node1", max_starts=2)
    center.slow["d-1"] = 120.0
    center.cloud.vms.start_all(home="east")
    center.play()
    assert center.running() == {"d-1", "d-2", "d-3", "d-4", "d-5"}
    for name in ("d-1", "d-2", "d-3"):
        center.cloud.vms[name].stop()
    center.play()
    center.cloud.server_nodes.set("node1", max_starts=1)
    for name in ("d-1", "d-2", "d-3"):
        center.cloud.vms[name].start()
        center.play()
    assert [step["error"]["code"] for step in center.steps("parked")] == ["no_capacity"] * 2
    assert waiting_sweep(center.control) == 0
    link, slow = center.pool._link, center.cloud.vms["d-1"].show()["id"]
    assert link.do("ZADD", link.key("starts", "node1"), "XX", "CH", 1, slow) == 1  # its two minutes are over
    for _ in range(2):
        deadline = time.monotonic() + 60
        while waiting_sweep(center.control) != 1:
            assert time.monotonic() < deadline, "d-1 holds its place for ever"
            time.sleep(0.1)
        center.play()
    assert {"d-1", "d-2", "d-3"} <= center.running()


def test_what_ifs_and_one_server_node_kept_free(center: Center, capsys: pytest.CaptureFixture[str]) -> None:
    """As told by Python and by the command line: per server node, per domain node and in all."""
    center.node("east", "node1", 1024)
    center.node("east", "node2", 512)
    center.node("west", "node3", 256)
    center.image()
    found = center.cloud.capacity("tiny")
    east, west = found["domain_nodes"]["east"], found["domain_nodes"]["west"]
    assert (found["vms"], found["n_plus_one"]) == (14, 4)
    assert (east["vms"], east["n_plus_one"], west["vms"], west["n_plus_one"]) == (12, 4, 2, 0)
    assert {name: node["vms"] for name, node in east["server_nodes"].items()} == {"node1": 8, "node2": 4}
    without = center.cloud.capacity("tiny", without=["node1"])
    assert (without["vms"], without["domain_nodes"]["east"]["n_plus_one"]) == (6, 0)
    shape = {"domain_node": "west", "vcpus": 3, "memory_mib": 65536}
    more = center.cloud.capacity("tiny", with_nodes=[shape])
    assert more["domain_nodes"]["west"]["server_nodes"]["new-node-1"] == {"vms": 3, "limit": "vcpus"}
    assert (more["vms"], more["domain_nodes"]["west"]["n_plus_one"]) == (17, 2)
    center.cloud.profiles.create("half", vcpus=1, memory_mib=512)
    assert center.cloud.capacity(mix={"half": 1, "tiny": 2})["mix"] == {"rounds": 2, "vms": 6, "stopped_by": "half"}
    words = ("pool", "capacity", "tiny", "--without", "node1", "--with-node", "west:3x65536", "-f", "json")
    capsys.readouterr()
    assert run(words, lambda: center.cloud) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["vms"] == 6 + 3
    assert told == center.cloud.capacity("tiny", without=["node1"], with_nodes=[shape])
    with pytest.raises(NotFound, match="no server node 'node7'"):
        center.cloud.capacity("tiny", without=["node7"])
    with pytest.raises(Invalid, match="of which domain node"):
        center.cloud.capacity("tiny", with_nodes=[{"vcpus": 1, "memory_mib": 1}])


def test_a_profile_claims_what_its_overcommit_leaves(center: Center) -> None:
    center.node("east", "node1", 1024)
    center.image()
    center.cloud.profiles.create(
        "thin", vcpus=2, memory_mib=512, rules={"memory_overcommit": 2.0, "vcpu_overcommit": 2}
    )
    assert center.cloud.capacity("thin")["vms"] == 4
    center.clone("a", profile="thin", start=True)
    assert center.pool.claims("east")[0][3:5] == (1, 256)


# --- dry runs


def test_dry_runs_explain_every_server_node_and_change_nothing(center: Center) -> None:
    center.node("east", "node1", 256)
    center.node("east", "node2", 256)
    center.node("east", "node3", 64)
    center.image()
    center.cloud.server_nodes.drain("node2")
    for name in ("a", "b", "c"):
        center.clone(name)
    plan = center.cloud.vms.start_all(["a", "b", "c"], dry_run=True).explain()
    assert [vm["server_node"] for vm in plan["vms"]] == ["node1", "node1", None]
    assert plan["refusal"]["message"] == (
        "no server node of east fits profile tiny (1 vCPU, 128 MiB): node1 0 MiB free, node2 draining, "
        "node3 64 MiB free (2 of 3 VMs fit)"
    )
    first = plan["vms"][0]["decision"]
    assert first["counts"] == {"fits": 1, "draining": 1, "memory": 1}
    assert [node["node"] for node in first["best"]] == ["node1"]
    assert [(n["node"], n["rank"], n["why"]) for n in first["nodes"]] == [
        ("node1", 1, ""), ("node2", None, "draining"), ("node3", None, "64 MiB free"),
    ]  # fmt: skip
    assert center.pool.claims("east") == [] and center.running() == set()
    center.cloud.vms["a"].start()
    center.play()
    with pytest.raises(WrongState):
        center.cloud.vms["a"].start(dry_run=True)
    move = center.cloud.vms["a"].migrate(dry_run=True).explain()
    assert not move["fits"] and "node1 is excluded, node2 draining, node3 64 MiB free" in move["refusal"]["message"]


# --- admission


def test_a_node_moves_its_bound_between_the_operators_floor_and_ceiling(center: Center) -> None:
    center.node("east", "node1", 4096)
    shown = center.cloud.server_nodes.show("node1")["starts"]
    assert (shown["floor"], shown["bound"], shown["ceiling"]) == (8, 64, 64)
    center.cloud.server_nodes.set("node1", max_starts=16, min_starts=2)
    assert center.pool.bounds("node1") == (2, 16)
    center.pool.bound_starts("node1", 5, {"why": "CPU pressure 95 %: halved", "cpu_pressure": "95.0", "at": "0"})
    shown = center.cloud.server_nodes.show("node1")["starts"]
    assert (shown["floor"], shown["bound"], shown["ceiling"]) == (2, 5, 16)
    assert (shown["why"], shown["cpu_pressure"]) == ("CPU pressure 95 %: halved", 95.0)
    # What is rebuilt is what the operator set, not the moment's bound.
    assert center.control.reservations.dump().pools["east"].nodes[0].max_starts == 16
    center.cloud.server_nodes.set("node1", max_starts=0)
    assert center.pool.bounds("node1") is None
    center.pool.bound_starts("nowhere", 5, {"why": "x"})
    assert center.pool.admission("nowhere") == {}


def test_a_slow_storage_lowers_its_bound(center: Center) -> None:
    center.node("east", "node1", 4096)
    center.cloud.domain_nodes.set("east", max_starts=16, min_starts=2)
    center.pool.bound_starts("node1", 64, {"storage_ms": "900.0", "at": f"{now_s():.0f}"})
    assert storage_sweep(center.control) == 1
    assert center.pool.start_limit("east") == 8
    assert center.cloud.domain_nodes.show("east")["starts"]["why"] == "a synced write takes 900 ms: halved"
    for _ in range(12):
        center.pool.bound_starts("node1", 64, {"storage_ms": "3.0", "at": f"{now_s():.0f}"})
        storage_sweep(center.control)
    assert center.pool.start_limit("east") == 16


# --- an image that is cheap to bring


def elsewhere(center: Center, memory_mib: int) -> None:
    """East has the image and room for one VM; west has room and not the image."""
    center.node("east", "node1", 128)
    center.image()
    center.node("west", "node2", memory_mib)


def test_a_clone_goes_where_the_image_must_be_brought_only_if_it_must(center: Center) -> None:
    elsewhere(center, 4096)
    plan = center.cloud.vms.clone("mini", name="a", profile="tiny", dry_run=True).explain()
    assert plan["vms"][0]["domain_node"] == "east"  # west is emptier, but the image is in east
    center.clone("a", start=True)
    plan = center.cloud.vms.clone("mini", name="b", profile="tiny", dry_run=True).explain()
    assert plan["vms"][0]["domain_node"] == "west"
    assert "needs the image brought" in plan["message"]
    operation = center.cloud.vms.clone("mini", name="b", profile="tiny", start=True)
    center.play()
    shown = operation.show()
    assert (shown["state"], shown["error"]) == ("done", None)
    assert [step["name"] for step in shown["steps"]] == ["image.copy_on_node", "vm.clone_on_node", "vm.start_on_node"]
    assert center.cloud.vms["b"].show()["home"] == "west"
    again = center.cloud.vms.clone("mini", name="c", profile="tiny", domain_node="west")
    assert [step["name"] for step in again.show()["steps"]] == ["vm.clone_on_node"]


def test_a_copy_that_fails_leaves_no_vm(center: Center) -> None:
    elsewhere(center, 4096)
    operation = center.cloud.vms.clone("mini", name="a", profile="tiny", domain_node="west")
    step = center.steps("published")[0]
    error = {"code": "rejected", "message": "the file is not what it was"}
    settle(center.control, center._report(step, None) | {"error": error})
    assert operation.state == "failed"
    assert center.cloud.vms.list() == []
    assert center.control.reservations.disks.used("west") == 0
