"""Every kind of move of a desktop that counts in memory and writes to its disk all the while, through HDCS."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deploy.lab.center import Center, wait_for
from deploy.lab.golden_image import build
from deploy.lab.lab import SRV
from hdcs_tasks.errors import WaitTimedOut
from hdcs_tasks.hypervisor import agent, guests
from tests.lab.data_center import at_guest, data_center, kill_worker, picture, wait_idle

pytestmark = pytest.mark.lab

LONG_S = 240.0
MIB = 1 << 20
WRITER = (
    "rm -f /root/lines /root/halt; i=0; "
    "while [ ! -e /root/halt ]; do i=$((i+1)); echo $i >> /root/lines; sync; sleep 0.1; done"
)


@pytest.fixture(scope="module")
def moves(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Center]:
    """A data center whose image is in east alone; west has never seen it."""
    with data_center(tmp_path_factory.mktemp("moves") / "moves") as made:
        made.cloud.images.add("plain", str(build().path), domain_nodes=["east"]).result(timeout_s=120)
        yield made


class Desk:
    """A desktop with a counter in its memory, a log that grows on its disk, and data whose hash is known."""

    def __init__(self, center: Center, name: str, **more: Any) -> None:
        self.center, self.name = center, name
        self.vm = center.cloud.vms[name]
        center.cloud.vms.clone("plain", name=name, profile="tiny", domain_node="east", start=True, **more).result(
            timeout_s=LONG_S
        )
        self.vm.wait_ready(timeout_s=LONG_S)
        self.id = self.vm.show()["id"]
        self.mac = self.vm.show()["mac"]
        self.sum = self.sh("dd if=/dev/urandom of=/root/data bs=1M count=6 2>/dev/null; sync; md5sum /root/data")
        self.sh(f"({WRITER}) >/dev/null 2>&1 </dev/null &")
        self.count = self.tick()

    def sh(self, command: str) -> str:
        def run(host: Any, vm_id: str) -> str:
            done = agent.exec_(host, vm_id, ["/bin/sh", "-c", command], timeout_s=90)
            assert done.exit_code == 0, (command, done)
            return done.stdout.decode()

        return at_guest(self.center, self.name, run)

    def tick(self) -> int:
        return int(self.sh("cat /run/tick").split()[0])

    def check(self) -> None:
        """The count went on, nothing written is missing, nothing that was there has changed."""
        seen = self.tick()
        assert seen > self.count, "the counter in memory began anew"
        self.count = seen
        assert self.sh("echo 3 > /proc/sys/vm/drop_caches; md5sum /root/data") == self.sum
        first = self.lines()
        assert first == list(range(1, len(first) + 1)), "a line is missing or was written twice"
        wait_for("the desktop to go on writing", lambda: len(self.lines()) > len(first), 60)

    def lines(self) -> list[int]:
        return [int(line) for line in self.sh("cat /root/lines").split()]

    def address(self) -> str:
        """The guest's own idea of its address."""
        return wait_for("an address of its subnet", lambda: at_guest(self.center, self.name, self._address), LONG_S)

    def _address(self, host: Any, vm_id: str) -> str:
        shown = self.vm.show()
        return shown["ip"] if shown["ip"] in str(agent.exec_(host, vm_id, ["/bin/sh", "-c", "ip a"]).stdout) else ""


def whole(center: Center) -> None:
    """Record, reservations, libvirt and storages agree: every VM once, nothing of a move is left."""
    wait_idle(center)
    homes = {vm["id"]: vm["home"] for vm in center.cloud.vms.list()}
    for name in center.lab.domain_nodes:
        here = {vm["id"] for vm in center.cloud.vms.list() if vm["server_node"] and vm["home"] == name}
        soon_equal(f"console ports in {name}", lambda n=name: owned_ports(center, n), here)  # type: ignore[misc]
        soon_equal(f"storage promised in {name}", lambda n=name: promised(center, n), here_of(homes, name))  # type: ignore[misc]
    seen = picture(center)
    assert seen["live"] == []
    holds = {i: node for i, state, node, *_ in seen["vms"].values() if node is not None}
    assert {vm_id: node for node, (found, _) in seen["libvirt"].items() for vm_id, _ in found} == holds
    claims = [claim for pool in seen["reservations"].pools.values() for claim in pool.claims]
    assert {claim.vm: claim.node for claim in claims} == holds
    assert len(claims) == len(holds)
    macs = {vm["mac"]: vm["server_node"] for vm in center.cloud.vms.list() if vm["server_node"]}
    assert {mac: node for node, (_, hosts) in seen["libvirt"].items() for mac in hosts} == macs
    for name in center.lab.domain_nodes:
        kept = {path.split("/")[1] for path in seen["storage"][name] if path.startswith("vms/")}
        assert kept == here_of(homes, name)
        left = [path for path in seen["storage"][name] if path.endswith((".partial", ".transfer", ".memory"))]
        assert left == []


