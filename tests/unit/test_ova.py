"""OVF and OVA: a machine's shape goes out and comes in the same; strangers' archives are not believed."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcs_tasks.errors import Cancelled, Invalid, NotFound
from hdcs_tasks.hypervisor import ova, ovf
from hdcs_tasks.hypervisor.ovf import Machine, OvfDisk

MIB = 1 << 20
MACHINE = Machine("office", 4, 8192, (OvfDisk("office-disk1.vmdk", 20 << 30),))
VMWARE = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope vmw:buildId="build-1" xmlns="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:vmw="http://www.vmware.com/schema/ovf"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
 <References><File ovf:href="win%2010.vmdk" ovf:id="f1" ovf:size="5"/>
  <File ovf:href="data.vmdk" ovf:id="f2"/></References>
 <DiskSection><Info/>
  <Disk ovf:capacity="40" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="d1" ovf:fileRef="f1"/>
  <Disk ovf:capacity="1024" ovf:capacityAllocationUnits="MegaBytes" ovf:diskId="d2" ovf:fileRef="f2"/>
  <Disk ovf:capacity="7" ovf:diskId="d3"/></DiskSection>
 <VirtualSystem ovf:id="win10"><Info/><Name>Windows 10</Name>
  <OperatingSystemSection ovf:id="1"><Info/><Description>Microsoft Windows 10 (64-bit)</Description>
  </OperatingSystemSection>
  <VirtualHardwareSection>
   <Item><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
   <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ResourceType>4</rasd:ResourceType>
    <rasd:VirtualQuantity>4096</rasd:VirtualQuantity></Item>
   <Item><rasd:HostResource>ovf:/disk/d2</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
   <Item><rasd:HostResource>ovf:/disk/d1</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
  </VirtualHardwareSection></VirtualSystem></Envelope>"""


def test_what_was_written_is_read() -> None:
    assert ovf.read(ovf.write(MACHINE, {"office-disk1.vmdk": 123})) == MACHINE


def test_another_writers_document_is_read() -> None:
    found = ovf.read(VMWARE.encode())
    assert (found.name, found.vcpus, found.memory_mib) == ("Windows 10", 2, 4096)
    assert found.system == "Microsoft Windows 10 (64-bit)"
    assert found.disks == (OvfDisk("data.vmdk", 1 << 30), OvfDisk("win 10.vmdk", 40 << 30)), "in boot order"


@given(
    name=st.text("abcXYZ019-_.äß<&\"'", min_size=1, max_size=40).map(str.strip).filter(bool),
    vcpus=st.integers(1, 512), memory=st.integers(1, 1 << 20), size=st.integers(1, 1 << 45),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_machine_survives_the_round(name: str, vcpus: int, memory: int, size: int) -> None:
    machine = Machine(name, vcpus, memory, (OvfDisk(f"{name}.vmdk", size),))
    again = ovf.read(ovf.write(machine, {f"{name}.vmdk": 1}))
    assert (again.name, again.vcpus, again.memory_mib, again.disks[0].capacity_bytes) == (name, vcpus, memory, size)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.replace("?>", '?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>', 1), "type definition"),
        (lambda t: t.replace("?>", '?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>', 1)
         .replace("Windows 10<", "&b;<"), "type definition"),
        (lambda t: t[:-20], "cannot be read"),
        (lambda t: t.replace("VirtualSystem ", "Other ").replace("/VirtualSystem>", "/Other>"), "0 machines"),
        (lambda t: t.replace("byte * 2^30", "byte * 2^99"), "unit"),
        (lambda t: t.replace('capacity="40"', 'capacity="-1"'), "no number"),
        (lambda t: t.replace('fileRef="f1"', 'fileRef="f9"'), "does not list"),
        (lambda t: t.replace(">2</rasd:VirtualQ", ">99999</rasd:VirtualQ"), "no machine"),
        (lambda t: t.replace('ovf:id="f1" ', 'ovf:id="f1" ovf:chunkSize="9" '), "chunks"),
        (lambda t: "x" * (5 << 20), "over"),
    ],
)  # fmt: skip
def test_strangers_documents_are_refused(change: Callable[[str], str], match: str) -> None:
    with pytest.raises(Invalid, match=match):
        ovf.read(change(VMWARE).encode())


# -- the archive


def pack(path: Path, *members: tuple[str, bytes], **fields: object) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return path


OVF = ovf.write(MACHINE, {"office-disk1.vmdk": 4})
DISK = ("office-disk1.vmdk", b"disk")


def manifest(**hashes: str) -> bytes:
    return "".join(f"SHA256({name})= {digest}\n" for name, digest in hashes.items()).encode()


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def good(tmp_path: Path, *, disk: bytes = b"disk", mf: bytes | None = None) -> Path:
    text = manifest(**{"office.ovf": sha(OVF), "office-disk1.vmdk": sha(b"disk")}) if mf is None else mf
    return pack(tmp_path / "x.ova", ("office.ovf", OVF), ("office.mf", text), ("office-disk1.vmdk", disk))


