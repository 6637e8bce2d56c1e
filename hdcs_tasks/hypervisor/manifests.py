"""The manifest beside each backup file: what it is, what it stands on, and a hash over the manifest itself.

A backup must be understood without the database, so a manifest says everything a restore needs. It is data from
disk: every field is checked on reading, and one that was edited by hand is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, cast
from uuid import UUID

from hdcs_tasks.errors import BackupBroken, Invalid
from hdcs_tasks.routing import check_name as check_label

FORMAT = 1
MANIFEST_MAX_BYTES = 1 << 20

Kind = Literal["full", "inc"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SEAL = "manifest_sha256"


@dataclass(frozen=True)
class BaseImage:
    """The image below the VM's own layer. ``sha256``, ``file_bytes``: of its file.

    ``key``: name of the key of the container it lies in (``containers.py``), with ``stored_sha256`` and
    ``stored_bytes`` of that; None where it lies in clear.
    """

    name: str
    version: int
    sha256: str
    format: str = "qcow2"
    file_bytes: int = 0
    key: str | None = None
    stored_sha256: str = ""
    stored_bytes: int = 0

    @property
    def file_sha256(self) -> str:
        """Of the file in the repository as it lies there, whose name it is, too."""
        return self.stored_sha256 if self.key else self.sha256

    @property
    def file_name(self) -> str:
        return f"{self.file_sha256}.{'luks' if self.key else self.format}"


@dataclass(frozen=True)
class Point:
    """One backup point = one file of a chain. ``parent``: id of the point it stands on (None for a full one).

    ``seq`` grows along the chain and is the file's name; numbers are missing where points were merged away.

    ``definition``: the VM's spec as JSON-able dict. ``disk_bytes``: what the guest sees; ``file_bytes``, ``sha256``:
    of the backup file. ``consistency``: "filesystem" or "crash". ``created_at``: UTC, ISO 8601.
    ``checkpoint_xml``: libvirt's record for ``checkpoints.redefine_checkpoints``; ``checkpoint`` its name.
    ``key``: name of the key the file is encrypted with (never the key), None in clear.
    """

    id: str
    vm_id: str
    chain: str
    seq: int
    kind: Kind
    parent: str | None
    checkpoint: str
    checkpoint_xml: str
    consistency: str
    definition: dict[str, Any]
    base: BaseImage | None
    disk_bytes: int = 0
    file_bytes: int = 0
    sha256: str = ""
    created_at: str = ""
    key: str | None = None
    format: int = FORMAT

    @property
    def file_name(self) -> str:
        return f"{self.seq:04d}.qcow2"

    @property
    def manifest_name(self) -> str:
        return f"{self.seq:04d}.json"


def stamped(point: Point, *, disk_bytes: int, file_bytes: int, sha256: str) -> Point:
    """``point`` with what is known only when its file is complete; the present is its time unless it has one."""
    now = point.created_at or datetime.now(UTC).isoformat(timespec="seconds")
    return replace(point, disk_bytes=disk_bytes, file_bytes=file_bytes, sha256=sha256, created_at=now)


def check_name(what: str, name: object) -> str:
    """``name`` if it is safe as a file name and in XML; else Invalid."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Invalid(f"{name!r} is not a name for a {what}", next="Use 1 to 64 of A-Z, a-z, 0-9, '_' and '-'")
    return name


def is_vm_id(vm_id: object) -> bool:
    try:
        return isinstance(vm_id, str) and str(UUID(vm_id)) == vm_id
    except ValueError:
        return False


def check_vm_id(vm_id: object) -> str:
    """``vm_id`` if it is a UUID in its usual writing; else Invalid."""
    if not is_vm_id(vm_id):
        raise Invalid(f"{vm_id!r} is not a VM id", next="A VM id is a UUID; see: hdcs vm list")
    return cast(str, vm_id)


def check_point(point: Point) -> Point:
    """``point`` if its fields fit together; else Invalid."""
    check_vm_id(point.vm_id)
    check_name("backup point", point.id)
    check_name("backup chain", point.chain)
    check_name("checkpoint", point.checkpoint)
    full = point.kind == "full"
    if point.kind not in ("full", "inc") or type(point.seq) is not int or not 1 <= point.seq <= 9999:
        raise Invalid(
            f"backup point {point.id} has kind {point.kind!r}, seq {point.seq!r}", next="Use full or inc, 1.."
        )
    if full != (point.parent is None) or (point.seq == 1 and not full):
        raise Invalid(
            f"backup point {point.id} is {point.kind}, seq {point.seq}, parent {point.parent}",
            next="A chain begins with one full point without a parent; all others have one",
        )
    if point.parent is not None:
        check_name("backup point", point.parent)
    if point.key is not None:
        check_label("key", point.key)
    if point.base is not None:
        check_base(point.base)
    return point


def check_base(base: BaseImage) -> None:
    """Invalid if its fields do not fit together."""
    if not _SHA256.fullmatch(base.sha256) or base.format not in ("qcow2", "raw"):
        raise Invalid(f"base image {base.name} has a bad hash or format", next="Give its SHA-256 and qcow2 or raw")
    check_label("image", base.name)
    if type(base.file_bytes) is not int or base.file_bytes < 0:
        raise Invalid(f"base image {base.name} has {base.file_bytes!r} bytes", next="Give the size of its file")
    if type(base.version) is not int or base.version < 1:
        raise Invalid(f"base image {base.name} has version {base.version!r}", next="Versions count from 1")
    if base.key is None:
        return
    check_label("key", base.key)
    if not _SHA256.fullmatch(base.stored_sha256) or type(base.stored_bytes) is not int or base.stored_bytes < 1:
        raise Invalid(f"base image {base.name} lies in a container without hash or size", next="Give both")


def dump(point: Point) -> bytes:
    """The manifest of ``point``, sealed with its own hash."""
    body = asdict(check_point(point))
    body[_SEAL] = _seal(body)
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def load(data: bytes, where: str) -> Point:
    """The point a manifest describes; raises BackupBroken naming ``where`` if it is damaged, edited or unknown."""
    try:
        body = json.loads(data)
        seal = body.pop(_SEAL)
        if body.get("format") != FORMAT:
            raise BackupBroken(f"{where} has format {body.get('format')!r}", next=f"This HDCS reads format {FORMAT}")
        if seal != _seal(body):
            raise BackupBroken(f"{where} was changed after it was written", next="Restore another point")
        return check_point(_build(body))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, Invalid) as error:
        raise BackupBroken(f"{where} is not a backup manifest: {error}", next="Restore another point") from error


def from_dict(body: dict[str, Any]) -> Point:
    """The point that ``dataclasses.asdict`` made this of, checked; raises Invalid, ValueError, TypeError."""
    return check_point(_build(dict(body)))


def _build(body: dict[str, Any]) -> Point:
    base = body.pop("base")
    point = Point(base=None if base is None else BaseImage(**base), **body)
    numbers = (point.disk_bytes, point.file_bytes)
    texts = [getattr(point, f.name) for f in fields(point) if f.type == "str"]
    if not all(type(n) is int and n >= 0 for n in numbers) or not all(isinstance(t, str) for t in texts):
        raise ValueError("a field has the wrong type")
    if not isinstance(point.definition, dict) or not _SHA256.fullmatch(point.sha256):
        raise ValueError("definition or hash missing")
    datetime.fromisoformat(point.created_at)
    return point


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
