"""Drains of a server node and a domain node, and guests that hang or run twice, all over TLS: by guests that boot
nothing, which is enough to move them. Afterwards every VM runs exactly once, or can be started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import libvirt
import pytest

from deploy.lab.center import Center, wait_for
from tests.chaos import notes
from tests.lab.consoles import console_client
from tests.lab.data_center import data_center, kill_worker, libvirt_of, locked
from tests.lab.test_moves import comes_to, ended, whole

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

LONG_S = 180.0
DESKS = [f"desk-{number}" for number in range(1, 6)]
PATTERN = 0x5A
SLOW_MIB_S = 1
"""So slow that a move lasts for seconds."""


@pytest.fixture(scope="module")
def center(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Center]:
    """east (node1, node2) and west (node3), which move over TLS; four desktops run in east, a fifth is stopped."""
    root = tmp_path_factory.mktemp("drain") / "drain"
    with data_center(root, domain_nodes={"east": ["node1", "node2"], "west": ["node3"]}, tls=True) as made:
        image = made.lab.root / "blank.qcow2"
        notes.make_image(image)
        made.cloud.profiles.create("chip", vcpus=1, memory_mib=64)
        made.cloud.images.add("blank", str(image)).result(timeout_s=120)
        clone = made.cloud.vms.clone("blank", name="desk-{}", count=5, profile="chip", domain_node="east", start=True)
        clone.result(timeout_s=LONG_S)
        made.cloud.vms[DESKS[-1]].stop(force=True).result(timeout_s=LONG_S)
        yield made


OVERHEAR = """
import select, socket, sys
needle, link = bytes.fromhex(sys.argv[1]), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
count = found = 0
print("listening", flush=True)
while True:
    ready, _, _ = select.select([link, sys.stdin], [], [])
    if link in ready:
        frame = link.recv(1 << 17)
        count, found = count + len(frame), found + (needle in frame)
    elif sys.stdin in ready:
        break
print(count, found)
"""


@contextmanager
def overheard(center: Center, needle: bytes) -> Iterator[dict[str, int]]:
    """What goes over the wires of the lab's hub meanwhile: how many ``bytes``, and how many frames with ``needle``."""
    argv = center.lab.hub.enter([sys.executable, "-c", OVERHEAR, needle.hex()])
    listener = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert listener.stdin is not None and listener.stdout is not None
    heard: dict[str, int] = {}
    try:
        assert listener.stdout.readline().strip() == "listening"
        yield heard
    finally:
        listener.stdin.close()
        heard["bytes"], heard["found"] = map(int, listener.stdout.readline().split())
        listener.wait(20)


def place(center: Center, name: str) -> tuple[str, str, str | None]:
    shown = center.cloud.vms[name].show()
    return shown["state"], shown["home"], shown["server_node"]


def guests_on(center: Center, node: str) -> set[str]:
    with libvirt_of(center, node) as host:
        return {guest.name() for guest in host.conn.listAllDomains()}


def under_way(center: Center, operation: Any) -> None:
    """Wait until memory or disk of a VM travels, in the operation itself or in a child of it."""

    def look() -> bool:
        seen = operation.show()
        assert seen["state"] in ("queued", "running"), seen["error"]
        parts = [center.cloud.operations[child["id"]].show() for child in seen["children"]] or [seen]
        return any(str(part["phase"]).startswith(("disk", "memory")) for part in parts)

    wait_for("bytes to travel", look, LONG_S, every_s=0.05)


def test_a_console_client_goes_on_at_the_new_server_node(center: Center) -> None:
    """SPICE's seamless migration: the client that is connected is told the address, and its session is not cut."""
    name = DESKS[0]
    before = center.cloud.vms[name].show()
    with console_client(center, name) as (client, _):
        assert client.stdout is not None
        to = center.cloud.vms[name].migrate().result(timeout_s=LONG_S)["to"]
        said = []
        while not said or not said[-1].startswith("moved"):
            said.append(client.stdout.readline().strip())
            assert said[-1] in ("connected", "closed") or said[-1].startswith("moved"), said
    assert said[-1].split()[1:] == [center.lab.ip(to), str(before["port"])]


