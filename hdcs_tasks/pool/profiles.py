"""Profiles: the hardware shapes VMs are cloned with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Conflict, Invalid
from hdcs_tasks.operations.control import Control
from hdcs_tasks.pool.policy import VmPolicy, changed
from hdcs_tasks.routing import check_name
from hdcs_tasks.store.models import Profile
from hdcs_tasks.store.naming import named

BUILT_IN = (
    {"name": "tiny", "vcpus": 1, "memory_mib": 128},
    {"name": "small", "vcpus": 2, "memory_mib": 2048},
    {"name": "medium", "vcpus": 4, "memory_mib": 4096},
    {"name": "large", "vcpus": 8, "memory_mib": 16384},
)


MEMORY_MIN_MIB = 32


def ensure_built_in(control: Control) -> None:
    """Create the built-in profiles on a data center that has none."""
    with control.transaction() as tx:
        if tx.session.scalar(select(Profile.name).limit(1)) is None:
            tx.session.add_all(Profile(**shape) for shape in BUILT_IN)


def create(
    control: Control, name: str, *, vcpus: int, memory_mib: int, disk_bytes: int | None = None, usb: str = "off",
    disk_key: str = "", rules: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Create a profile; ``disk_key``: name of the key its VMs' disks are encrypted with.

    Raises Invalid for an impossible shape or rule, Conflict when it exists."""
    ruled = changed(VmPolicy, {}, rules or {})
    check_name("profile", name)
    if disk_key:
        check_name("key", disk_key)
    if not 1 <= vcpus <= 512:
        raise Invalid(f"{vcpus} vCPUs are not between 1 and 512")
    if not MEMORY_MIN_MIB <= memory_mib <= 16 * 1024 * 1024:
        raise Invalid(f"{memory_mib} MiB of memory are not between 32 MiB and 16 TiB")
    if disk_bytes is not None and disk_bytes < 1024 * 1024:
        raise Invalid(f"a disk of {disk_bytes} bytes is smaller than 1 MiB")
    with control.transaction() as tx:
        if tx.session.get(Profile, name) is not None:
            raise Conflict(f"there is a profile {name} already", next="See: hdcs profile list")
        profile = Profile(
            name=name, vcpus=vcpus, memory_mib=memory_mib, disk_bytes=disk_bytes, usb=usb, disk_key=disk_key,
            rules=ruled,
        )  # fmt: skip
        tx.session.add(profile)
        return view(profile)


def get_profile(session: Session, name: str) -> Profile:
    return named(session, Profile, name, "profile", "hdcs profile list")


def delete(control: Control, name: str) -> None:
    """Delete a profile; VMs keep the shape they were cloned with."""
    with control.transaction() as tx:
        tx.session.delete(get_profile(tx.session, name))


def list_profiles(control: Control) -> list[dict[str, Any]]:
    with control.store.read() as session:
        return [view(profile) for profile in session.scalars(select(Profile).order_by(Profile.memory_mib))]


def view(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name, "vcpus": profile.vcpus, "memory_mib": profile.memory_mib,
        "disk_bytes": profile.disk_bytes, "usb": profile.usb, "disk_key": profile.disk_key, "rules": profile.rules,
    }  # fmt: skip
