"""Emptying a server node or a whole domain node: nothing new goes there, what is there moves away, a few at a time.

The operation (``pool.drain``, ``pool.drain_domain``) opens a move for one VM after the other and looks at the record
anew each time one has ended: which VMs are still there, which were tried. So it survives every restart, and finds what
came since it began. What could not be moved stays, and the operation says why; the node stays closed until ``resume``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Cancelled, Conflict, HdcsError, NoCapacity, from_dict
from hdcs_tasks.image.control_copy import is_ready
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_child_ended
from hdcs_tasks.operations.rules import first_few
from hdcs_tasks.pool import control as pool
from hdcs_tasks.pool import rules as pool_rules
from hdcs_tasks.pool.rooms import candidate, vm_shape, vm_terms
from hdcs_tasks.pool.words import explain
from hdcs_tasks.states import OPERATION_LIVE, VM_RESTS, OperationState
from hdcs_tasks.store.models import DomainNode, Image, Operation, ServerNode, Vm
from hdcs_tasks.store.transitions import move
from hdcs_tasks.vm.control import get_vm
from hdcs_tasks.vm.control_migrate import open_move
from hdcs_tasks.vm.control_plan import planned_move, room_of
from hdcs_tasks.vm.move_rules import ALIVE, MoveOptions, Shelf, choose_shelf, may_begin

log = logger(__name__)

NODE, DOMAIN = "pool.drain", "pool.drain_domain"
CONCURRENCY = 2
"""Moves of one drain under way at once, unless asked otherwise."""


def drain_node(
    control: Control, name: str, asked: Asked, *, moving: bool = True, concurrency: int = CONCURRENCY,
    options: MoveOptions | None = None, also: Collection[str] = (),
) -> Operation:  # fmt: skip
    """Let no new VM start on a server node and move its running ones live to others of its domain node.

    Stopped VMs need nothing. ``moving`` False: only close it. ``also``: server nodes that are drained by operations of
    their own, closed with it before anything moves: else what leaves one would go to the next. Raises NotFound,
    Conflict (it is being drained).
    """
    with control.transaction() as tx:
        words: dict[str, Any] = {
            "moving": moving, "concurrency": concurrency, "options": vars(options or MoveOptions()),
            "also": sorted(also),
        }  # fmt: skip
        if (same := tx.same_request(asked, NODE, name, **words)) is not None:
            return same
        _check_none(tx.session, NODE, name)
        pool.get_server_node(tx.session, name)
        for node in tx.session.scalars(select(ServerNode).where(ServerNode.name.in_({name, *also}))).all():
            pool.set_draining(tx, node, draining=True)
        return _open(tx, NODE, name, asked, moving, concurrency, options)


def drain_domain_node(
    control: Control, name: str, asked: Asked, *, concurrency: int = CONCURRENCY, options: MoveOptions | None = None
) -> Operation:
    """Close every server node of a domain node and move all its VMs, stopped ones too, to other domain nodes."""
    with control.transaction() as tx:
        words = {"concurrency": concurrency, "options": vars(options or MoveOptions())}
        if (same := tx.same_request(asked, DOMAIN, name, **words)) is not None:
            return same
        _check_none(tx.session, DOMAIN, name)
        row = pool.get_domain_node(tx.session, name)
        row.draining = True
        for node in _nodes(tx.session, name):
            pool.set_draining(tx, node, draining=True)
        return _open(tx, DOMAIN, name, asked, True, concurrency, options)


def _check_none(session: Session, kind: str, name: str) -> None:
    if (drain := _live(session, kind, name)) is not None:
        raise Conflict(
            f"{name} is being drained already: operation {drain.id} ({drain.phase})",
            next=f"Watch it: hdcs op watch {drain.id}", details={"operation": drain.id},
        )  # fmt: skip


def _open(
    tx: Tx, kind: str, name: str, asked: Asked, moving: bool, concurrency: int, options: MoveOptions | None
) -> Operation:
    request = {
        "name": name, "concurrency": max(1, concurrency), "options": (options or MoveOptions()).to_dict(),
    }  # fmt: skip
    operation = tx.open(kind, asked=asked, subject=name, request=request)
    move(operation, OperationState.RUNNING)
    operation.started_at = operation.created_at
    if not moving or not _there(tx.session, operation):
        _end(tx, operation, [])
    else:
        _go_on_after(tx, operation)
    return operation


def resume_node(control: Control, name: str) -> dict[str, Any]:
    """Take VMs again. A drain under way begins no more moves; those begun go on to their end."""
    with control.transaction() as tx:
        node = pool.get_server_node(tx.session, name)
        _stop(tx, _live(tx.session, NODE, name))
        pool.set_draining(tx, node, draining=False)
        return pool.node_view(node)


def resume_domain_node(control: Control, name: str) -> dict[str, Any]:
    """Open every server node of a domain node again, and its drain with the moves not begun ends."""
    with control.transaction() as tx:
        pool.get_domain_node(tx.session, name).draining = False
        _stop(tx, _live(tx.session, DOMAIN, name))
        for node in _nodes(tx.session, name):
            pool.set_draining(tx, node, draining=False)
    return pool.show_domain_node(control, name)


def _nodes(session: Session, domain_node: str) -> Sequence[ServerNode]:
    return session.scalars(select(ServerNode).where(ServerNode.domain_node == domain_node)).all()


def _live(session: Session, kind: str, name: str) -> Operation | None:
    return session.scalar(
        select(Operation).where(Operation.kind == kind, Operation.subject == name, Operation.state.in_(OPERATION_LIVE))
    )


def _stop(tx: Tx, drain: Operation | None) -> None:
    if drain is not None:
        tx.lock_operation(drain)
        drain.cancel_asked = True
        _go_on_after(tx, drain)


# --- one after the other


@on_child_ended(NODE)
@on_child_ended(DOMAIN)
def _one_ended(tx: Tx, drain: Operation, children: list[Operation]) -> None:
    _tell(tx, drain, children)
    _go_on_after(tx, drain)


def _tell(tx: Tx, drain: Operation, children: list[Operation]) -> None:
    """What was cancelled has come no further."""
    ended = sum(child.state not in (*OPERATION_LIVE, OperationState.CANCELLED) for child in children)
    left = len(_waiting(tx.session, drain, children))
    total = len(children) + left
    drain.percent = max(drain.percent, 100.0 * ended / total if total else 0.0)
    drain.phase = f"{ended} of {total}"


def _go_on_after(tx: Tx, drain: Operation) -> None:
    control, drain_id = tx.control, drain.id
    tx.after(lambda: go_on(control, drain_id))


def drain_sweep(control: Control) -> int:
    """Go on with every drain under way: with VMs that were busy, and where a call after a commit was lost."""
    with control.store.read() as session:
        query = select(Operation.id).where(Operation.kind.in_((NODE, DOMAIN)), Operation.state.in_(OPERATION_LIVE))
        drains = list(session.scalars(query))
    for drain_id in drains:
        go_on(control, drain_id)
    return len(drains)


def go_on(control: Control, drain_id: str) -> None:
    """Open as many moves as may be under way, or end the drain where nothing is left to try."""
    with control.transaction() as tx:
        drain = _locked(tx, drain_id)
        if drain is None:
            return
        children = _children(tx.session, drain)
        waiting = _waiting(tx.session, drain, children)
        running = sum(child.state in OPERATION_LIVE for child in children)
        _tell(tx, drain, children)
        if drain.cancel_asked:
            if not running:
                _called_off(tx, drain, children)
            return
        if not waiting and not running:
            _end(tx, drain, children)
            return
        ready = [vm.name for vm in waiting if vm.state in VM_RESTS and tx.live_operation(vm) is None]
        chosen = ready[: may_begin(drain.request["concurrency"], running, len(ready))]
    for name in chosen:
        _begin_one(control, drain_id, name)


def _locked(tx: Tx, drain_id: str) -> Operation | None:
    drain = tx.session.get(Operation, drain_id)
    if drain is None or drain.state not in OPERATION_LIVE:
        return None
    tx.lock_operation(drain)
    return drain if drain.state in OPERATION_LIVE else None


def _begin_one(control: Control, drain_id: str, name: str) -> None:
    """One VM's move, in a transaction of its own: what is refused is a child that failed at once, and says why."""
    refused: HdcsError | None = None
    for _ in range(2):
        try:
            with control.transaction() as tx:
                drain = _locked(tx, drain_id)
                if drain is None or drain.cancel_asked or not _may_have_one(tx, drain, name):
                    return
                asked = Asked(drain.requested_by, drain.reason)
                if refused is not None:
                    request = {"refused": refused.to_dict()}
                    tx.open("vm.migrate", asked=asked, subject=name, request=request, parent=drain)
                    return
                vm = get_vm(tx.session, name)
                to = _elsewhere(tx, vm) if drain.kind == DOMAIN else None
                options = MoveOptions(**drain.request["options"])
                open_move(tx, vm, asked, to=to, options=options, parent=drain)
                return
        except Conflict as error:
            log.info("busy; its turn comes", vm=name, why=error.message)
            return
        except HdcsError as error:
            refused = error


