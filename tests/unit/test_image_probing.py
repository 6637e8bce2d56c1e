"""Images of strangers: each way an image may name what is not its own, with a crafted file that does."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcs_tasks.errors import Invalid, NotFound, Rejected
from hdcs_tasks.hypervisor import probing
from hdcs_tasks.hypervisor.headers import read_header
from hdcs_tasks.hypervisor.processes import run

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img") and not os.environ.get("CI"), reason="needs qemu-img")

MIB = 1 << 20
MAX = 64 * MIB
FORMATS = ("qcow2", "vmdk", "vdi", "vhdx", "vpc")


def tool(*argv: object) -> None:
    subprocess.run([str(a) for a in argv], check=True, capture_output=True)


def create(path: Path, *options: object, fmt: str = "qcow2", size: str = "8M") -> Path:
    tool("qemu-img", "create", "-q", "-u", "-f", fmt, *options, path, size)
    return path


def refused(path: Path, root: Path, match: str, **more: object) -> None:
    with pytest.raises(Rejected, match=match) as caught:
        probing.probe(path, root, max_bytes=MAX, **more)  # type: ignore[arg-type]
    assert caught.value.next


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The import folder; beside it a secret that must never be read."""
    (tmp_path / "secret.qcow2").touch()
    create(tmp_path / "secret.qcow2")
    made = tmp_path / "import"
    made.mkdir()
    return made


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_is_known_by_its_header(root: Path, fmt: str) -> None:
    path = create(root / "disk", *(["-o", "force_size=on"] if fmt == "vpc" else []), fmt=fmt)
    found = probing.probe(path, root, max_bytes=MAX)
    assert (found.format, found.virtual_bytes, found.chain) == (fmt, 8 * MIB, (path,))
    assert found.needed_bytes is not None
    refused(path, root, f"content is {'vhd' if fmt == 'vpc' else fmt}, not raw", fmt="raw")


def test_a_raw_disk_is_never_guessed(root: Path) -> None:
    for name in ("disk", "disk.qcow2", "disk.vmdk"):
        (root / name).write_bytes(bytes(MIB))
        refused(root / name, root, "no image format")
    (root / "disk.img").write_bytes(bytes(MIB))
    assert probing.probe(root / "disk.img", root, max_bytes=MAX).format == "raw"
    assert probing.probe(root / "disk", root, fmt="raw", max_bytes=MAX).virtual_bytes == MIB
    refused(root / "disk", root, "not known", fmt="iso")
    # A guest can write any header into its raw disk: said to be raw, it is refused instead of followed.
    shutil.copy(create(root / "evil.qcow2", "-b", "/etc/shadow", "-F", "raw"), root / "evil.img")
    refused(root / "evil.img", root, "content is qcow2, not raw", fmt="raw")


@pytest.mark.parametrize(
    ("backing", "match"),
    [
        ("/etc/shadow", "outside"), ("../secret.qcow2", "outside"), ("../../../../etc/shadow", "outside"),
        ("nbd://127.0.0.1:1/x", "is not a file"), ("nbd:unix:/tmp/x", "is not a file"),
        ('json:{"driver":"file","filename":"/etc/shadow"}', "is not a file"),
        ("fat:/etc", "is not a file"), ("ssh://host/x", "is not a file"), ("missing.qcow2", "no file"),
        ("/dev/null", "outside"), ("a\nb", "is not a file"),
    ],
)  # fmt: skip
def test_no_backing_image_leads_outside(root: Path, backing: str, match: str) -> None:
    refused(create(root / "top.qcow2", "-b", backing, "-F", "raw"), root, match)


def test_nor_does_one_further_down(root: Path) -> None:
    create(root / "0.qcow2", "-b", "/etc/shadow", "-F", "raw")
    for number in range(3):
        create(root / f"{number + 1}.qcow2", "-b", f"{number}.qcow2", "-F", "qcow2")
    refused(root / "3.qcow2", root, "outside")
    create(root / "0.qcow2")
    assert len(probing.probe(root / "3.qcow2", root, max_bytes=MAX).chain) == 4


