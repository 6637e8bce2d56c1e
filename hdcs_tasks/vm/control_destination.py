"""Where a VM may move to, and which way it would go: what is asked of every move before it begins. Reads only."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Invalid, Unreachable, WrongState
from hdcs_tasks.operations.control import Tx
from hdcs_tasks.pool.control import get_domain_node, get_server_node
from hdcs_tasks.states import IN_POOL, ServerNodeState
from hdcs_tasks.store.models import DomainNode, ServerNode, Vm
from hdcs_tasks.vm.control import check_given
from hdcs_tasks.vm.control_left import check_left
from hdcs_tasks.vm.move_rules import ALIVE, MoveOptions, Way, way_of
from hdcs_tasks.vm.rules import wrong_state_hint


def check_migrate(tx: Tx, vm: Vm, to: str | None, options: MoveOptions) -> tuple[Way, str, str | None]:
    """The way ``vm`` would take to ``to``, its domain node then, and the server node if one was named. Raises as
    ``control_migrate.open_move``."""
    check_given(tx, vm, "migrate")
    home, pin = _destination(tx.session, vm, to)
    if pin is not None or home != vm.home:
        check_left(tx.session, vm, node=pin, home=home)
    way = way_of(vm.state, same_home=home == vm.home, live=options.live)
    if way is Way.NOTHING and options.live:
        raise WrongState(
            f"VM {vm.name} is {vm.state}: it cannot migrate", next=wrong_state_hint("migrate", vm.state, vm.name)
        )
    if way is Way.MOVE and options.postcopy:
        raise Invalid("post-copy moves memory only, not disks", next="Leave it out between domain nodes")
    if way in (Way.LIVE, Way.SAVED) and pin is None:
        _check_company(tx.session, vm)
    if vm.state in ALIVE and vm.server_node is not None:
        _check_source(get_server_node(tx.session, vm.server_node), vm)
    return way, home, pin


def _destination(session: Session, vm: Vm, to: str | None) -> tuple[str, str | None]:
    if to is None:
        return vm.home, None
    if session.get(DomainNode, to) is not None:
        if to == vm.home:
            return to, None
        rows = session.scalars(select(ServerNode.state).where(ServerNode.domain_node == to)).all()
        if ServerNodeState.UP not in rows:
            raise WrongState(
                f"no server node of domain node {to} takes VMs now", next="Bring or resume one: hdcs node list"
            )
        return to, None
    node = get_server_node(session, to)
    if node.name == vm.server_node:
        raise WrongState(f"VM {vm.name} is on {to} already", next="There is nothing to move")
    if node.state not in IN_POOL:
        raise WrongState(f"server node {to} is {node.state}", next="Choose another: hdcs node list")
    if node.draining:
        raise WrongState(
            f"server node {to} is closed to VMs: it is {node.state}",
            next=f"Choose another (hdcs node list), or open it: hdcs node resume {to}",
        )
    get_domain_node(session, node.domain_node)
    return node.domain_node, node.name


def _check_source(node: ServerNode, vm: Vm) -> None:
    if node.state not in IN_POOL:
        raise Unreachable(
            f"VM {vm.name} is on server node {node.name}, which is {node.state}",
            next=f"Bring {node.name} back (see: hdcs node list); its guests may still run there",
        )


def _check_company(session: Session, vm: Vm) -> None:
    """There must be another server node at all; whether one has room is layer two's to say."""
    others = select(ServerNode.name).where(
        ServerNode.domain_node == vm.home, ServerNode.state == ServerNodeState.UP, ServerNode.name != vm.server_node
    )
    if session.scalar(others.limit(1)) is None:
        raise WrongState(
            f"VM {vm.name} cannot migrate: {vm.home} has no other server node that is up",
            next=f"Bring another one into {vm.home} (see: hdcs node list), or name another domain node",
        )
