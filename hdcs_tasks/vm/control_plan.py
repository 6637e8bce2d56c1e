"""Dry runs: where layer two would put VMs as things are now, and for every server node why or why not. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from hdcs_tasks.errors import NoCapacity
from hdcs_tasks.operations.control import Control, Tx
from hdcs_tasks.pool import planning
from hdcs_tasks.pool import rules as pool_rules
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.pool.rooms import candidate, vm_shape, vm_terms
from hdcs_tasks.pool.rules import Candidate
from hdcs_tasks.pool.words import explain
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Vm
from hdcs_tasks.vm.control import check_given, check_pin, get_vm, label_of
from hdcs_tasks.vm.control_clone import (
    CloneRequest,
    Shape,
    checked,
    choose,
    choose_homes,
    clone_rooms,
    warm_wish,
)
from hdcs_tasks.vm.control_destination import check_migrate
from hdcs_tasks.vm.control_take import ready
from hdcs_tasks.vm.move_rules import ALIVE, MoveOptions, Way


def plan_start(control: Control, names: Sequence[str], *, pin: str | None = None) -> dict[str, Any]:
    """What ``start`` or ``start_many`` would do. Raises NotFound and WrongState as they do.

    ``{fits, vms: [{name, domain_node, server_node, message, decision}], refusal}``; ``decision`` as planning.decision
    tells it, with every server node. What does not fit would wait in line: ``server_node`` is None.
    """
    with control.store.read() as session:
        tx = Tx(session, control, [])
        vms = [get_vm(session, name) for name in dict.fromkeys(names)]
        for vm in vms:
            check_given(tx, vm, "start")
            if pin is not None:
                check_pin(session, vm, pin)
        rooms = _rooms(control, session, vms)
    shown: list[dict[str, Any]] = []
    for home, room in rooms.items():
        there = [vm for vm in vms if vm.home == home]
        waiters = [planning.Waiter(vm.id, vm_shape(vm), vm_terms(vm, pin=pin)) for vm in there]
        planned, _ = planning.plan(room, waiters, control.settings.capacity)
        shown += [_shown(control, vm, found, home) for vm, found in zip(there, planned, strict=True)]
    return _answer(shown)


def plan_clone(control: Control, request: CloneRequest) -> dict[str, Any]:
    """What ``clone`` would do, and why or why not for every server node. Changes nothing.

    ``{fits, message, vms: [{name, domain_node, server_node, warm_pool, was, message, decision}], domain_nodes:
    [{domain_node, why, load, vms, has_image, decision}], refusal}``; ``server_node`` is where layer two would start it
    as things are now; ``warm_pool`` and ``was``: the ready desktop it is (None: it is cloned).
    """
    with control.store.read() as session:
        tx = Tx(session, control, [])
        names, shape, images = checked(tx, request)
        warm = ready(tx, warm_wish(request, shape, images))[: len(names)] if request.warm else []
        vms = _plan_warm(tx, names, warm, shape.terms(request.tags))
        rooms = clone_rooms(tx, request, shape, images) if len(names) > len(warm) else []
    cold = names[len(warm) :]
    taken = f"{len(warm)} of {len(names)} are taken ready from warm pools" if request.warm else ""
    if not cold:
        return _answer(vms) | {"message": taken, "domain_nodes": []}
    choice = choose(control, rooms, shape, request.tags, len(cold))
    settings = control.settings.capacity
    words = explain(choice, shape.wanted, control.settings.capacity, shape.profile)
    shown = {
        "message": f"{taken}; {words}" if taken else words,
        "domain_nodes": [planning.pool_shown(verdict, rooms, shape.wanted, settings) for verdict in choice.verdicts],
    }
    try:
        homes, _ = choose_homes(control, rooms, shape, request.tags, len(cold))
    except NoCapacity as error:
        return shown | {"fits": False, "vms": [], "refusal": error.to_dict()}
    nodes = _server_nodes(control, rooms, shape, request.tags, homes)
    vms += [
        {"name": name, "domain_node": home, "server_node": at, "warm_pool": None, "was": None, "message": "",
         "decision": None} for name, home, at in zip(cold, homes, nodes, strict=True)
    ]  # fmt: skip
    return _answer(vms) | shown


def _plan_warm(tx: Tx, names: Sequence[str], warm: Sequence[Vm], terms: pool_rules.Terms) -> list[dict[str, Any]]:
    """What becomes of the ready desktops that are taken: who runs stays where it is, saved memory is started."""
    rooms = _rooms(tx.control, tx.session, warm)
    shown = []
    for name, vm in zip(names, warm, strict=False):
        found: dict[str, Any] = {
            "domain_node": vm.home, "server_node": vm.server_node, "message": "", "profile": vm.profile,
            "decision": None,
        }  # fmt: skip
        if vm.state is VmState.SAVED:
            waiter = planning.Waiter(vm.id, vm_shape(vm), replace(terms, vm=vm.id, start=True))
            planned, rooms[vm.home] = planning.plan(rooms[vm.home], [waiter], tx.control.settings.capacity)
            found = _shown(tx.control, vm, planned[0], vm.home)
        shown.append(found | {"name": name, "warm_pool": vm.warm_pool, "was": vm.name})
    return shown


def _server_nodes(
    control: Control, rooms: Sequence[Candidate], shape: Shape, tags: Sequence[str], homes: Sequence[str]
) -> list[str | None]:
    left = {room.domain_node: room for room in rooms}
    found: list[str | None] = []
    for home in homes:
        waiter = planning.Waiter("", shape.wanted, shape.terms(tags))
        planned, left[home] = planning.plan(left[home], [waiter], control.settings.capacity)
        found.append(planned[0].node)
    return found


def plan_migrate(
    control: Control, name: str, *, to: str | None = None, options: MoveOptions | None = None
) -> dict[str, Any]:
    """What ``migrate`` would do; the form of ``plan_start``'s answer. A VM that does not run gets no server node: only
    the other domain node's storage is looked at."""
    with control.store.read() as session:
        return _answer([planned_move(Tx(session, control, []), get_vm(session, name), to, options, {})])