def test_a_server_node_is_drained_though_its_worker_dies(center: Center) -> None:
    cloud = center.cloud
    bring(center, DESKS[0], "node1")
    operation = cloud.server_nodes.drain("node1", concurrency=1, bandwidth_mib_s=SLOW_MIB_S)
    under_way(center, operation)
    kill_worker(center, "node1")
    center.start_node("node1")
    seen = ended(operation)
    if "which is lost" in str(seen["error"]):
        # A machine so slow that the new worker came after the old one's lease: a second drain moves what stayed.
        wait_for("node1 to be back", lambda: center.cloud.server_nodes.show("node1")["state"] == "draining", LONG_S)
        seen = ended(cloud.server_nodes.drain("node1", concurrency=1))
    assert seen["state"] == "done", (seen["error"], [child["error"] for child in seen["children"]])
    assert {place(center, name) for name in DESKS[:-1]} == {("running", "east", "node2")}
    assert place(center, DESKS[-1]) == ("stopped", "east", None), "it is nowhere: nothing to do"
    assert guests_on(center, "node1") == set()
    center.wait_for_nodes(["node2", "node3"])
    cloud.vms[DESKS[-1]].start().result(timeout_s=LONG_S)
    assert place(center, DESKS[-1])[2] == "node2", "nothing new comes to it"
    cloud.vms[DESKS[-1]].stop(force=True).result(timeout_s=LONG_S)
    cloud.server_nodes.resume("node1")
    center.wait_for_nodes(center.lab.nodes)
    whole(center)


def test_a_domain_node_is_drained_with_what_is_stopped_in_it(center: Center) -> None:
    cloud = center.cloud
    for name in DESKS:
        assert notes.write(center, cloud.vms[name].show(), 0, PATTERN)
    with overheard(center, bytes([PATTERN]) * 64) as heard:
        seen = ended(cloud.domain_nodes.drain("east", concurrency=2))
    assert heard["bytes"] > len(DESKS) * notes.SLOT_BYTES and not heard["found"], (
        "disks travelled, not in clear",
        heard,
    )
    assert seen["state"] == "done", (seen["error"], [child["error"] for child in seen["children"]])
    assert {place(center, name) for name in DESKS[:-1]} == {("running", "west", "node3")}
    assert place(center, DESKS[-1]) == ("stopped", "west", None)
    cloud.domain_nodes.resume("east")
    center.wait_for_nodes(center.lab.nodes)
    whole(center)


def test_what_runs_twice_goes_on_where_the_record_has_it(center: Center) -> None:
    """libvirt lets a guest run at the target, and at its source again, when the network fails in its hand-over. Made
    here by hand, after the preparation and after the move."""
    name = DESKS[1]
    vm = center.cloud.vms[name]
    bring(center, name, "node2")
    vm_id = vm.show()["id"]
    with locked(center, "node2", vm_id):
        operation = vm.migrate("node3")
        assert comes_to(operation, "vm.move_on_node")
        double(center, vm_id, "node2", "node3")
    seen = ended(operation)
    assert seen["state"] == "failed" and not seen["needs_operator"], seen
    assert [step["name"] for step in seen["steps"]][-1] == "vm.move_undo_on_node"
    assert place(center, name) == ("running", "east", "node2")
    whole(center)
    operation = vm.migrate("node3")
    assert comes_to(operation, "vm.move_on_node")
    with locked(center, "node3", vm_id):
        wait_for("the guest to leave its source", lambda: name not in guests_on(center, "node2"), LONG_S)
        double(center, vm_id, "node3", "node2")
    seen = ended(operation)
    assert seen["state"] == "done", seen
    assert place(center, name) == ("running", "west", "node3")
    whole(center)


def test_a_suspended_one_goes_on_moving(center: Center) -> None:
    """QEMU does not take its disks over before it goes on, and ended itself in the second move, and in a save."""
    name = DESKS[2]
    vm = center.cloud.vms[name]
    bring(center, name, "node1")
    vm.suspend().result(timeout_s=LONG_S)
    for target in ("node2", "node3", "node1"):
        assert ended(vm.migrate(target))["state"] == "done"
        assert place(center, name)[::2] == ("suspended", target)
    vm.save().result(timeout_s=LONG_S)
    vm.start().result(timeout_s=LONG_S)
    assert place(center, name)[0] == "running"
    whole(center)


def bring(center: Center, name: str, node: str) -> None:
    """Have a desktop on this server node."""
    if place(center, name)[2] != node:
        seen = ended(center.cloud.vms[name].migrate(node))
        assert seen["state"] == "done", seen["error"]


def double(center: Center, vm_id: str, runs_on: str, too: str) -> None:
    with libvirt_of(center, runs_on) as here, libvirt_of(center, too) as there:
        assert there.lookup(vm_id) is None
        there.conn.createXML(here.guest(vm_id).XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE), 0)


def test_a_guest_whose_qemu_hangs_does_not_hold_its_move_up(center: Center) -> None:
    """It cannot be asked for its disk: the move gives up, says so, and leaves nothing."""
    name = DESKS[1]
    vm, source = center.cloud.vms[name], place(center, name)[2]
    assert source is not None
    (pid,) = [pid for pid, line in center.lab.space(source).processes() if vm.show()["id"] in line]
    os.kill(pid, signal.SIGSTOP)
    try:
        seen = ended(vm.migrate("east" if source == "node3" else "west"))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert seen["state"] == "failed" and not seen["needs_operator"], seen
    assert "QEMU does not answer" in seen["error"]["message"]
    assert place(center, name)[2] == source
    whole(center)