def test_nor_a_link(root: Path, tmp_path: Path) -> None:
    (root / "link.qcow2").symlink_to(tmp_path / "secret.qcow2")
    refused(root / "link.qcow2", root, "outside")
    refused(create(root / "top.qcow2", "-b", "link.qcow2", "-F", "qcow2"), root, "outside")
    (root / "folder").symlink_to(tmp_path)
    refused(create(root / "top.qcow2", "-b", "folder/secret.qcow2", "-F", "qcow2"), root, "outside")
    (root / "loop").symlink_to(root / "loop")
    refused(root / "loop", root, "cannot be followed|no file|Symlink|symbolic")


def test_a_chain_that_bites_its_tail_ends(root: Path) -> None:
    create(root / "a.qcow2", "-b", "b.qcow2", "-F", "qcow2")
    create(root / "b.qcow2", "-b", "a.qcow2", "-F", "qcow2")
    refused(root / "a.qcow2", root, "over 16 images")


def test_a_backing_image_without_a_format_is_not_guessed(root: Path) -> None:
    base = create(root / "base.qcow2")
    top = create(root / "top.qcow2", "-b", "base.qcow2", "-F", "qcow2")
    data = bytearray(top.read_bytes())
    at = data.index(struct.pack(">I", 0xE2792ACA))
    data[at : at + 4] = struct.pack(">I", 0x12345678)
    top.write_bytes(bytes(data))
    refused(top, root, "does not say the format")
    refused(create(root / "as-raw.qcow2", "-b", base.name, "-F", "raw"), root, "is qcow2, not raw")


def test_no_data_file(root: Path, tmp_path: Path) -> None:
    path = root / "data.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/other.raw", path, "1M")
    refused(path, root, "another file")


def test_an_encrypted_image_is_refused(root: Path) -> None:
    path = create(root / "x.qcow2")
    data = bytearray(path.read_bytes())
    data[32:36] = struct.pack(">I", 1)
    path.write_bytes(bytes(data))
    refused(path, root, "encrypted")


def descriptor(*extents: str, parent: str = "ffffffff") -> str:
    lines = ["# Disk DescriptorFile", "version=1", "CID=fffffffe", f"parentCID={parent}",
             'createType="monolithicFlat"', *extents, 'ddb.adapterType = "ide"']  # fmt: skip
    return "\n".join(lines) + "\n" + " " * 512


@pytest.mark.parametrize(
    "name",
    ["/etc/shadow", "../secret.qcow2", "/dev/zero", "nbd://127.0.0.1:1/x", "json:{}", "sub/part.vmdk", "..", "a\tb"],
)
def test_a_vmdk_names_no_file_but_those_beside_it(root: Path, name: str) -> None:
    path = root / "evil.vmdk"
    path.write_text(descriptor(f'RW 128 FLAT "{name}" 0'))
    refused(path, root, "its content lies in")
    path.write_text(descriptor('RW 128 FLAT "part.vmdk" 0', f'RW 128 FLAT "{name}" 0'))
    (root / "part.vmdk").write_bytes(bytes(65536))
    refused(path, root, "its content lies in")


def test_a_vmdk_in_parts_is_taken_if_they_are_plain_files(root: Path, tmp_path: Path) -> None:
    path = create(root / "parts.vmdk", "-o", "subformat=twoGbMaxExtentFlat", fmt="vmdk")
    assert probing.probe(path, root, max_bytes=MAX).virtual_bytes == 8 * MIB
    part = next(root.glob("parts-f*"))
    part.unlink()
    refused(path, root, "no file")
    part.symlink_to(tmp_path / "secret.qcow2")
    refused(path, root, "its content lies in")
    part.unlink()
    os.mkfifo(part)
    refused(path, root, "no plain file")


def test_a_vmdk_whose_content_is_elsewhere_though_it_looks_sparse(root: Path) -> None:
    """Capacity 0 means: the content is where the embedded descriptor says."""
    path = create(root / "sparse.vmdk", fmt="vmdk")
    data = bytearray(path.read_bytes())
    data[12:20] = bytes(8)
    at = struct.unpack_from("<Q", data, 28)[0] * 512
    text = descriptor('RW 128 FLAT "/etc/shadow" 0').encode()
    data[at : at + len(text)] = text
    path.write_bytes(bytes(data))
    refused(path, root, "its content lies in '/etc/shadow'")