def here_of(homes: dict[str, str], name: str) -> set[str]:
    return {vm_id for vm_id, home in homes.items() if home == name}


def promised(center: Center, domain_node: str) -> set[str]:
    return set(center.cloud.control.reservations.disks.all(domain_node))


def owned_ports(center: Center, domain_node: str) -> set[str]:
    """VMs that own a console port which does not cool. A port may begin or end to cool between two questions."""
    ports = center.cloud.control.reservations.ports
    cooling = ports.cooling(domain_node)
    return set(ports.all(domain_node)) - cooling - ports.cooling(domain_node)


def soon_equal(what: str, look: Callable[[], set[str]], wanted: set[str]) -> None:
    """What control gives back right after it has recorded an operation's end is given back now, or within seconds; no
    sweep tidies up as soon as that."""
    end = time.monotonic() + 3.0
    while (found := look()) != wanted and time.monotonic() < end:
        time.sleep(0.1)
    assert found == wanted, what


def delete(center: Center, *names: str) -> None:
    for name in names:
        center.cloud.vms[name].delete().result(timeout_s=LONG_S)


@pytest.fixture(scope="module")
def desk(moves: Center) -> Desk:
    return Desk(moves, "desk-1")


def other(node: str) -> str:
    return {"node1": "node2", "node2": "node1", "node3": "node4", "node4": "node3"}[node]


def test_live_inside_a_domain_node(moves: Center, desk: Desk) -> None:
    before = desk.vm.show()
    to = other(before["server_node"])
    done = desk.vm.migrate(to=to).result(timeout_s=LONG_S)
    after = desk.vm.show()
    assert (after["state"], after["server_node"], after["port"]) == ("running", to, before["port"])
    assert (done["from"], done["to"], done["way"], done["network"]) == (before["server_node"], to, "live", "renewed")
    assert 0 < done["downtime_ms"] < 5000 and done["total_ms"] > 0 and done["memory_bytes"] > MIB
    assert after["ip"] != before["ip"]
    assert desk.address() == after["ip"]
    desk.check()
    whole(moves)


def test_by_post_copy_and_back_suspended(moves: Center, desk: Desk) -> None:
    done = desk.vm.migrate(postcopy=True).result(timeout_s=LONG_S)
    assert done["to"] == desk.vm.show()["server_node"]
    desk.address()
    desk.vm.suspend().result(timeout_s=LONG_S)
    count = desk.count
    back = desk.vm.migrate(to=done["from"]).result(timeout_s=LONG_S)
    assert (back["to"], desk.vm.show()["state"]) == (done["from"], "suspended")
    assert back["network"] == "renewed at its resume", "a guest that stands still sees no cable pulled"
    desk.vm.resume().result(timeout_s=LONG_S)
    assert desk.address() == desk.vm.show()["ip"]
    desk.check()
    assert desk.count >= count
    whole(moves)


def test_saved_inside_a_domain_node(moves: Center, desk: Desk) -> None:
    before = desk.vm.show()
    done = desk.vm.migrate(live=False).result(timeout_s=LONG_S)
    after = desk.vm.show()
    assert (after["state"], after["server_node"]) == ("running", other(before["server_node"]))
    assert after["port"] == before["port"]
    assert done["way"] == "saved" and done["downtime_ms"] > 0 and done["memory_bytes"] > MIB
    assert desk.address() == after["ip"] != before["ip"]
    desk.vm.suspend().result(timeout_s=LONG_S)
    back = desk.vm.migrate(live=False).result(timeout_s=LONG_S)
    assert (desk.vm.show()["state"], back["network"]) == ("suspended", "renewed at its resume")
    assert at_guest(moves, desk.name, lambda host, vm_id: guests.info(host, vm_id).state) == "paused"
    desk.vm.resume().result(timeout_s=LONG_S)
    assert desk.address() == before["ip"]
    desk.check()
    whole(moves)


