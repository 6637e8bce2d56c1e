"""Warm pools: desktops of an image and profile that are kept ready, so that who asks for one gets it at once.

A sweep tops them up (pure plan: warm_rules.py) with ordinary clones, starts, saves and deletes. How one is taken:
control_take.py. The version that clones take (published, else newest) is followed: desktops of another one are deleted
and made anew. Sweeps may overlap: a clone counts once more as it is opened (control_warm_count.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.clock import random_hex
from hdcs_tasks.errors import Conflict, HdcsError, Invalid
from hdcs_tasks.image.control import get_image
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.pool.profiles import get_profile
from hdcs_tasks.routing import check_name
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Vm, WarmPool
from hdcs_tasks.store.naming import named
from hdcs_tasks.vm import control as vms
from hdcs_tasks.vm import control_delete
from hdcs_tasks.vm.control_clone import CloneRequest, clone
from hdcs_tasks.vm.control_take import top_up_soon
from hdcs_tasks.vm.control_warm_count import members
from hdcs_tasks.vm.warm_rules import WarmPlan, is_ready, plan

log = logger(__name__)

SIZE_MAX = 1000
NAME_MAX = 40
AT_A_TIME = 20
"""New desktops one sweep begins with at most: a pool that grows is not a boot storm."""


# --- the record


def create(
    control: Control, name: str, *, image: str, profile: str, size: int, saved: bool = False,
    domain_node: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Record a warm pool of ``size`` desktops; the sweep makes them. ``saved``: with their memory in storage, where
    they take no server node's room and start in about a second; else started. Raises Invalid, NotFound, Conflict."""
    check_name("warm pool", name)
    if len(name) > NAME_MAX:
        raise Invalid(f"{name!r} is longer than {NAME_MAX} characters", next="Its desktops are named after it")
    if ":" in image:
        raise Invalid(f"{image!r} names a version: a warm pool follows the newest", next=f"Use {image.split(':')[0]}")
    _check_size(size)
    with control.transaction() as tx:
        if tx.session.get(WarmPool, name) is not None:
            raise Conflict(f"there is a warm pool {name} already", next="See: hdcs warm list")
        get_image(tx.session, image)
        get_profile(tx.session, profile)
        if domain_node is not None:
            get_domain_node(tx.session, domain_node)
        tx.session.add(
            WarmPool(name=name, image=image, profile=profile, size=size, saved=saved, domain_node=domain_node)
        )
        top_up_soon(tx)
    return show(control, name)


def _check_size(size: int) -> None:
    if not 0 <= size <= SIZE_MAX:
        raise Invalid(f"a size of {size} is not between 0 and {SIZE_MAX}")


def change(control: Control, name: str, *, size: int | None = None, saved: bool | None = None) -> dict[str, Any]:
    """Change how many are kept, or how; the sweep makes it so."""
    if size is not None:
        _check_size(size)
    with control.transaction() as tx:
        pool = _get(tx.session, name)
        pool.size = pool.size if size is None else size
        pool.saved = pool.saved if saved is None else saved
        top_up_soon(tx)
    return show(control, name)


def delete(control: Control, name: str) -> None:
    """Delete a warm pool; the desktops nobody has taken are deleted by the sweep."""
    with control.transaction() as tx:
        tx.session.delete(_get(tx.session, name))
        top_up_soon(tx)


def _get(session: Session, name: str) -> WarmPool:
    return named(session, WarmPool, name, "warm pool", "hdcs warm list")


def show(control: Control, name: str) -> dict[str, Any]:
    with control.store.read() as session:
        return _view(session, _get(session, name))


def list_pools(control: Control) -> list[dict[str, Any]]:
    with control.store.read() as session:
        return [_view(session, pool) for pool in session.scalars(select(WarmPool).order_by(WarmPool.name))]


def _view(session: Session, pool: WarmPool) -> dict[str, Any]:
    there = members(session, pool)
    return {
        "name": pool.name, "image": pool.image, "profile": pool.profile, "domain_node": pool.domain_node,
        "size": pool.size, "kept": "saved" if pool.saved else "started",
        "ready": sum(is_ready(member, pool.saved) for member, _ in there),
        "desktops": {vm.name: vm.state.value for _, vm in there}, "created_at": pool.created_at.isoformat(),
    }  # fmt: skip


# --- topping up


def warm_sweep(control: Control) -> int:
    """Give every pool what it needs next, and delete the desktops of pools that are no more; how many changes began."""
    with control.store.read() as session:
        pools = list(session.scalars(select(WarmPool)))
        plans = [
            (pool, plan([m for m, _ in members(session, pool)], size=pool.size, saved=pool.saved)) for pool in pools
        ]
        names = [pool.name for pool in pools]
        orphans = session.scalars(select(Vm.name).where(
            Vm.warm_pool.is_not(None), Vm.warm_pool.not_in(names), Vm.deleted_at.is_(None), Vm.state != VmState.DELETING
        )).all()  # fmt: skip
    begun = sum(_give(control, "delete", vm, Asked(by="warm pools", reason="its pool is no more")) for vm in orphans)
    return begun + sum(_carry_out(control, pool, wanted) for pool, wanted in plans)


def _carry_out(control: Control, pool: WarmPool, wanted: WarmPlan) -> int:
    asked = Asked(by=f"warm pool {pool.name}", reason="kept ready")
    begun = 0
    for verb, chosen in (("delete", wanted.delete), ("save", wanted.save), ("start", wanted.start)):
        begun += sum(_give(control, verb, vm, asked) for vm in chosen)
    for _ in range(min(wanted.clone, AT_A_TIME)):
        name = f"warm-{pool.name}-{random_hex(4)}"
        request = CloneRequest(
            pool.image, name, 1, pool.profile, pool.domain_node, start=True, warm_pool=pool.name
        )  # fmt: skip
        if not _guarded(partial(clone, control, request, asked), f"warm pool {pool.name}"):
            break
        begun += 1
    return begun


def _give(control: Control, verb: str, vm: str, asked: Asked) -> bool:
    short = {"delete": control_delete.delete, "start": vms.start}.get(verb)
    return _guarded(partial(short, control, vm, asked) if short else partial(vms.command, control, verb, vm, asked), vm)


def _guarded(action: Callable[[], object], what: str) -> bool:
    try:
        action()
    except HdcsError as error:
        log.warning("a warm pool goes short for now", what=what, error=str(error))
        return False
    return True