def planned_move(
    tx: Tx, vm: Vm, to: str | None, options: MoveOptions | None, rooms: dict[str, Candidate]
) -> dict[str, Any]:
    """One VM of ``plan_migrate``'s answer. ``rooms``: domain nodes as the moves planned before leave them, by name;
    this one is taken account of. Raises as ``migrate`` does."""
    way, home, pin = check_migrate(tx, vm, to, options or MoveOptions())
    room = room_of(tx, home, rooms)
    if vm.state not in ALIVE:
        found = _rests(vm, home, room, way)
        if way is Way.CARRY and not found["message"]:
            rooms[home] = replace(room, free_disk_bytes=_less(room.free_disk_bytes, vm.disk_bytes))
        return found
    stays = home == vm.home  # then it keeps its port, and its disk lies where it lay
    terms = vm_terms(vm, pin=pin, exclude=[vm.server_node or ""], pinned=False, start=False)
    looked_at = replace(room, free_ports=None) if stays else room
    waiter = planning.Waiter(vm.id, vm_shape(vm), terms)
    planned, after = planning.plan(looked_at, [waiter], tx.control.settings.capacity)
    rooms[home] = after
    if stays:
        rooms[home] = replace(after, free_ports=room.free_ports, free_disk_bytes=room.free_disk_bytes)
    return _shown(tx.control, vm, planned[0], home) | {"way": way.value}


def room_of(tx: Tx, home: str, rooms: dict[str, Candidate]) -> Candidate:
    """The domain node as it is now, or as ``rooms`` has it already."""
    if home not in rooms:
        rooms[home] = candidate(tx.control, tx.session, get_domain_node(tx.session, home), cooling_ports=False)
    return rooms[home]


def _less(amount: int | None, by: int) -> int | None:
    return None if amount is None else amount - by


def _rests(vm: Vm, home: str, room: Candidate, way: Way) -> dict[str, Any]:
    """The plan of a VM that does not run."""
    lacks = way is Way.CARRY and room.free_disk_bytes is not None and room.free_disk_bytes < vm.disk_bytes
    why = f"storage of {home} can promise {max(0, room.free_disk_bytes or 0)} more bytes" if lacks else ""
    return {
        "name": vm.name, "domain_node": home, "server_node": None, "message": why, "profile": vm.profile,
        "decision": None, "way": way.value,
    }  # fmt: skip


def _rooms(control: Control, session: Session, vms: Sequence[Vm]) -> dict[str, Candidate]:
    homes = dict.fromkeys(vm.home for vm in vms)
    return {
        home: candidate(control, session, get_domain_node(session, home), cooling_ports=False) for home in homes
    }  # fmt: skip


def _shown(control: Control, vm: Vm, planned: planning.Planned, home: str) -> dict[str, Any]:
    why = (
        "" if planned.node else planning.refusal_words(label_of(control, vm), home, planned.verdicts, planned.pool_why)
    )
    return {
        "name": vm.name, "domain_node": home, "server_node": planned.node, "message": why, "profile": vm.profile,
        "decision": planning.decision(
            planned.room, planned.verdicts, vm_shape(vm), control.settings.capacity, pool_why=planned.pool_why
        ),
    }  # fmt: skip


def _answer(shown: list[dict[str, Any]]) -> dict[str, Any]:
    refused = [vm for vm in shown if vm["message"]]
    refusal = None
    if refused:
        some = f" ({len(shown) - len(refused)} of {len(shown)} VMs fit)" if len(shown) > 1 else ""
        hint = f"See: hdcs pool capacity {refused[0]['profile']}"
        refusal = NoCapacity(refused[0]["message"] + some, next=hint).to_dict()
    return {"fits": not refused, "vms": shown, "refusal": refusal}
