"""Which VMs a name, a filter or a selector means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select

from hdcs_tasks.errors import Invalid
from hdcs_tasks.operations.control import Control
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Vm
from hdcs_tasks.vm.control import view
from hdcs_tasks.vm.rules import given_in


def list_vms(
    control: Control, *, names: Sequence[str] = (), with_warm: bool = True, **filters: Any
) -> list[dict[str, Any]]:
    """Views of living VMs; ``filters`` are equalities on state, home, server_node, owner, profile, or a ``tag``.
    ``with_warm`` False: without those a warm pool keeps ready, unless they are named."""
    tag = filters.pop("tag", None)
    _check_filters(filters)
    with control.store.read() as session:
        query = select(Vm).where(Vm.deleted_at.is_(None)).order_by(Vm.name)
        if names:
            query = query.where(Vm.name.in_(names))
        elif not with_warm:
            query = query.where(Vm.warm_pool.is_(None))
        for key, value in filters.items():
            if value is not None:
                query = query.where(getattr(Vm, key) == value)
        return [view(vm) for vm in session.scalars(query) if tag is None or tag in vm.tags]


_FILTERS = frozenset({"state", "home", "server_node", "owner", "profile"})


def _check_filters(filters: dict[str, Any]) -> None:
    """A filter that can match nothing is a mistake, not an empty answer."""
    unknown = sorted(set(filters) - _FILTERS)
    if unknown:
        raise Invalid(f"VMs are not listed by {unknown[0]!r}", next=f"Known: {', '.join(sorted(_FILTERS))}, tag, names")
    state = filters.get("state")
    if state is not None and state not in set(VmState):
        raise Invalid(f"{state!r} is not a state of a VM", next=f"Known: {', '.join(VmState)}")


def list_given(control: Control, verb: str, **filters: Any) -> list[dict[str, Any]]:
    """Views of the listed VMs in a state ``verb`` may be given in; those of warm pools are left in peace."""
    states = given_in(verb)
    return [shown for shown in list_vms(control, with_warm=False, **filters) if shown["state"] in states]
