"""libvirt XML against libvirt's own RelaxNG schemas, and that no value can break out of its place."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from lxml import etree

from hdcs_tasks.errors import Invalid
from hdcs_tasks.hypervisor import networks, storage, validation, xml
from hdcs_tasks.hypervisor.spec import GuestSpec, usb_rules

SCHEMAS = Path("/usr/share/libvirt/schemas")
VM_ID = "6f0c3a52-9d2e-4c4f-8a4e-0d0a51e2a001"
SPEC = GuestSpec(
    vm_id=VM_ID, name="desk-001", vcpus=2, memory_mib=512, disks=(f"/srv/hdcs/vms/{VM_ID}/disk0.qcow2",),
    mac="52:54:00:AA:00:01", network="hdcs", console_port=20001, operation="op-1", step="st-1", attempt=3,
)  # fmt: skip


@lru_cache
def schema(name: str) -> etree.RelaxNG:
    if not SCHEMAS.is_dir():
        pytest.skip("libvirt's schemas are not installed")
    return etree.RelaxNG(etree.parse(SCHEMAS / f"{name}.rng"))


def valid(name: str, text: str) -> None:
    checked = schema(name)
    assert checked.validate(etree.fromstring(text)), checked.error_log


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"virt_type": "kvm"},
        {"usb": "on"},
        {"usb": "0x08,-1,-1,-1,1|0x03,0x046d,0xC077,-1,1|-1,-1,-1,-1,0"},
        {"disks": (SPEC.disks[0], "/srv/hdcs/vms/x/disk1.qcow2"), "serial_log": "/var/log/desk.log"},
        {"kernel": "/boot/vmlinuz", "initrd": "/boot/initrd", "cmdline": "console=ttyS0 a=<&>'\""},
        {"console_listen": "::1", "operation": "<&>\"'", "step": "]]>"},
    ],
)
def test_guest_definition_is_valid(changes: dict[str, object]) -> None:
    spec = replace(SPEC, **changes)
    text = xml.guest_xml(spec, "a&<b>\"'c")
    valid("domain", text)
    seen = xml.read_guest(text, "running")
    assert (seen.vm_id, seen.name, seen.vcpus, seen.mac) == (VM_ID, "desk-001", 2, "52:54:00:aa:00:01")
    assert (seen.operation, seen.step, seen.attempt) == (spec.operation, spec.step, 3)
    assert seen.console_port == 20001
    assert seen.disks == spec.disks
    assert xml.is_hdcs(text)


def test_libvirt_checks_each_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_checked", set())
    first = xml.guest_xml(SPEC, "6fe1")
    assert validation.define_flags(first), "the first of its shape is checked"
    assert validation.define_flags(first), "and again while libvirt has not taken it"
    validation.was_defined(first)
    other_id = VM_ID.replace("6f0c3a52", "6f0c3a53")
    twin = replace(
        SPEC, vm_id=other_id, name="desk-2", disks=(f"/srv/hdcs/vms/{other_id}/disk0.qcow2",), vcpus=4, memory_mib=4096,
        mac="52:54:00:aa:00:02", console_port=20002, operation="op-2", step="st-2", attempt=1,
    )  # fmt: skip
    assert not validation.define_flags(xml.guest_xml(twin, "8aa0"))
    for changes in ({"usb": "on"}, {"virt_type": "kvm"}, {"network": ""}, {"disks": (*SPEC.disks, "/x/disk1.qcow2")}):
        assert validation.define_flags(xml.guest_xml(replace(SPEC, **changes), "6fe1")), changes
    assert validation.define_flags(first.replace("<memory", "<memori"))


def test_the_schema_check_can_fail() -> None:
    with pytest.raises(AssertionError):
        valid("domain", xml.guest_xml(SPEC, "x").replace("<vcpu", "<vkpu").replace("/vcpu>", "/vkpu>"))


def test_console_ticket_has_expired_at_the_start() -> None:
    graphics = etree.fromstring(xml.guest_xml(SPEC, "secret")).find("devices/graphics")
    assert graphics.get("passwd") == "secret"
    assert graphics.get("passwdValidTo") == "1970-01-01T00:00:01"


def test_values_cannot_become_elements() -> None:
    evil = "x'/><disk type='file'/><y a='"
    spec = replace(SPEC, operation=evil, disks=("/srv/<disk>&.qcow2",))
    tree = etree.fromstring(xml.guest_xml(spec, evil))
    assert len(tree.findall("devices/disk")) == 1
    assert tree.find("devices/disk/source").get("file") == "/srv/<disk>&.qcow2"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../etc/passwd"}, {"name": "a/b"}, {"name": "<x>"}, {"name": ""}, {"name": "a\nb"},
        {"vm_id": "../x"}, {"vm_id": "desk-001"}, {"mac": "52:54:00:00:00"}, {"network": "a b"},
        {"disks": ("disk.qcow2",)}, {"disks": ("/srv/../etc/shadow",)}, {"disks": ("/srv/a\nb",)},
        {"usb": "0x08"}, {"usb": "0x08,-1,-1,-1,2"}, {"console_listen": "localhost"}, {"virt_type": "xen"},
        {"vcpus": 0}, {"memory_mib": 1}, {"console_port": 0}, {"disk_cache": "fast"},
    ],
)  # fmt: skip
def test_nonsense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        replace(SPEC, **changes)


def test_spec_travels_as_json() -> None:
    import json

    assert GuestSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC
    assert GuestSpec.from_dict({**SPEC.to_dict(), "of_a_newer_version": 1}) == SPEC
    with pytest.raises(Invalid):
        GuestSpec.from_dict({"vm_id": VM_ID})


def test_usb_off_leaves_nothing_to_plug_into() -> None:
    off = etree.fromstring(xml.guest_xml(SPEC, "x"))
    assert [c.get("model") for c in off.findall("devices/controller[@type='usb']")] == ["none"]
    assert off.find("devices/redirdev") is None
    on = etree.fromstring(xml.guest_xml(replace(SPEC, usb="on"), "x"))
    assert on.find("devices/redirdev") is not None
    assert on.find("devices/redirfilter") is None


def test_usb_policy_is_read_in_order() -> None:
    first, second = usb_rules("0x08,0x0951,-1,-1,1|-1,-1,-1,-1,0")
    assert (first.usb_class, first.vendor, first.product, first.allow) == (8, 0x0951, None, True)
    assert (second.usb_class, second.allow) == (None, False)


def test_restore_changes_attempt_and_console_only() -> None:
    saved = xml.guest_xml(SPEC, "old")
    new = xml.readdress(saved, replace(SPEC, step="st-2", attempt=1, console_port=20777), "new")
    valid("domain", new)
    seen = xml.read_guest(new, "running")
    assert (seen.step, seen.attempt, seen.console_port) == ("st-2", 1, 20777)
    assert len(etree.fromstring(new).findall("devices/graphics")) == 1
    assert len(etree.fromstring(new).findall("devices/video")) == 1


def test_link_is_pulled_on_the_right_interface() -> None:
    text = xml.guest_xml(SPEC, "x")
    assert xml.with_link(text, "52:54:00:00:00:99", up=False) is None
    pulled = etree.fromstring(xml.with_link(text, SPEC.mac, up=False))
    assert [link.get("state") for link in pulled.findall("link")] == ["down"]
    again = etree.fromstring(xml.with_link(f"<d><devices>{etree.tostring(pulled).decode()}</devices></d>", "", up=True))
    assert [link.get("state") for link in again.findall("link")] == ["up"]


@pytest.mark.parametrize("forward", networks.FORWARD_MODES)
def test_network_is_valid_and_read_back(forward: str) -> None:
    spec = networks.NetworkSpec("hdcs", "10.128.4.0/22", forward, 600)
    text = networks.network_xml(spec)
    valid("network", text)
    assert networks.read_network(text) == spec
    assert networks.read_dhcp_hosts(text) == []
    assert spec.gateway == "10.128.4.1"


def test_network_differences_are_seen() -> None:
    spec = networks.NetworkSpec("hdcs", "10.128.4.0/22")
    text = networks.network_xml(spec)
    assert networks.read_network(text.replace("10.128.4.1", "10.128.4.2")) != spec
    assert networks.read_network(text.replace("br-hdcs", "br-else")) is None
    assert networks.read_network(text.replace("<dhcp>", "<dhcp><range start='10.128.4.9' end='10.128.4.99'/>")) is None


@pytest.mark.parametrize(
    "bad",
    [("hdcs", "10.0.0.1/22"), ("hdcs", "10.0.0.0/30"), ("hdcs", "x"), ("<a>", "10.0.0.0/22"), ("a/../b", "10.0.0.0/8")],
)
def test_bad_networks_are_refused(bad: tuple[str, str]) -> None:
    with pytest.raises(Invalid):
        networks.NetworkSpec(*bad)


def test_bridge_names_fit_the_kernel() -> None:
    names = ["hdcs", "a" * 63, "a" * 62 + "b", "hdcs-office-1", "hdcs-office-12"]
    bridges = [networks.NetworkSpec(name, "10.0.0.0/22").bridge for name in names]
    assert all(len(bridge) <= 15 for bridge in bridges)
    assert len(set(bridges)) == len(names)


def test_dhcp_host_element_escapes() -> None:
    entry = networks.DhcpHost("52:54:00:00:00:01", "10.0.0.2", "a'<b")
    assert etree.fromstring(etree.tostring(etree.fromstring(_text(entry)))).get("name") == "a'<b"


def _text(entry: networks.DhcpHost) -> str:
    from xml.etree import ElementTree as ET

    return ET.tostring(networks.host_element(entry, 300), encoding="unicode")


def test_storage_pool_is_valid() -> None:
    valid("storagepool", storage.pool_xml("hdcs-images", Path("/srv/<hdcs>&/images")))
