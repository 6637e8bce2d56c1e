"""Taking a ready desktop out of a warm pool: a compare-and-set in the record.

It gets the taker's name, owner, tags and rules, and its pool makes another. One of an older version of the image is
never given out, nor one that is worked on. Its guest keeps the name it was started under until its next start: nothing
goes by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.operations.control import Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.operations.sending import send
from hdcs_tasks.pool.rules import marks_of
from hdcs_tasks.routing import CONTROL
from hdcs_tasks.states import VmState
from hdcs_tasks.store import metering
from hdcs_tasks.store.models import Image, Operation, Step, Vm, now


def busy_of(session: Session, vm_ids: Sequence[str]) -> set[str | None]:
    return set(session.scalars(select(Operation.live_vm).where(Operation.live_vm.in_(vm_ids))))


def top_up_soon(tx: Tx) -> None:
    """Not only at the next sweep; should this message be lost, the sweep does it."""
    celery = tx.control.celery
    tx.after(lambda: send(celery, "vm.top_up_warm", {}, CONTROL, expires_s=60))


@dataclass(frozen=True)
class Wish:
    """What somebody would take. ``images``: the version clones take in each domain node; ``domain_node`` None: any;
    ``ruled``: the request has rules of its own about where they may run, which one that runs already cannot follow."""

    images: Mapping[str, Image]
    profile: str
    domain_node: str | None
    tags: Sequence[str]
    ruled: bool


def ready(tx: Tx, wish: Wish) -> list[Vm]:
    """The ready desktops this wish may be given, in the order they are given: those that run before those with saved
    memory."""
    versions = {image.id for image in wish.images.values()}
    query = select(Vm).where(
        Vm.warm_pool.is_not(None), Vm.deleted_at.is_(None), Vm.image_id.in_(versions), Vm.profile == wish.profile,
        (Vm.state == VmState.SAVED) | ((Vm.state == VmState.RUNNING) & Vm.ready_at.is_not(None)),
    ).order_by(Vm.state, Vm.created_at)  # fmt: skip
    if wish.domain_node is not None:
        query = query.where(Vm.home == wish.domain_node)
    images = wish.images
    rows = [vm for vm in tx.session.scalars(query) if vm.home in images and images[vm.home].id == vm.image_id]
    busy = busy_of(tx.session, [vm.id for vm in rows])
    return [
        vm for vm in rows if vm.id not in busy
        and not (vm.state is VmState.RUNNING and (wish.ruled or _is_shunned(tx, vm, wish.tags)))
    ]  # fmt: skip


def take(tx: Tx, names: Sequence[str], wish: Wish, *, owner: str, rules: dict[str, Any]) -> list[tuple[Vm, str]]:
    """As many ready desktops as there are for ``names``, in that order, each with the pool it came from; now the
    taker's."""
    found: list[tuple[Vm, str]] = []
    wanted = list(names)
    for vm in ready(tx, wish):
        if not wanted:
            break
        running, pool = vm.state is VmState.RUNNING, vm.warm_pool or ""
        values = {"warm_pool": None, "name": wanted[0], "owner": owner, "tags": list(wish.tags), "rules": rules,
                  "active_at": now()}  # fmt: skip
        claim = update(Vm).where(Vm.id == vm.id, Vm.warm_pool == pool, Vm.state == vm.state)
        if getattr(tx.session.execute(claim.values(**values)), "rowcount", 0) != 1:
            continue
        tx.session.refresh(vm)
        metering.changed(tx.session, vm)  # from now on it is used by its taker
        wanted.pop(0)
        found.append((vm, pool))
        if running and wish.tags:
            _mark(tx, vm, marks_of(wish.tags, ()))
    if any(vm.state is VmState.RUNNING for vm, _ in found):
        top_up_soon(tx)
    return found


@on_done("vm.clone:vm.start_on_node")
def _served(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    """Another one in its place, now that the taker of saved memory has his: the boot of it would slow him down."""
    if operation.request.get("warm_pool"):
        top_up_soon(tx)


@on_failed("vm.clone:vm.start_on_node")
def _not_served(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    if operation.request.get("warm_pool"):
        top_up_soon(tx)


def _is_shunned(tx: Tx, vm: Vm, tags: Sequence[str]) -> bool:
    """Whether a VM beside it is to be kept apart from one of these tags."""
    if not tags:
        return False
    beside = tx.control.reservations.marks.members(vm.home).get(vm.server_node or "", {})
    return any(beside.get(f"!{tag}", frozenset()) - {vm.id} for tag in tags)


def _mark(tx: Tx, vm: Vm, marks: Sequence[str]) -> None:
    control, home, vm_id = tx.control, vm.home, vm.id
    tx.after(lambda: control.reservations.marks.add(home, vm_id, marks))
