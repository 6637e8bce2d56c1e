"""The golden image under plain QEMU: boots from its own disk in 96 MiB, agent, clock, idle, power, disk that keeps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab import golden_image as golden
from tests.lab.agent import Agent

pytestmark = pytest.mark.lab


class Machine:
    """One QEMU without libvirt; sockets in ``folder``."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.folder = folder
        disk = folder / "disk.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "qcow2", str(disk)], check=True
        )
        self.process = subprocess.Popen([
            "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "96", "-nodefaults", "-display", "none",
            "-drive", f"file={disk},if=virtio", "-serial", f"file:{folder}/serial",
            "-device", "virtio-serial", "-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
            "-chardev", f"socket,path={folder}/ga,server=on,wait=off,id=ga",
            "-qmp", f"unix:{folder}/qmp,server=on,wait=off",
            "-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile=,id=nic",
        ])  # fmt: skip
        self.agent = Agent(lambda line: self._talk("ga", [line])[-1])

    def _talk(self, name: str, lines: list[str]) -> list[str]:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(3)
            link.connect(str(self.folder / name))
            stream = link.makefile("rw")
            replies = []
            for line in lines:
                stream.write(line + "\n")
                stream.flush()
                replies.append(stream.readline())
            return replies

    def qmp(self, command: str, **arguments: object) -> None:
        # QEMU greets first, so each reply read is that of the line before: the last line is there to be waited for
        sent = [
            {"execute": "qmp_capabilities"},
            {"execute": command, "arguments": arguments},
            {"execute": "query-name"},
        ]
        self._talk("qmp", [json.dumps(line) for line in sent])

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def machine(golden_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(golden_image, tmp_path_factory.mktemp("vm"))
    try:
        print(f"agent answers after {made.agent.wait():.1f} s")
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def test_a_second_build_is_the_cached_one(golden_image: Path) -> None:
    again = golden.build()
    assert again.cached
    assert again.path == golden_image
    assert again.path.stat().st_size < 40 << 20


def test_it_runs_from_its_own_writable_disk(machine: Machine) -> None:
    assert " / ext4 rw" in machine.agent.sh("cat /proc/mounts")


def test_its_clock_ticks_ten_times_a_second(machine: Machine) -> None:
    first = [int(n) for n in machine.agent.sh("cat /run/tick").split()]
    time.sleep(2)
    second = [int(n) for n in machine.agent.sh("cat /run/tick").split()]
    ticks, guest_cs = second[0] - first[0], second[1] - first[1]
    assert 2 <= 100 * ticks / guest_cs <= 11, "by the guest's own clock: a busy machine ticks late, never early"


def test_it_drops_and_renews_its_address_when_the_link_bounces(machine: Machine) -> None:
    shown = "ip -4 -o addr show eth0"
    _eventually(lambda: "inet 10.0.2." in machine.agent.sh(shown))
    machine.qmp("set_link", name="nic", up=False)
    _eventually(lambda: "inet" not in machine.agent.sh(shown))
    machine.qmp("set_link", name="nic", up=True)
    _eventually(lambda: "inet 10.0.2." in machine.agent.sh(shown))


def test_somebody_can_sit_down_at_it_and_be_told(machine: Machine) -> None:
    assert machine.agent.call("guest-get-users") == []
    machine.agent.sh("sit anna >/dev/null 2>&1 &")
    _eventually(lambda: [user["user"] for user in machine.agent.call("guest-get-users")] == ["anna"])
    assert "1000" in machine.agent.sh("cat /proc/[0-9]*/status | grep Uid")
    machine.agent.sh("echo go home | wall")
    assert machine.agent.sh("cat /run/wall") == "go home\n"


def test_a_frozen_disk_thaws(machine: Machine) -> None:
    assert machine.agent.call("guest-fsfreeze-freeze") == 1
    assert machine.agent.call("guest-fsfreeze-status") == "frozen"
    assert machine.agent.call("guest-fsfreeze-thaw") == 1


def test_idle_is_idle_and_burn_burns(machine: Machine) -> None:
    assert _load(machine, 4) < 0.06, "goal 0.03 on a quiet machine"
    machine.agent.sh("burn 5 >/dev/null 2>&1 &")
    # far above idle; how much of a core a busy machine leaves to it is not the guest's affair
    assert _load(machine, 2) > 0.12


def test_data_survives_a_reboot_and_the_button_powers_off_cleanly(machine: Machine) -> None:
    machine.agent.sh("echo kept >/root/data")
    before = float(machine.agent.sh("cut -d' ' -f1 /proc/uptime"))
    with pytest.raises(OSError, match="timed out"):
        machine.agent.call("guest-shutdown", mode="reboot")
    machine.agent.wait()
    assert float(machine.agent.sh("cut -d' ' -f1 /proc/uptime")) < before
    assert machine.agent.sh("cat /root/data") == "kept\n"
    assert "recovery" not in machine.agent.sh("dmesg | grep EXT4"), "the reboot left a journal to replay"
    machine.qmp("system_powerdown")
    assert machine.process.wait(15) == 0


def _load(machine: Machine, seconds: float) -> float:
    before, started = machine.cpu_s(), time.monotonic()
    time.sleep(seconds)
    return (machine.cpu_s() - before) / (time.monotonic() - started)


def _eventually(check: object, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.2)