def _may_have_one(tx: Tx, drain: Operation, name: str) -> bool:
    """Another process may have done it, or filled the slot, since we looked."""
    children = _children(tx.session, drain)
    running = sum(child.state in OPERATION_LIVE for child in children)
    return running < drain.request["concurrency"] and all(child.subject != name for child in children)


def _children(session: Session, drain: Operation) -> list[Operation]:
    query = select(Operation).where(Operation.parent_id == drain.id).order_by(Operation.created_at)
    return list(session.scalars(query.execution_options(populate_existing=True)))


def _there(session: Session, drain: Operation) -> list[Vm]:
    """The VMs that stand in the way: guests on the server node, or all that live in the domain node."""
    name = drain.request["name"]
    where = Vm.server_node == name if drain.kind == NODE else Vm.home == name
    return list(session.scalars(select(Vm).where(where, Vm.deleted_at.is_(None)).order_by(Vm.name)))


def _waiting(session: Session, drain: Operation, children: Sequence[Operation]) -> list[Vm]:
    tried = {child.subject for child in children}
    return [vm for vm in _there(session, drain) if vm.name not in tried]


def _end(tx: Tx, drain: Operation, children: Sequence[Operation]) -> None:
    """Done where nothing stays; else failed, and it tells of each VM why."""
    moved, left = _outcome(tx, drain, children)
    if not left or not children:
        tx.finish(drain, {"moved": moved, "left": sorted(left)})
        return
    tx.fail(drain, Conflict(
        f"{len(left)} of {len(left) + len(moved)} VMs could not be moved off {drain.subject}: {_named(drain, left)}",
        next=f"It takes no new VMs. Make room, or stop them, and drain again; or: {_resume(drain)}",
        details={"moved": moved, "left": left},
    ))  # fmt: skip