def test_a_vmdk_snapshot_is_refused(root: Path) -> None:
    path = root / "delta.vmdk"
    path.write_text(descriptor('RW 128 FLAT "part.vmdk" 0', parent="12345678"))
    refused(path, root, "snapshot")


def test_a_differencing_vhd_is_refused(root: Path) -> None:
    path = create(root / "disk.vhd", fmt="vpc")
    data = bytearray(path.read_bytes())
    for at in (0, len(data) - 512):
        data[at + 60 : at + 64] = struct.pack(">I", 4)
    path.write_bytes(bytes(data))
    refused(path, root, "differencing")


def test_size_and_kind_are_bounded(root: Path) -> None:
    refused(create(root / "huge.qcow2", size="1T"), root, "virtual size is 1099511627776")
    (root / "empty.img").touch()
    refused(root / "empty.img", root, "virtual size is 0")
    os.mkfifo(root / "pipe.img")
    refused(root / "pipe.img", root, "neither a file nor a block device")
    refused(root, root, "neither a file nor")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s.img"))
        refused(root / "s.img", root, "No such device")
    with pytest.raises(NotFound):
        probing.probe(root / "none.qcow2", root, max_bytes=MAX)


def test_qemu_img_is_never_asked_about_a_refused_image(root: Path) -> None:
    """It would open what the image names: a listener sees that nobody comes."""
    came = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1.0)

        def listen() -> None:
            try:
                came.append(server.accept())
            except TimeoutError:
                return

        thread = threading.Thread(target=listen)
        thread.start()
        path = root / "evil.vmdk"
        path.write_text(descriptor(f'RW 128 FLAT "nbd://127.0.0.1:{server.getsockname()[1]}/x" 0'))
        refused(path, root, "its content lies in")
        thread.join()
    assert came == []


def test_the_limits_hold(tmp_path: Path) -> None:
    """A child that eats memory or time, or writes, ends; the probe asks with these limits."""
    shell = ["python3", "-c"]
    for code, limits in (
        ("x = bytearray(1 << 30)", {"memory_mib": 256}), ("while True: pass", {"cpu_s": 1}),
        (f"open({str(tmp_path / 'w')!r}, 'wb', buffering=0).write(bytes(100))", {"file_bytes": 0}),
        ("x = [open('/dev/null') for _ in range(100)]", {"files_max": 32}),
    ):  # fmt: skip
        with pytest.raises(Exception, match=r"signal|exit code"):
            run([*shell, code], timeout_s=60, **limits)  # type: ignore[arg-type]


def test_what_the_header_says_is_what_qemu_says(root: Path) -> None:
    """The reader of headers and qemu-img agree about every name, or one could be fooled by the other."""
    create(root / "base.qcow2")
    for number, options in enumerate((["-o", "compat=0.10"], ["-o", "compat=1.1"], ["-o", "cluster_size=2M"])):
        top = create(root / f"{number}.qcow2", "-b", "base.qcow2", "-F", "qcow2", *options)
        data = top.read_bytes()
        mine = read_header(lambda at, length, data=data: data[at : at + length], len(data))  # type: ignore[misc]
        answer = subprocess.run(
            ["qemu-img", "info", "--output=json", top], check=True, capture_output=True, text=True
        )  # fmt: skip
        theirs = json.loads(answer.stdout)
        assert mine.backing == theirs["backing-filename"]
        assert mine.backing_format == theirs.get("backing-filename-format")


@settings(max_examples=300, deadline=None)
@given(
    magic=st.sampled_from([b"QFI\xfb", b"KDMV", b"# Disk DescriptorFile\n", b"conectix", b"vhdxfile", b"COWD", b""]),
    body=st.binary(max_size=700),
)
def test_no_header_breaks_the_reader(magic: bytes, body: bytes) -> None:
    data = magic + body
    try:
        found = read_header(lambda at, length: data[at : at + length] if at >= 0 <= length else b"", len(data))
    except Invalid:
        return
    assert found.format in probing.FORMATS
