"""A guest in the lab under libvirt alone: boots, gets its address by DHCP, moves live while its clock ticks on."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from deploy.lab import SRV, Lab
from tests.lab.agent import Agent

pytestmark = pytest.mark.lab

GUEST = """
<domain type='qemu'>
  <name>probe</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/><tcg><tb-cache unit='MiB'>16</tb-cache></tcg></features>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{srv}/probe.qcow2'/><target dev='vda' bus='virtio'/>
    </disk>
    <interface type='network'>
      <mac address='52:54:00:00:00:07'/><source network='probe'/><model type='virtio'/>
    </interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
</domain>"""
NETWORK = """
<network><name>probe</name><forward mode='open'/><bridge name='virbr7'/>
  <ip address='{base}.1' netmask='255.255.252.0'>
    <dhcp><range start='{base}.100' end='{base}.120'/><host mac='52:54:00:00:00:07' name='desk' ip='{base}.7'/></dhcp>
  </ip>
</network>"""


def _virsh(lab: Lab, node: str, *argv: str) -> str:
    return lab.run(node, ["virsh", "-q", *argv]).stdout


def _agent(lab: Lab, node: str) -> Agent:
    return Agent(lambda line: _virsh(lab, node, "qemu-agent-command", "--timeout", "5", "probe", line))


def _wait_address(agent: Agent, wanted: str, timeout_s: float = 60) -> float:
    started = time.monotonic()
    while wanted not in (shown := agent.sh("ip -4 -o addr show eth0")):
        assert time.monotonic() - started < timeout_s, shown
        time.sleep(0.2)
    return time.monotonic() - started


@pytest.fixture
def disk(lab: Lab, golden_image: Path) -> Path:
    storage = lab.storage("east")
    subprocess.run(["cp", "--sparse=always", golden_image, storage / "mini.qcow2"], check=True)
    lab.run("node1", [
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", f"{SRV}/mini.qcow2", "-F", "qcow2", f"{SRV}/probe.qcow2",
    ])  # fmt: skip
    return storage / "probe.qcow2"


def test_a_guest_boots_and_moves_live_with_its_clock_running(lab: Lab, disk: Path, tmp_path: Path) -> None:
    for node, base in (("node1", "10.128.0"), ("node2", "10.128.4")):
        (lab.storage("east") / f"{node}.xml").write_text(NETWORK.format(base=base))
        _virsh(lab, node, "net-create", f"{SRV}/{node}.xml")
    (lab.storage("east") / "probe.xml").write_text(GUEST.format(srv=SRV))
    _virsh(lab, "node1", "create", f"{SRV}/probe.xml")
    agent = _agent(lab, "node1")
    print(f"agent answers after {agent.wait(60):.1f} s")
    _wait_address(agent, "10.128.0.7/22")
    assert agent.sh("hostname") == "desk\n"
    agent.sh("echo written >/root/data; sync")
    before = [int(n) for n in agent.sh("cat /run/tick").split()]
    _virsh(lab, "node1", "migrate", "--live", "--p2p", "--unsafe", "probe", f"qemu+tcp://{lab.ip('node2')}/system")
    agent = _agent(lab, "node2")
    agent.wait(20)
    after = [int(n) for n in agent.sh("cat /run/tick").split()]
    print(f"tick before {before}, after {after}")
    assert after[0] > before[0]
    assert after[1] > before[1]
    assert after[2] < 500, "no gap of 5 s in the guest's own time"
    assert _virsh(lab, "node1", "list", "--name").strip() == ""
    # in the other subnet now: a bounce of the link makes it ask again
    for state in ("down", "up"):
        _virsh(lab, "node2", "domif-setlink", "probe", "52:54:00:00:00:07", state)
    print(f"new address after {_wait_address(agent, '10.128.4.7/22'):.1f} s")
    _virsh(lab, "node2", "shutdown", "probe", "--mode", "acpi")
    deadline = time.monotonic() + 60
    while _virsh(lab, "node2", "list", "--name").strip():
        assert time.monotonic() < deadline, "the power button does nothing"
        time.sleep(0.2)
    for node in ("node1", "node2"):
        _virsh(lab, node, "net-destroy", "probe")
