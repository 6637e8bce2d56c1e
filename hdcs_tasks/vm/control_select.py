"""Names in selectors and rules: what does not exist is refused with what does, instead of matching nothing for ever."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import NotFound
from hdcs_tasks.operations.control import Control
from hdcs_tasks.store.models import DomainNode, Profile, ServerNode, Vm

_SHOWN = 10
_WHERE: Mapping[str, tuple[str, Select[Any], Any, str]] = {
    "home": ("domain node", select(DomainNode.name), Vm.home, "hdcs domain list"),
    "server_node": ("server node", select(ServerNode.name), Vm.server_node, "hdcs node list"),
    "profile": ("profile", select(Profile.name), Vm.profile, "hdcs profile list"),
    "names": ("VM", select(Vm.name).where(Vm.deleted_at.is_(None)), Vm.name, "hdcs vm list"),
}


def check_selector(session: Session, selector: Mapping[str, Any]) -> None:
    """NotFound where the selector names a domain node, server node, profile or VM that is not, nor that any living VM
    still tells of (a profile may be deleted after its VMs were made). Tags come and go with the VMs."""
    for key, (noun, there, column, see) in _WHERE.items():
        value = selector.get(key)
        wanted = [value] if isinstance(value, str) else list(value or ())
        if wanted:
            told = select(column).where(Vm.deleted_at.is_(None), column.is_not(None)).distinct()
            _check(noun, wanted, {*session.scalars(there), *session.scalars(told)}, see)


def check_filters(control: Control, filters: Mapping[str, Any]) -> None:
    """``check_selector`` for a list of VMs, which may name VMs that are gone by now."""
    wanted = {key: value for key, value in filters.items() if key != "names" and value is not None}
    if wanted:
        with control.store.read() as session:
            check_selector(session, wanted)


def check_company(session: Session, together: Iterable[str], apart: Iterable[str], own: Iterable[str]) -> None:
    """NotFound where VMs are to be kept together with, or apart from, a tag that no VM has, nor these themselves."""
    wanted = [*together, *apart]
    if wanted:
        tags = session.scalars(select(Vm.tags).where(Vm.deleted_at.is_(None)))
        _check("VM with tag", wanted, {*own, *(tag for each in tags for tag in each)}, "hdcs vm list")


def check_node_tags(session: Session, wanted: Iterable[str]) -> None:
    """NotFound where a server node is to have a tag that none has."""
    if names := list(wanted):
        rules = session.scalars(select(ServerNode.rules))
        _check("server node with tag", names, {tag for each in rules for tag in (each or {}).get("tags", ())},
               "hdcs node set NODE --tag")  # fmt: skip


def _check(noun: str, wanted: Iterable[str], known: Collection[str], see: str) -> None:
    missing = next((name for name in wanted if name not in known), None)
    if missing is not None:
        shown = ", ".join(sorted(known)[:_SHOWN]) or "none"
        more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
        raise NotFound(f"there is no {noun} {missing!r}", next=f"Known: {shown}{more}; see: {see}")
