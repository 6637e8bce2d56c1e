"""Names in selectors and rules: what does not exist is refused with what does, instead of matching nothing for ever."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import literal, select
from sqlalchemy.orm import Session

from hdcs_tasks.operations.control import Control
from hdcs_tasks.store.models import DomainNode, Profile, ServerNode, Vm
from hdcs_tasks.store.naming import not_among, unknown
from hdcs_tasks.vm.control import get_vm

_ROWS: Mapping[str, tuple[str, Any, Any, str]] = {
    "home": ("domain node", DomainNode.name, Vm.home, "hdcs domain list"),
    "server_node": ("server node", ServerNode.name, Vm.server_node, "hdcs node list"),
    "profile": ("profile", Profile.name, Vm.profile, "hdcs profile list"),
}


def check_selector(session: Session, selector: Mapping[str, Any]) -> None:
    """NotFound where the selector names a domain node, server node, profile or VM that is not, nor that any living VM
    still tells of (a profile may be deleted after its VMs were made). Tags come and go with the VMs."""
    for key, (noun, record, told, see) in _ROWS.items():
        name = selector.get(key)
        if name is not None and not (_is_there(session, record == name) or _is_there(session, told == name, ALIVE)):
            raise unknown(session, record, name, noun, see)
    for name in selector.get("names") or ():
        get_vm(session, name)


ALIVE = Vm.deleted_at.is_(None)


def _is_there(session: Session, *where: Any) -> bool:
    return session.scalar(select(literal(1)).where(*where).limit(1)) is not None


def check_filters(control: Control, filters: Mapping[str, Any]) -> None:
    """``check_selector`` for a list of VMs, which may name VMs that are gone by now."""
    with control.store.read() as session:
        check_selector(session, {key: value for key, value in filters.items() if key != "names"})


def check_company(session: Session, together: Iterable[str], apart: Iterable[str], own: Iterable[str]) -> None:
    """NotFound where VMs are to be kept together with, or apart from, a tag that no VM has, nor these themselves."""
    wanted = [*together, *apart]
    if wanted:
        tags = session.scalars(select(Vm.tags).where(ALIVE))
        _check_tags(wanted, {*own, *(tag for each in tags for tag in each)}, "VM with tag", "hdcs vm list")


def check_node_tags(session: Session, wanted: Iterable[str]) -> None:
    """NotFound where a server node is to have a tag that none has."""
    if names := list(wanted):
        rules = session.scalars(select(ServerNode.rules))
        known = {tag for each in rules for tag in each.get("tags", ())}
        _check_tags(names, known, "server node with tag", "hdcs node list; give it one: hdcs node set NODE --tag TAG")


def _check_tags(wanted: Iterable[str], known: set[str], noun: str, see: str) -> None:
    for tag in wanted:
        if tag not in known:
            raise not_among(sorted(known), tag, noun, see)