def _called_off(tx: Tx, drain: Operation, children: Sequence[Operation]) -> None:
    """Cancelled, or ended by ``resume``; done where every move under way came to its end and nothing stays."""
    moved, left = _outcome(tx, drain, children)
    if not left:
        tx.finish(drain, {"moved": moved, "left": []})
        return
    row = ServerNode if drain.kind == NODE else DomainNode
    closed = tx.session.scalar(select(row.draining).where(row.name == drain.subject))
    stays = f"; {drain.subject} stays closed to new VMs" if closed else ""
    tx.fail(drain, Cancelled(
        f"cancelled; {len(left)} of {len(left) + len(moved)} VMs were not moved off {drain.subject}"
        f" ({_named(drain, left)}){stays}",
        next=f"Open it again: {_resume(drain)}; or drain it again" if closed else "",
        details={"moved": moved, "left": left},
    ))  # fmt: skip


def _outcome(tx: Tx, drain: Operation, children: Sequence[Operation]) -> tuple[list[str], dict[str, str]]:
    """Who was moved; and who is there still, with the reason."""
    tx.session.flush()
    left = {vm.name: _why(drain, vm, children) for vm in _there(tx.session, drain)}
    return [c.subject for c in children if c.state is OperationState.DONE], left


def _why(drain: Operation, vm: Vm, children: Sequence[Operation]) -> str:
    found = next((c for c in children if c.subject == vm.name and c.error), None)
    if found is not None and found.error:
        return str(from_dict(found.error).message)
    return "its turn had not come" if drain.cancel_asked else f"it is {vm.state}"


