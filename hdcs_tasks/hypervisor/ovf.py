"""OVF: the machine in an OVA. Read from strangers' XML, written for others to read. Bytes in, values out; no I/O.

An entity can name a file or grow without end, so a document with a DTD is refused and none is ever resolved.
Source: DMTF DSP0243 2.1; resource types by CIM_ResourceAllocationSettingData (3 processor, 4 memory, 17 disk).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from lxml import etree

from hdcs_tasks.errors import Invalid

OVF_MAX_BYTES = 4 << 20
_OVF = "http://schemas.dmtf.org/ovf/envelope/1"
_RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
_VSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
STREAM_VMDK = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
_PROCESSOR, _MEMORY, _CONTROLLER, _NIC, _DISK = 3, 4, 20, 10, 17
_POWER = re.compile(r"^\s*byte\s*(?:\*\s*(2|10)\s*\^\s*(\d{1,2}))?\s*$")
_WORDS = {"": 1, "byte": 1, "bytes": 1, "kb": 1 << 10, "kilobytes": 1 << 10, "mb": 1 << 20, "megabytes": 1 << 20,
          "gb": 1 << 30, "gigabytes": 1 << 30, "tb": 1 << 40, "terabytes": 1 << 40}  # fmt: skip


@dataclass(frozen=True)
class OvfDisk:
    """A disk of the machine. ``file``: the archive's member that holds it, None for an empty disk."""

    file: str | None
    capacity_bytes: int
    compressed: bool = False


@dataclass(frozen=True)
class Machine:
    """The shape of the machine in an OVF; ``disks`` in the order it would boot them."""

    name: str
    vcpus: int
    memory_mib: int
    disks: tuple[OvfDisk, ...]
    system: str = ""


def _refuse(why: str) -> Invalid:
    return Invalid(f"the OVF is refused: {why}", next="Export the machine again, as OVF 1.x or 2.x with one machine")


def read(text: bytes) -> Machine:
    """The machine of an OVF document. Raises Invalid."""
    if len(text) > OVF_MAX_BYTES:
        raise _refuse(f"it has over {OVF_MAX_BYTES} bytes")
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False,
        remove_comments=True, remove_pis=True,
    )  # fmt: skip
    try:
        root = etree.fromstring(text, parser)
    except etree.XMLSyntaxError as error:
        raise _refuse(f"it cannot be read: {error}") from error
    if root.getroottree().docinfo.doctype:  # type: ignore[union-attr]
        raise _refuse("it has a document type definition")
    systems = root.findall(".//{*}VirtualSystem")
    if _local(root) != "Envelope" or len(systems) != 1:
        raise _refuse(f"it describes {len(systems)} machines")
    return _machine(root, systems[0])


def _machine(root: etree._Element, system: etree._Element) -> Machine:
    files = {_attribute(f, "id"): f for f in root.findall("./{*}References/{*}File")}
    disks = {_attribute(d, "diskId"): d for d in root.findall("./{*}DiskSection/{*}Disk")}
    vcpus, memory_mib, order = 1, 512, []
    for item in system.findall("./{*}VirtualHardwareSection/*"):
        kind = _text(item, "ResourceType")
        if kind == str(_PROCESSOR):
            vcpus = _number(_text(item, "VirtualQuantity"), "vCPUs")
        elif kind == str(_MEMORY):
            units = _text(item, "AllocationUnits") or "MegaBytes"
            memory_mib = _number(_text(item, "VirtualQuantity"), "memory") * _unit(units) >> 20
        elif kind == str(_DISK):
            order.append(_disk_of(_text(item, "HostResource"), disks))
    found = [disk for disk in order if disk is not None] or list(disks.values())
    name = _text(system, "Name") or _attribute(system, "id")
    guest = system.find("./{*}OperatingSystemSection/{*}Description")
    if not 1 <= vcpus <= 512 or not 1 <= memory_mib <= 16 << 20:
        raise _refuse(f"{vcpus} vCPUs and {memory_mib} MiB are no machine")
    return Machine(
        name[:255], vcpus, memory_mib, tuple(_disk(disk, files) for disk in found),
        (guest.text or "")[:255] if guest is not None else "",
    )  # fmt: skip


def _disk_of(resource: str, disks: dict[str, etree._Element]) -> etree._Element | None:
    return disks.get(resource.rpartition("/disk/")[2]) if "disk/" in resource else None


def _disk(disk: etree._Element, files: dict[str, etree._Element]) -> OvfDisk:
    units = _attribute(disk, "capacityAllocationUnits") or "byte"
    capacity = _number(_attribute(disk, "capacity"), "capacity") * _unit(units)
    if _attribute(disk, "parentRef"):
        raise _refuse("a disk stands on another")
    reference = _attribute(disk, "fileRef")
    if not reference:
        return OvfDisk(None, capacity)
    if reference not in files:
        raise _refuse(f"a disk is in file {reference!r}, which it does not list")
    file = files[reference]
    if _attribute(file, "chunkSize"):
        raise _refuse("a disk is cut into chunks")
    href = unquote(_attribute(file, "href"))
    return OvfDisk(href, capacity, compressed=_attribute(file, "compression") not in ("", "identity"))