def test_live_to_another_domain_node(moves: Center, desk: Desk) -> None:
    before = desk.vm.show()
    disk = moves.lab.storage("east") / "vms" / desk.id / "disk0.qcow2"
    overlay = disk.stat().st_blocks * 512
    done = desk.vm.migrate(to="west").result(timeout_s=LONG_S)
    after = desk.vm.show()
    assert (after["state"], after["home"]) == ("running", "west")
    assert after["server_node"] in ("node3", "node4") and after["mac"] == before["mac"]
    west = next(d for d in moves.cloud.domain_nodes.list() if d["name"] == "west")
    assert west["port_first"] <= after["port"] <= west["port_last"]
    assert done["image_bytes"] > 0, "the image was brought"
    assert {i["name"]: i["copies"] for i in moves.cloud.images.list()} == {"plain": {"east": "ready", "west": "ready"}}
    print(f"bytes {done['bytes']} (disk {done['disk_bytes']}, memory {done['memory_bytes']}), overlay {overlay}")
    assert 6 * MIB < done["disk_bytes"] <= 1.1 * overlay + 2 * MIB
    assert desk.address() == after["ip"]
    desk.check()
    whole(moves)


def test_the_next_backup_is_a_full_one_and_the_vm_starts_again(moves: Center, desk: Desk) -> None:
    desk.sh("touch /root/halt; sync")
    moves.cloud.backups.create(desk.name).result(timeout_s=LONG_S)
    moves.cloud.backups.create(desk.name).result(timeout_s=LONG_S)
    kinds = [(b["kind"], b["domain_node"]) for b in moves.cloud.backups.list(desk.name)]
    assert kinds == [("full", "west"), ("increment", "west")]
    desk.vm.stop(force=True).result(timeout_s=LONG_S)
    whole(moves)


def test_a_stopped_one_is_carried_and_the_image_is_reused(moves: Center, desk: Desk) -> None:
    path = f"vms/{desk.id}/disk0.qcow2"
    before = (moves.lab.storage("west") / path).read_bytes()
    done = desk.vm.migrate(to="east").result(timeout_s=LONG_S)
    after = desk.vm.show()
    assert (after["state"], after["home"], after["port"], after["server_node"]) == ("stopped", "east", None, None)
    assert (moves.lab.storage("east") / path).read_bytes() == before
    assert done["way"] == "carry" and done["image_bytes"] == 0 and 0 < done["bytes"] <= len(before)
    whole(moves)
    desk.vm.start().result(timeout_s=LONG_S)
    desk.vm.wait_ready(timeout_s=LONG_S)
    assert desk.sh("md5sum /root/data") == desk.sum
    desk.sh(f"({WRITER}) >/dev/null 2>&1 </dev/null &")
    desk.count = desk.tick()


def test_a_running_one_is_carried_with_its_memory(moves: Center, desk: Desk) -> None:
    done = desk.vm.migrate(to="node3", live=False).result(timeout_s=LONG_S)
    after = desk.vm.show()
    assert (after["state"], after["home"], after["server_node"]) == ("running", "west", "node3")
    assert done["downtime_ms"] > 0 and done["memory_bytes"] > MIB
    desk.check()
    whole(moves)
    delete(moves, desk.name)
    whole(moves)


# --- what goes wrong on the way: afterwards exactly one good copy runs or can be started, and nothing else is left


@pytest.fixture(scope="module")
def victim(moves: Center) -> Desk:
    """One desktop that survives all of the following; it is in east at the beginning of each."""
    return Desk(moves, "desk-2")


def under_way(desk: Desk, operation: Any, step: str) -> None:
    """Wait until the operation's step ``step`` tells of bytes that travel."""

    def look() -> bool:
        seen = operation.show()
        assert seen["state"] in ("queued", "running"), seen["error"]
        return seen["steps"][-1]["name"] == step and str(seen["phase"]).startswith(("disk", "memory"))

    wait_for(f"{step} to be under way", look, LONG_S, every_s=0.05)


