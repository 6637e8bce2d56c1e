"""Pure decisions about images: names of formats, where a path may lie, and which domain node an import goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from hdcs_tasks.errors import Invalid, NoCapacity

DISKS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc")
FORMATS = (*DISKS, "ova")
_ALIASES = {"vhd": "vpc"}
_SAID = {fmt: name for name, fmt in _ALIASES.items()}
_SUFFIXES = {f".{fmt}": fmt for fmt in FORMATS} | {".img": "raw", ".dd": "raw", ".vhd": "vpc"}
DISPOSABLE = "disposable"
"""Tag of a VM whose disk nobody will miss; its profile's rule of this name says the same."""


class Place(StrEnum):
    """What a path is: a device of a server node, a path on it, or a name in the storage's own folder."""

    DEVICE = "device"
    SERVER_NODE = "server node"
    STORAGE = "storage"


def format_of(name: str | None, *, known: Sequence[str] = FORMATS) -> str | None:
    """The format called ``name`` (``vhd`` is ``vpc``); None stays None. Raises Invalid."""
    if name is None:
        return None
    found = _ALIASES.get(name, name)
    if found not in known:
        said = ", ".join(_SAID.get(fmt, fmt) for fmt in known)
        raise Invalid(f"image format {name!r} is not known", next=f"Use {said}")
    return found


def source_format(name: str | None, path: str) -> str | None:
    """What a file is to be read as: the format called ``name``, "ova" where the path ends so, None: by its header.
    Raises Invalid."""
    said = format_of(name)
    return "ova" if said is None and format_by_name(path) == "ova" else said


def format_by_name(path: str) -> str | None:
    """The format a file's name promises, for a file that is to be written."""
    return _SUFFIXES.get(PurePosixPath(path).suffix.lower())


def place_of(path: str) -> Place:
    """What ``path`` is. Raises Invalid for one that leads out of its folder, or is no path."""
    pure = PurePosixPath(path)
    if not path or not path.isprintable() or len(path.encode()) > 4000 or ".." in pure.parts or path.endswith("/"):
        raise Invalid(f"{path!r} is not the path of a file", next="Name one file or block device, without '..'")
    if pure.is_absolute():
        return Place.DEVICE if pure.parts[1:2] == ("dev",) else Place.SERVER_NODE
    return Place.STORAGE


def below(path: str, folders: Sequence[str]) -> str | None:
    """The folder of ``folders`` that ``path`` lies in; None: in none of them."""
    pure = PurePosixPath(path)
    return next((folder for folder in folders if pure != PurePosixPath(folder) and pure.is_relative_to(folder)), None)


def folders_of(setting: str) -> list[str]:
    """The folders of a setting of the form of PATH. Raises Invalid for one that is not absolute."""
    found = [folder for folder in setting.split(":") if folder]
    for folder in found:
        if not PurePosixPath(folder).is_absolute() or folder == "/":
            raise Invalid(f"{folder!r} is not an absolute folder", next="Write HDCS_IMPORT_PATHS as /srv/in:/mnt/old")
    return found


@dataclass(frozen=True)
class Pool:
    """A domain node as an import sees it: free bytes of its storage (None: not told yet), living server nodes."""

    domain_node: str
    free_bytes: int | None
    server_nodes: int


@dataclass(frozen=True)
class PoolVerdict:
    """Whether an import may go there: ``why`` not, in a few words; empty where it may."""

    domain_node: str
    why: str
    free_bytes: int | None


def judge_pools(pools: Sequence[Pool]) -> list[PoolVerdict]:
    """Layer one for an import: the storage with most free bytes first, then those that cannot take it, and why."""
    judged = [
        PoolVerdict(p.domain_node, "" if p.server_nodes else "no server node is up", p.free_bytes) for p in pools
    ]  # fmt: skip
    return sorted(judged, key=lambda v: (bool(v.why), -(v.free_bytes or 0), v.domain_node))


def homes(verdicts: Sequence[PoolVerdict]) -> list[str]:
    """The domain nodes to try, best first; NoCapacity where there is none."""
    found = [verdict.domain_node for verdict in verdicts if not verdict.why]
    if not found:
        said = "; ".join(f"{verdict.domain_node}: {verdict.why}" for verdict in verdicts) or "there is none"
        raise NoCapacity(f"no domain node can take an image: {said}", next="Bring a server node back: hdcs node list")
    return found