def _local(element: etree._Element) -> str:
    return str(etree.QName(element).localname)


def _text(element: etree._Element, name: str) -> str:
    return (element.findtext(f"./{{*}}{name}") or "").strip()


def _attribute(element: etree._Element, name: str) -> str:
    """By local name: writers disagree about the prefix."""
    for key, value in element.attrib.items():
        if str(key).rpartition("}")[2] == name:
            return str(value)
    return ""


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise _refuse(f"{text!r} is no number of {what}")
    return int(text)


def _unit(text: str) -> int:
    power = _POWER.match(text)
    if power and int(power[2] or 0) <= 50:
        return int(int(power[1] or 1) ** int(power[2] or 0))
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    raise _refuse(f"the unit {text[:40]!r} is not known")


# --- writing


def write(machine: Machine, sizes: dict[str, int]) -> bytes:
    """An OVF document of ``machine``, whose disks are streamOptimized VMDKs; ``sizes``: bytes of each file."""
    root = etree.Element(_o("Envelope"), nsmap={"ovf": _OVF, "rasd": _RASD, "vssd": _VSSD})
    references = etree.SubElement(root, _o("References"))
    section = etree.SubElement(root, _o("DiskSection"))
    etree.SubElement(section, _o("Info")).text = "Virtual disks"
    for number, disk in enumerate(machine.disks):
        assert disk.file is not None
        file = {"id": f"file{number}", "href": disk.file, "size": str(sizes[disk.file])}
        etree.SubElement(references, _o("File"), _attributes(file))
        etree.SubElement(section, _o("Disk"), _attributes({
            "diskId": f"vmdisk{number}", "fileRef": f"file{number}", "capacity": str(disk.capacity_bytes),
            "capacityAllocationUnits": "byte", "format": STREAM_VMDK,
        }))  # fmt: skip
    network = etree.SubElement(root, _o("NetworkSection"))
    etree.SubElement(network, _o("Info")).text = "Networks"
    etree.SubElement(network, _o("Network"), _attributes({"name": "network"}))
    system = etree.SubElement(root, _o("VirtualSystem"), _attributes({"id": machine.name}))
    etree.SubElement(system, _o("Info")).text = "A virtual machine"
    etree.SubElement(system, _o("Name")).text = machine.name
    os_section = etree.SubElement(system, _o("OperatingSystemSection"), _attributes({"id": "1"}))
    etree.SubElement(os_section, _o("Info")).text = "Not known"
    _hardware(etree.SubElement(system, _o("VirtualHardwareSection")), machine)
    return bytes(etree.tostring(root, xml_declaration=True, encoding="UTF-8", pretty_print=True))


def _hardware(section: etree._Element, machine: Machine) -> None:
    etree.SubElement(section, _o("Info")).text = "Virtual hardware"
    system = etree.SubElement(section, _o("System"))
    for name, value in (("ElementName", "Virtual Hardware Family"), ("InstanceID", "0"),
                        ("VirtualSystemIdentifier", machine.name), ("VirtualSystemType", "vmx-10")):  # fmt: skip
        etree.SubElement(system, f"{{{_VSSD}}}{name}").text = value
    _item(section, 1, _PROCESSOR, f"{machine.vcpus} vCPUs", VirtualQuantity=str(machine.vcpus))
    _item(section, 2, _MEMORY, f"{machine.memory_mib} MiB of memory", AllocationUnits="byte * 2^20",
          VirtualQuantity=str(machine.memory_mib))  # fmt: skip
    _item(section, 3, _CONTROLLER, "SATA controller", Address="0", ResourceSubType="AHCI")
    for number in range(len(machine.disks)):
        _item(section, 4 + number, _DISK, f"Disk {number}", AddressOnParent=str(number),
              HostResource=f"ovf:/disk/vmdisk{number}", Parent="3")  # fmt: skip
    _item(section, 4 + len(machine.disks), _NIC, "Network adapter", AutomaticAllocation="true", Connection="network",
          ResourceSubType="E1000")  # fmt: skip


def _item(section: etree._Element, number: int, kind: int, name: str, **fields: str) -> None:
    item = etree.SubElement(section, _o("Item"))
    values = fields | {"ElementName": name, "InstanceID": str(number), "ResourceType": str(kind)}
    for key in sorted(values):  # the schema wants them in this order
        etree.SubElement(item, f"{{{_RASD}}}{key}").text = values[key]


def _o(name: str) -> str:
    return f"{{{_OVF}}}{name}"


def _attributes(values: dict[str, str]) -> dict[str, str]:
    return {_o(key): value for key, value in values.items()}
