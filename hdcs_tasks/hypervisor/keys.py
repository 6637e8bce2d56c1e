"""Keys of encrypted disks and backups: where a server node has them from, and how QEMU and libvirt get them.

A key has a name, and only the name travels: in specs, manifests and the record. Its content is read on the server node,
from a file of ``HDCS_KEYS_DIR`` or from the program ``HDCS_KEY_COMMAND``; qemu-img gets it in an anonymous file of
memory whose number is all that ``ps`` shows, libvirt as a secret that is private (nobody reads it back) and
ephemeral (never on its disk).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from hdcs_tasks.errors import HypervisorRefused, NotFound, Rejected
from hdcs_tasks.hypervisor import processes
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors
from hdcs_tasks.routing import check_name

KEY_MIN_BYTES = 16
KEY_MAX_BYTES = 512
_COMMAND_S = 30.0
_TRIES = 8
CREATE_S = 600.0
"""How long an encrypted file may take to be made on a busy machine; it takes about 2 s of CPU time."""
_CREATE_CPU_S = 20


@dataclass(frozen=True)
class Key:
    """A LUKS passphrase; its content shows in no text made of it.

    ``container``: the file it opens is not a qcow2 with LUKS inside, but a LUKS container with a qcow2 in it
    (``containers.py``)."""

    name: str
    content: bytes = field(repr=False)
    container: bool = False

    @property
    def id(self) -> str:
        """Its name among QEMU's objects."""
        return f"key-{self.name}"


Keys = Sequence[Key | None]
"""Of a file and what lies below it, the file itself first; None, or what is missing at the end: in clear."""


