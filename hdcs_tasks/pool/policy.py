"""What an operator may rule about placement: per domain node, server node, and profile or VM. Values, no I/O.

Each is kept as a small JSON object in its record's ``rules`` column; a field that is missing there has its default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from hdcs_tasks.config import CapacitySettings
from hdcs_tasks.errors import Invalid

Order = Literal["spread", "pack"]

_TAG = re.compile(r"[^\s,;|!][^\s,;|]{0,62}")


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """A domain node's. None: as the settings say. ``placement``: spread or pack over its server nodes;
    ``max_starts``: starts under way at once on its storage (0: no limit); ``min_starts``: as few as a slow storage may
    lower that to (0: it stays)."""

    memory_overcommit: float | None = None
    vcpu_overcommit: float | None = None
    disk_overcommit: float | None = None
    host_reserve_mib: int | None = None
    placement: Order | None = None
    max_starts: int = 0
    min_starts: int = 0


@dataclass(frozen=True, slots=True)
class NodePolicy:
    """A server node's. ``max_starts``: starts under way at once (0: no limit; None: as the settings say);
    ``min_starts``: as few as measured load may lower that to (0: it stays); ``tags``: what a profile may ask a server
    node to have."""

    memory_overcommit: float | None = None
    vcpu_overcommit: float | None = None
    host_reserve_mib: int | None = None
    max_starts: int | None = None
    min_starts: int | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VmPolicy:
    """A profile's, and of each VM cloned with it.

    ``memory_overcommit``, ``vcpu_overcommit``: of its shape only this part is claimed (2.0: half). ``node_tags``: a
    server node must have them all. ``together``: on the server node of a running VM with this tag, where there is one;
    ``apart``: never on one. ``pin``: this server node or none. ``disposable``: its disk may be thrown away (a refresh).
    """

    memory_overcommit: float = 1.0
    vcpu_overcommit: float = 1.0
    node_tags: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    pin: str | None = None
    disposable: bool = False


P = TypeVar("P", PoolPolicy, NodePolicy, VmPolicy)


def read(kind: type[P], kept: Mapping[str, Any] | None) -> P:
    """The policy a record keeps."""
    known = {field.name for field in fields(kind)}
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in (kept or {}).items()}
    wanted: dict[str, Any] = {key: value for key, value in found.items() if key in known}
    return kind(**wanted)


def changed(kind: type[P], kept: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What the record keeps after ``changes`` (None: back to the default). Raises Invalid for an unknown field or an
    impossible value."""
    known = {field.name for field in fields(kind)}
    for key, value in changes.items():
        if key not in known:
            raise Invalid(f"there is no placement rule {key!r} here", next=f"Known: {', '.join(sorted(known))}")
        if value is not None:
            _check(key, value)
    merged = {**(kept or {}), **changes}
    policy = read(kind, {key: value for key, value in merged.items() if value is not None})
    default = asdict(kind())
    return {key: _plain(value) for key, value in asdict(policy).items() if value != default[key]}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check(key: str, value: Any) -> None:
    if key.endswith("_overcommit") and not (_is_number(value) and 0 < value <= 1000):
        raise Invalid(f"{key} {value!r} is not a ratio above 0", next="As in 1.5: promise half as much again")
    if key in ("host_reserve_mib", "max_starts", "min_starts") and not (type(value) is int and value >= 0):
        raise Invalid(f"{key} {value!r} is not a whole number from 0")
    if key == "placement" and value not in ("spread", "pack"):
        raise Invalid(f"placement {value!r} is neither spread nor pack")
    if key == "disposable" and not isinstance(value, bool):
        raise Invalid(f"disposable {value!r} is neither true nor false")
    if key in ("tags", "node_tags", "together", "apart"):
        check_tags(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_tags(tags: Any) -> tuple[str, ...]:
    """``tags`` without repetition; Invalid unless each is 1 to 63 characters, none of them blank , ; | or a first !"""
    if isinstance(tags, str) or not all(isinstance(tag, str) and _TAG.fullmatch(tag) for tag in tags):
        raise Invalid(f"{tags!r} are not tags", next="Use 1 to 63 characters each: no blank , ; | and no first !")
    return tuple(dict.fromkeys(tags))


def capacity_settings(settings: CapacitySettings, pool: PoolPolicy, node: NodePolicy | None = None) -> CapacitySettings:
    """The settings as they hold for a domain node, or for one of its server nodes."""
    update = {
        key: value for policy in (pool, node) if policy is not None
        for key in ("memory_overcommit", "vcpu_overcommit", "disk_overcommit", "host_reserve_mib")
        if (value := getattr(policy, key, None)) is not None
    }  # fmt: skip
    return settings.model_copy(update=update)