@contextmanager
def control_stopped(center: Center, operation: Any, step: str) -> Iterator[None]:
    """Stop the control worker once ``step`` is in hand: what the server nodes did is settled after the block."""

    def in_hand() -> bool:
        shown = operation.show()
        assert shown["state"] in ("queued", "running"), shown["error"]
        last = shown["steps"][-1]
        seen = center.cloud.control.reservations.steps.status(last["id"])
        return last["name"] == step and seen is not None and (seen.done or seen.holder is not None)

    wait_for(f"{step} to be in hand", in_hand, LONG_S, every_s=0.005)
    os.kill(center.pids["control"], signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(center.pids["control"], signal.SIGCONT)


def comes_to(operation: Any, step: str) -> bool:
    """Wait until ``step`` is the operation's present one; False: it has ended without."""

    def look() -> dict[str, Any] | None:
        shown = operation.show()
        return shown if shown["steps"][-1]["name"] == step or shown["state"] not in ("queued", "running") else None

    return bool(wait_for(f"{step}, or the end", look, LONG_S, every_s=0.005)["state"] in ("queued", "running"))


def finished(center: Center, operation: Any) -> None:
    """Wait until the executor of the operation's present step has its outcome."""
    step = operation.show()["steps"][-1]["id"]
    wait_for("the step's outcome", lambda: center.cloud.control.reservations.steps.status(step).done, 60)


def ended(operation: Any) -> dict[str, Any]:
    """The operation when it has ended; one that does not is shown with its steps, to tell where it hangs."""
    try:
        *_, seen = operation.watch(timeout_s=LONG_S)
    except WaitTimedOut:
        shown = operation.show()
        steps = [[step[key] for key in ("name", "state", "attempt", "node", "history")] for step in shown["steps"]]
        raise AssertionError((shown["phase"], shown["error"], steps)) from None
    return dict(seen)


def power_cycle(center: Center, node: str) -> None:
    center.lab.power_on(node)
    center.start_node(node)
    center.wait_for_nodes(center.lab.nodes)


def stayed(desk: Desk, before: dict[str, Any]) -> None:
    after = desk.vm.show()
    keys = ("state", "home", "server_node", "port", "ip")
    assert [after[key] for key in keys] == [before[key] for key in keys]
    desk.check()


def test_a_cancel_leaves_it_where_it_was(moves: Center, victim: Desk) -> None:
    before = victim.vm.show()
    operation = victim.vm.migrate("west", bandwidth_mib_s=8)
    under_way(victim, operation, "vm.move_on_node")
    shown = operation.progress
    assert 0 < shown["percent"] < 100
    operation.cancel()
    assert ended(operation)["state"] == "cancelled"
    stayed(victim, before)
    whole(moves)


@pytest.mark.parametrize(("size", "last"), [("64k", "vm.move_prepare_on_node"), ("2m", "vm.move_on_node")])
def test_the_disk_of_the_target_is_full(moves: Center, victim: Desk, size: str, last: str) -> None:
    """There is no room for an overlay; the overlay is there, and is filled in the middle of the copy."""
    before = victim.vm.show()
    moves.lab.run("node3", ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", f"{SRV}/vms"])
    try:
        seen = ended(victim.vm.migrate("node3"))
    finally:
        moves.lab.run("node3", ["umount", f"{SRV}/vms"])
    assert seen["state"] == "failed" and not seen["needs_operator"], seen["error"]
    assert [step["name"] for step in seen["steps"] if step["state"] == "failed"] == [last]
    if last == "vm.move_on_node":
        assert "the storage of domain node west is full: cannot migrate guest" in seen["error"]["message"]
    stayed(victim, before)
    whole(moves)


def test_the_source_worker_dies_and_the_move_goes_on(moves: Center, victim: Desk) -> None:
    """Killed in the middle of the copy, which libvirt ends by itself, and once more when that was done."""
    before = victim.vm.show()
    source = before["server_node"]
    for _ in range(3):
        operation = victim.vm.migrate("west", bandwidth_mib_s=8)
        under_way(victim, operation, "vm.move_on_node")
        kill_worker(moves, source)
        moves.start_node(source)
        if comes_to(operation, "vm.move_finish_on_node"):
            break
        # A machine so slow that the new worker came after the old one's lease: the move was called off, nothing else.
        assert "was lost before" in ended(operation)["error"]["message"]
        moves.wait_for_nodes(moves.lab.nodes)
        stayed(victim, before)
    with control_stopped(moves, operation, "vm.move_finish_on_node"):
        finished(moves, operation)
        kill_worker(moves, source)
        moves.start_node(source)
    seen = ended(operation)
    assert seen["state"] == "done", seen["error"]
    assert seen["result"]["downtime_ms"] >= 0, "the target's libvirt knows what nobody watched"
    assert victim.vm.show()["home"] == "west"
    victim.check()
    whole(moves)


def test_the_target_dies_when_the_guest_has_come(moves: Center, victim: Desk) -> None:
    """It is recorded where it was lost, and starts there again with all it had written to its disk."""
    if victim.vm.show()["home"] != "west":
        victim.vm.migrate("west").result(timeout_s=LONG_S)
    operation = victim.vm.migrate("node1")
    with control_stopped(moves, operation, "vm.move_on_node"):
        finished(moves, operation)
        moves.lab.power_off("node1")
    seen = ended(operation)
    assert seen["needs_operator"] and "node1 was lost" in seen["error"]["message"]
    after = victim.vm.show()
    assert (after["home"], after["server_node"]) == ("east", "node1")
    power_cycle(moves, "node1")
    wait_for("the guest to be missed", lambda: victim.vm.show()["state"] == "stopped", LONG_S)
    whole(moves)
    victim.vm.start().result(timeout_s=LONG_S)
    victim.vm.wait_ready(timeout_s=LONG_S)
    assert victim.sh("md5sum /root/data") == victim.sum
    delete(moves, victim.name)
    whole(moves)
