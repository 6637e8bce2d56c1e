"""What dashboards show: desktops a page at a time, and the data center on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, cast, func, or_, select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Invalid
from hdcs_tasks.monitor.control import list_events
from hdcs_tasks.monitor.control_alarms import list_alarms
from hdcs_tasks.monitor.control_idle_policy import desktop
from hdcs_tasks.operations.control import Control
from hdcs_tasks.operations.pages import check_page
from hdcs_tasks.pool import capacity as pool_capacity
from hdcs_tasks.pool import profiles
from hdcs_tasks.pool.control import list_domain_nodes, list_server_nodes
from hdcs_tasks.routing import worker_name
from hdcs_tasks.states import IN_POOL, OPERATION_LIVE, BackupState, OperationState, VmState
from hdcs_tasks.store.models import Backup, Operation, Vm, now

ORDERS = {
    "name": Vm.name, "state": Vm.state, "home": Vm.home, "server_node": Vm.server_node, "ip": Vm.ip, "owner": Vm.owner,
    "profile": Vm.profile, "active_at": Vm.active_at,
}  # fmt: skip


def desktops(
    control: Control, *, offset: int = 0, limit: int = 15, search: str = "", state: str = "", order: str = "name",
    descending: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """``{total, found, rows}``: one page of living VMs.

    A row has name, state, home, server_node, ip, profile, owner, tags; ``idle_s``: seconds nobody used it (None unless
    it runs); ``proven``: of its newest proven backup ``{id, taken_at, proven_at}`` or None, ``backups``: how many
    usable ones there are; ``operation``: its live one ``{id, kind, percent}`` or None. Raises Invalid.
    """
    check_page(offset, limit, order, list(ORDERS))
    if state and state not in set(VmState):
        raise Invalid(f"{state!r} is not a state of a VM", next=f"Known: {', '.join(VmState)}")
    column = ORDERS[order]
    living = Vm.deleted_at.is_(None)
    wanted = [living, *([Vm.state == VmState(state)] if state else []), *([_matching(search)] if search else [])]
    with control.store.read() as session:
        total = session.scalar(select(func.count()).select_from(Vm).where(living)) or 0
        query: Select[Any] = select(Vm).where(*wanted)
        found = session.scalar(select(func.count()).select_from(query.subquery())) or 0
        ordered = query.order_by(column.desc() if descending else column.asc(), Vm.name)
        vms = session.scalars(ordered.offset(offset).limit(limit)).all()
        return {"total": total, "found": found, "rows": _rows(session, vms)}


def _matching(search: str) -> ColumnElement[bool]:
    shown = (Vm.name, Vm.ip, Vm.owner, Vm.home, Vm.server_node, Vm.profile, cast(Vm.tags, Text))
    return or_(*(column.icontains(search, autoescape=True) for column in shown))


def _rows(session: Session, vms: Sequence[Vm]) -> list[dict[str, Any]]:
    ids = [vm.id for vm in vms]
    backups: dict[str, list[Backup]] = {}
    usable = select(Backup).where(Backup.vm_id.in_(ids), Backup.state == BackupState.READY)
    for backup in session.scalars(usable.order_by(Backup.created_at)):
        backups.setdefault(backup.vm_id, []).append(backup)
    live = {o.live_vm: o for o in session.scalars(select(Operation).where(Operation.live_vm.in_(ids)))}
    return [_row(vm, backups.get(vm.id, []), live.get(vm.id)) for vm in vms]


def _row(vm: Vm, backups: Sequence[Backup], live: Operation | None) -> dict[str, Any]:
    proven = next((backup for backup in reversed(backups) if backup.proven_at is not None), None)
    keys = ("id", "name", "home", "server_node", "ip", "profile", "owner", "tags")
    return {key: getattr(vm, key) for key in keys} | {
        "state": vm.state.value, "idle_s": desktop(vm).idle_s if vm.state is VmState.RUNNING else None,
        "backups": len(backups),
        "proven": proven and {
            "id": proven.id, "taken_at": proven.created_at.isoformat(),
            "proven_at": proven.proven_at.isoformat() if proven.proven_at else None,
        },
        "operation": live and {"id": live.id, "kind": live.kind, "percent": round(live.percent, 1)},
    }  # fmt: skip


def data_center(control: Control, profile: str | None = None) -> dict[str, Any]:
    """The sheet: ``counts`` (of desktops by state, operations, server nodes), ``domain_nodes``, ``server_nodes`` (with
    desktops running there and the name of their Celery worker), ``capacity`` for a ``profile`` (the smallest unless
    named) the ``alarms`` that stand and the newest ``events``. Raises NotFound for a profile there is not."""
    shapes = [shape["name"] for shape in profiles.list_profiles(control)]
    chosen = profile or (shapes[0] if shapes else None)
    with control.store.read() as session:
        living = select(Vm.state, func.count()).where(Vm.deleted_at.is_(None)).group_by(Vm.state)
        states = {state.value: count for state, count in session.execute(living)}
        on_node = select(Vm.server_node, func.count()).where(Vm.server_node.is_not(None), Vm.deleted_at.is_(None))
        guests = {node: count for node, count in session.execute(on_node.group_by(Vm.server_node))}
        operations = {
            "live": _count(session, Operation.state.in_(OPERATION_LIVE), Operation.parent_id.is_(None)),
            "operator": _count(session, Operation.needs_operator.is_(True), Operation.state == OperationState.FAILED),
        }
    nodes = [
        {key: node[key] for key in ("name", "domain_node", "state", "ip", "vcpus", "memory_mib", "free_vcpus",
                                    "free_memory_mib", "observed_at")}
        | {"guests": guests.get(node["name"], 0), "worker": worker_name(node["domain_node"], node["name"])}
        for node in list_server_nodes(control)
    ]  # fmt: skip
    up = sum(node["state"] in set(IN_POOL) for node in nodes)
    return {
        "at": now().isoformat(), "profiles": shapes,
        "counts": {"desktops": states, "operations": operations, "server_nodes": {"up": up, "all": len(nodes)}},
        "domain_nodes": list_domain_nodes(control), "server_nodes": nodes,
        "capacity": pool_capacity.capacity(control, chosen) if chosen else None, "events": list_events(control, 12),
        "alarms": list_alarms(control),
    }  # fmt: skip


def _count(session: Session, *wanted: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count()).select_from(Operation).where(*wanted)) or 0