def test_the_hashes_are_checked(tmp_path: Path) -> None:
    archive = ova.read(good(tmp_path))
    told: list[float] = []
    ova.verify(archive, on_percent=told.append)
    assert told[-1] == 100.0
    named, member = archive.disk(None)
    assert (named.file, member.size_bytes) == ("office-disk1.vmdk", 4)
    assert archive.path.read_bytes()[member.offset : member.offset + 4] == b"disk"
    with pytest.raises(Invalid, match=r"office-disk1\.vmdk is not what its manifest says"):
        ova.verify(ova.read(good(tmp_path, disk=b"disc")))
    with pytest.raises(Cancelled):
        ova.verify(archive, cancelled=lambda: True)


def test_old_manifests_are_checked_too(tmp_path: Path) -> None:
    lines = f"SHA1(office.ovf)= {hashlib.sha1(OVF).hexdigest()}\r\nSHA1 (office-disk1.vmdk) = {'0' * 40}\r\n"
    with pytest.raises(Invalid, match="sha1 differs"):
        ova.verify(ova.read(good(tmp_path, mf=lines.encode())))


@pytest.mark.parametrize(
    ("mf", "match"),
    [
        (b"nonsense", "cannot be read"), (manifest(**{"office.ovf": "0" * 64}), "says nothing of office-disk1"),
        (manifest(**{"../x": "0" * 64}), "lacks"), (b"SHA256(office.ovf)= " + b"0" * 40, "cannot be read"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_vouch_is_refused(tmp_path: Path, mf: bytes, match: str) -> None:
    with pytest.raises(Invalid, match=match):
        ova.read(good(tmp_path, mf=mf))


@pytest.mark.parametrize(
    "name", ["../office.ovf", "/etc/cron.d/x", "a/../../b", "..", ".", "a\\b", "-rf", "x\n.ovf", ".hidden"]
)
def test_no_member_leads_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid, match=r"no plain file|no plain tar"):
        ova.read(pack(tmp_path / "x.ova", (name, OVF), DISK))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_only_plain_files(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.ova", "w") as archive:
        member = tarfile.TarInfo("office-disk1.vmdk")
        member.type, member.linkname = kind, "/etc/shadow"
        archive.addfile(member)
    with pytest.raises(Invalid, match="no plain file"):
        ova.read(tmp_path / "x.ova")


def test_sizes_are_those_the_archive_has(tmp_path: Path) -> None:
    path = good(tmp_path)
    cut = tmp_path / "cut.ova"
    cut.write_bytes(path.read_bytes()[:-12000])
    with pytest.raises(Invalid, match=r"cut off|no plain tar"):
        ova.read(cut)
    lie = bytearray(path.read_bytes())
    lie[124:136] = b"77777777777\0"
    lie[148:156] = b"        "
    lie[148:156] = b"%06o\0 " % sum(lie[:512])
    cut.write_bytes(bytes(lie))
    with pytest.raises(Invalid, match=r"cut off|no plain tar"):
        ova.read(cut)
    # A header that would be read into memory whole.
    huge = tarfile.TarInfo("x")
    huge.type, huge.size = tarfile.XHDTYPE, 8 << 30
    cut.write_bytes(huge.tobuf() + bytes(10240))
    with pytest.raises(Invalid, match="no plain tar"):
        ova.read(cut)
    many = pack(tmp_path / "many.ova", *((f"f{number}", b"") for number in range(70)))
    with pytest.raises(Invalid, match="over 64 members"):
        ova.read(many)
    with pytest.raises(Invalid, match="2 OVF"):
        ova.read(pack(tmp_path / "two.ova", ("a.ovf", OVF), ("b.ovf", OVF), DISK))
    with pytest.raises(Invalid, match="no plain file"):
        ova.read(pack(tmp_path / "same.ova", ("a.ovf", OVF), DISK, DISK))
    with pytest.raises(NotFound):
        ova.read(tmp_path / "none.ova")
    (tmp_path / "text.ova").write_text("no archive")
    with pytest.raises(Invalid, match="no plain tar"):
        ova.read(tmp_path / "text.ova")


def test_which_disk(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.ova", ("win.ovf", VMWARE.encode()), ("data.vmdk", b"d"), ("win 10.vmdk", b"w"))
    archive = ova.read(path)
    with pytest.raises(Invalid, match="has 2 disks"):
        archive.disk(None)
    assert archive.disk(2)[1].name == "win 10.vmdk"
    with pytest.raises(Invalid, match="no disk 3"):
        archive.disk(3)
    lacking = ova.read(pack(tmp_path / "y.ova", ("win.ovf", VMWARE.encode()), ("data.vmdk", b"d")))
    with pytest.raises(Invalid, match=r"lacks 'win 10\.vmdk'"):
        lacking.disk(2)