class KeyRing:
    """The keys a server node can read. Reads anew each time: a key that was replaced is the new one."""

    def __init__(self, folder: Path | None = None, command: str = "") -> None:
        self.folder = folder
        self.command = command

    @classmethod
    def of(cls, settings: Any) -> KeyRing:
        return cls(settings.keys_dir, settings.key_command)

    def get(self, name: str) -> Key:
        """The key of this name. Raises NotFound (not on this server node), Rejected (unfit, or others may read it)."""
        check_name("key", name)
        content = self._ask(name) if self.command else self._read(name)
        content = content.rstrip(b"\r\n")
        if not KEY_MIN_BYTES <= len(content) <= KEY_MAX_BYTES or not content.isascii() or b"\0" in content:
            raise Rejected(
                f"key {name} is unfit: {len(content)} bytes", next=f"Use {KEY_MIN_BYTES} to {KEY_MAX_BYTES} of ASCII"
            )
        return Key(name, content)

    def find(self, name: str | None) -> Key | None:
        """None for no name (nothing is encrypted); else as ``get``."""
        return self.get(name) if name else None

    def _read(self, name: str) -> bytes:
        missing = NotFound(
            f"key {name} is not on this server node", next=f"Put it into HDCS_KEYS_DIR ({self.folder}), mode 0600"
        )
        if self.folder is None:
            raise missing
        try:
            with (self.folder / name).open("rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    raise Rejected(f"others may read key {name}", next=f"chmod 600 {self.folder / name}")
                return file.read(KEY_MAX_BYTES + 3)
        except FileNotFoundError:
            raise missing from None
        except OSError as error:
            raise Rejected(f"key {name} cannot be read: {error.strerror}", next=f"Look at {self.folder}") from error

    def _ask(self, name: str) -> bytes:
        try:
            done = processes.run([*shlex.split(self.command), name], timeout_s=_COMMAND_S)
        except HypervisorRefused as error:  # without what the program wrote: that may be anything
            raise NotFound(
                f"HDCS_KEY_COMMAND gave no key {name} (exit code {error.details.get('exit_code')})",
                next=f"Run it by hand on this server node: {self.command} {name}",
            ) from None
        return done.stdout.encode()


# --- QEMU's tools


def opened(path: Path, keys: Keys) -> list[str]:
    """How qemu-img is told of a qcow2 file whose layers have these keys: arguments, its format included."""
    if not any(keys):
        return ["-f", "qcow2", str(path)]
    return [_json_name(path, keys)]


def _json_name(path: Path, keys: Keys, more: dict[str, str] | None = None) -> str:
    top = "file.file." if keys[0] is not None and keys[0].container else "file."
    said = {"driver": "qcow2", f"{top}driver": "file", f"{top}filename": os.path.abspath(path)}
    for depth, key in enumerate(keys):
        said |= {} if key is None else _opens("backing." * depth, key)
    return "json:" + json.dumps(said | (more or {}))


def _opens(node: str, key: Key) -> dict[str, str]:
    """What QEMU is told of one layer. The name of a container in a chain is the one in the header above it."""
    if key.container:
        return {f"{node}driver": "qcow2", f"{node}file.driver": "luks", f"{node}file.key-secret": key.id}
    return {f"{node}encrypt.key-secret": key.id}


def options(path: Path, key: Key) -> str:
    """An encrypted qcow2 file that stands on nothing, as ``--target-image-opts`` takes it."""
    name = os.path.abspath(path).replace(",", ",,")
    return f"driver=qcow2,file.driver=file,file.filename={name},encrypt.key-secret={key.id}"


def named(path: Path, keys: Keys) -> str:
    """As ``opened``, without the format."""
    return _json_name(path, keys) if any(keys) else str(path)


def named_with(path: Path, keys: Keys, depth: int) -> tuple[str, str]:
    """As ``named``; and a name for its layer ``depth`` files down, raw. A header holds 1023 bytes of a backing file's
    name: the keys of a chain of a dozen files are more, so that its layers are named by what is open already."""
    return _json_name(
        path, keys, {"backing." * depth + "node-name": "below"}
    ), 'json:{"driver": "raw", "file": "below"}'


def encryption(key: Key | None) -> list[str]:
    """Options of a file to be made. A key of 16 random bytes needs no slow derivation to be safe.

    SHA-512: QEMU times 32,768 rounds first, and those of SHA-256 can be too few for the clock: on a machine that counts
    CPU time by ticks a third of all tries failed, with this one in 180.
    """
    if key is None:
        return []
    return ["-o", f"encrypt.format=luks,encrypt.key-secret={key.id},encrypt.iter-time=10,encrypt.hash-alg=sha512"]


def run(program: Sequence[str], *arguments: str | Path, keys: Keys = (), **how: Any) -> processes.Finished:
    """``program`` (``["qemu-img", "convert"]``) with ``keys`` at hand as objects; else as ``processes.run``."""
    if program[-1] == "create" and any(keys):
        how["cpu_s"] = _CREATE_CPU_S
    with _objects(keys) as (objects, handles):
        argv = [*program, *objects, *map(str, arguments)]
        for left in range(_TRIES, 0, -1):
            try:
                return processes.run(argv, pass_fds=handles, **how)
            except HypervisorRefused as error:
                if left == 1 or not _mismeasured(error):
                    raise
    raise AssertionError("unreachable")


def _mismeasured(error: HypervisorRefused) -> bool:
    """QEMU measures its own speed to make a LUKS header: on a coarse clock it gives up, or never ends and is killed."""
    killed = error.details.get("exit_code") in (-signal.SIGXCPU, -signal.SIGKILL)
    return killed or "accurate CPU usage" in error.message


@contextmanager
def _objects(keys: Keys) -> Iterator[tuple[list[str], list[int]]]:
    arguments: list[str] = []
    handles: list[int] = []
    try:
        for key in {key.id: key for key in keys if key is not None}.values():
            handle = os.memfd_create("hdcs-key", os.MFD_CLOEXEC)
            handles.append(handle)
            os.write(handle, key.content)
            arguments += ["--object", f"secret,id={key.id},file=/dev/fd/{handle}"]
        yield arguments, handles
    finally:
        for handle in handles:
            os.close(handle)


# --- libvirt


def secret_id(name: str) -> str:
    """UUID of libvirt's secret for the key of this name, the same on every server node."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"hdcs:key:{name}"))


def give_to_libvirt(host: Host, key: Key | None) -> None:
    """Have the key as a secret in this host's libvirtd, which forgets it when it ends."""
    if key is None:
        return
    root = ET.Element("secret", ephemeral="yes", private="yes")
    ET.SubElement(root, "uuid").text = secret_id(key.name)
    ET.SubElement(root, "description").text = f"HDCS key {key.name}"
    with libvirt_errors(f"give libvirt key {key.name}"):
        secret = host.conn.secretDefineXML(ET.tostring(root, encoding="unicode"), 0)
        secret.setValue(key.content, 0)


def encryption_element(parent: ET.Element, name: str | None) -> None:
    """What says in a disk's XML that it is encrypted with the key of this name."""
    if name:
        made = ET.SubElement(parent, "encryption", format="luks")
        ET.SubElement(made, "secret", type="passphrase", uuid=secret_id(name))
