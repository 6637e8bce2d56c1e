"""Capacity: how many more VMs of a profile fit, by the scheduler's own judgement of the pools as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Invalid, NotFound
from hdcs_tasks.operations.control import Control
from hdcs_tasks.pool import capacity_rules
from hdcs_tasks.pool.policy import VmPolicy, read
from hdcs_tasks.pool.profiles import get_profile
from hdcs_tasks.pool.rooms import candidate
from hdcs_tasks.pool.rules import Candidate, Shape, Terms
from hdcs_tasks.store.models import DomainNode, Image
from hdcs_tasks.store.naming import unknown

MIX_MAX = 1000


def capacity(
    control: Control, profile_name: str | None = None, *, without: Sequence[str] = (),
    with_nodes: Sequence[Mapping[str, Any]] = (), mix: Mapping[str, int] | None = None, image: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Per server node, per domain node and in all; each with what limits it.

    ``without``: as if these server nodes were gone; ``with_nodes``: as if there were more, each ``{vcpus, memory_mib,
    domain_node}`` as promised to guests (domain_node may be left out where there is one). Storage counts by the disk a
    clone of ``image`` gets; None: of the image with the largest. Returns ``{profile, disk_bytes, disk_by, vms,
    n_plus_one, domain_nodes: {name: {vms, n_plus_one, limit, server_nodes: {name: {vms, limit}}}}}``; in all,
    ``n_plus_one`` keeps one server node free in every domain node. With ``mix`` (profile -> how many) also ``mix:
    {rounds, vms, stopped_by}``. Raises NotFound, Invalid.
    """
    with control.store.read() as session:
        rows = list(session.scalars(select(DomainNode).order_by(DomainNode.name)))
        rooms = [candidate(control, session, row) for row in rows]
        disk_bytes, disk_by = _image_disk(session, image)
        named = [*(mix or {}), *([profile_name] if profile_name else [])]
        shapes = {name: _profile(session, name, disk_bytes) for name in named}
    rooms = _what_if(rooms, without, with_nodes)
    found: dict[str, Any] = {"profile": profile_name}
    if profile_name is not None:
        shape, terms = shapes[profile_name]
        counts = [capacity_rules.count(room, shape, terms, control.settings.capacity) for room in rooms]
        own = shape.disk_bytes > disk_bytes
        found |= {
            "disk_bytes": shape.disk_bytes, "disk_by": f"profile {profile_name}" if own else disk_by,
            "vms": sum(c.vms for c in counts), "n_plus_one": sum(c.n_plus_one for c in counts),
            "domain_nodes": {c.domain_node: _shown(c) for c in counts},
        }  # fmt: skip
    if mix is not None:
        entries = [(name, *shapes[name], _times(name, times)) for name, times in mix.items()]
        found["mix"] = asdict(capacity_rules.count_mix(rooms, entries, control.settings.capacity))
    return found


def _image_disk(session: Session, name: str | None) -> tuple[int, str]:
    """Bytes of the disk a clone gets by its image (``name`` or ``name:version``; None: the one with the largest), and
    whose they are in words."""
    wanted, _, version = (name or "").partition(":")
    query = select(Image).where(Image.deleted_at.is_(None))
    if wanted:
        query = query.where(Image.name == wanted)
    if version:
        query = query.where(Image.version == (int(version) if version.isdecimal() else -1))
    images = list(session.scalars(query))
    if name is not None and not images:
        raise unknown(session, Image.name, wanted, "image", "hdcs image list", Image.deleted_at.is_(None))
    largest = max(images, key=lambda image: image.virtual_size_bytes or 0, default=None)
    if largest is None or not largest.virtual_size_bytes:
        return 0, "nothing: neither profile nor image tells of a disk"
    return largest.virtual_size_bytes, f"image {largest.name}:{largest.version}"


def _profile(session: Session, name: str, disk_bytes: int) -> tuple[Shape, Terms]:
    """The shape its clones have, and the rules; ``disk_bytes``: of their image."""
    profile = get_profile(session, name)
    ruled = read(VmPolicy, profile.rules)
    shape = Shape(
        profile.vcpus, profile.memory_mib, disk_bytes=max(profile.disk_bytes or 0, disk_bytes),
        memory_overcommit=ruled.memory_overcommit, vcpu_overcommit=ruled.vcpu_overcommit,
    )  # fmt: skip
    return shape, Terms(pin=ruled.pin, node_tags=ruled.node_tags, together=ruled.together, apart=ruled.apart)


def _times(name: str, times: Any) -> int:
    if type(times) is not int or not 0 <= times <= MIX_MAX:
        raise Invalid(f"{times!r} of profile {name} is not a number from 0 to {MIX_MAX}")
    return times


def _what_if(
    rooms: list[Candidate], without: Sequence[str], with_nodes: Sequence[Mapping[str, Any]]
) -> list[Candidate]:
    known = {node.name for room in rooms for node in room.nodes}
    missing = [name for name in without if name not in known]
    if missing:
        raise NotFound(f"there is no server node {missing[0]!r}", next="See: hdcs node list")
    names = [room.domain_node for room in rooms]
    new: dict[str, list[Any]] = {name: [] for name in names}
    for number, wanted in enumerate(with_nodes, 1):
        home = wanted.get("domain_node") or (names[0] if len(names) == 1 else "")
        if home not in new:
            raise Invalid(
                f"a new server node of which domain node? ({', '.join(names) or 'there is none'})",
                next="As in --with-node east:32x65536",
            )
        new[home].append(capacity_rules.new_node(number, int(wanted["vcpus"]), int(wanted["memory_mib"])))
    return [capacity_rules.what_if(room, without, new[room.domain_node]) for room in rooms]


def _shown(found: capacity_rules.PoolCount) -> dict[str, Any]:
    return {
        "vms": found.vms, "n_plus_one": found.n_plus_one, "limit": found.limit,
        "server_nodes": {name: {"vms": c.vms, "limit": c.limit} for name, c in sorted(found.nodes.items())},
    }  # fmt: skip