def _named(drain: Operation, left: dict[str, str]) -> str:
    return first_few([f"{name}: {why}" for name, why in sorted(left.items())], drain.id)


def _resume(drain: Operation) -> str:
    return f"hdcs {'node' if drain.kind == NODE else 'domain'} resume {drain.subject}"


# --- where to, out of a domain node


def _elsewhere(tx: Tx, vm: Vm, planned: dict[str, pool_rules.Candidate] | None = None) -> str:
    """The domain node layer one chooses for a VM that must leave its own; ``planned``: domain nodes as a plan leaves
    them so far. NoCapacity, naming why not each."""
    others = select(DomainNode).where(DomainNode.name != vm.home, DomainNode.draining.is_(False))
    rows = tx.session.scalars(others).all()
    image = tx.session.get(Image, vm.image_id) if vm.image_id else None
    rooms = [
        replace(
            candidate(tx.control, tx.session, row) if planned is None else room_of(tx, row.name, planned),
            has_image=image is None or is_ready(image, row.name),
        ) for row in rows
    ]  # fmt: skip
    if vm.state not in ALIVE:
        shelves = [Shelf(r.domain_node, r.free_disk_bytes or 0, r.has_image) for r in rooms if _is_open(r)]
        chosen = choose_shelf(shelves, vm.disk_bytes)
        if chosen is None:
            raise NoCapacity(f"no other domain node's storage takes VM {vm.name} ({vm.disk_bytes} bytes)",
                             next="Add storage, or another domain node")  # fmt: skip
        return chosen
    request = pool_rules.HomeRequest(vm_shape(vm), terms=vm_terms(vm, pinned=False, start=False))
    choice = pool_rules.choose_domain_node(rooms, request, tx.control.settings.capacity)
    if choice.domain_node is None:
        raise NoCapacity(explain(choice, vm_shape(vm), tx.control.settings.capacity, vm.profile),
                         next=f"See: hdcs pool capacity {vm.profile}")  # fmt: skip
    return choice.domain_node


def _is_open(room: pool_rules.Candidate) -> bool:
    return any(node.schedulable for node in room.nodes)


# --- dry runs


def plan_drain(control: Control, kind: str, *names: str) -> dict[str, Any]:
    """What a drain, or one of several server nodes together, would move and where to, as things are now: ``{fits, vms:
    [{name, domain_node, server_node, message, …}], refusal}``. One after the other, as the drain moves them: what went
    before has taken its room. Raises NotFound."""
    with control.store.read() as session:
        tx = Tx(session, control, [])
        if kind == NODE:
            homes = dict.fromkeys(pool.get_server_node(session, name).domain_node for name in names)
            rooms = {home: _closed(room_of(tx, home, {}), names) for home in homes}
        else:
            rooms = {}
            for name in names:
                pool.get_domain_node(session, name)
        emptied = [Operation(kind=kind, request={"name": name}) for name in dict.fromkeys(names)]
        vms = [vm for each in emptied for vm in _there(session, each)]
        shown = [_planned(tx, vm, kind, rooms) for vm in vms]
    refused = [vm for vm in shown if vm["message"]]
    error = NoCapacity(f"{len(refused)} of {len(shown)} VMs would stay: {refused[0]['message']}") if refused else None
    return {"fits": not refused, "vms": shown, "refusal": error.to_dict() if error else None}


def _closed(room: pool_rules.Candidate, names: Collection[str]) -> pool_rules.Candidate:
    """A domain node as it will be when these server nodes are closed."""
    return replace(room, nodes=tuple(
        replace(node, schedulable=False, state="draining") if node.name in names and node.schedulable else node
        for node in room.nodes
    ))  # fmt: skip


def _planned(tx: Tx, vm: Vm, kind: str, rooms: dict[str, pool_rules.Candidate]) -> dict[str, Any]:
    try:
        return planned_move(tx, vm, _elsewhere(tx, vm, rooms) if kind == DOMAIN else None, None, rooms)
    except HdcsError as error:
        return {
            "name": vm.name, "domain_node": None, "server_node": None, "message": error.message, "profile": None,
            "decision": None, "way": None,
        }  # fmt: skip
