"""The desktops of a warm pool, and whether it lacks one at this very moment."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Conflict, NotFound
from hdcs_tasks.image.control_publish import versions
from hdcs_tasks.operations.control import Tx
from hdcs_tasks.store.models import Vm, WarmPool
from hdcs_tasks.vm.control_take import busy_of
from hdcs_tasks.vm.warm_rules import Member, plan


def check_short(tx: Tx, name: str, count: int) -> None:
    """Conflict unless the pool lacks ``count`` desktops or more. Holds the pool until the transaction ends: of two
    sweeps that both saw it short, one makes what it lacks."""
    pool = tx.session.get(WarmPool, name, with_for_update=True, populate_existing=True)
    if pool is None:
        raise Conflict(f"warm pool {name} is no more", next="See: hdcs warm list")
    there = [member for member, _ in members(tx.session, pool)]
    if plan(there, size=pool.size, saved=pool.saved).clone < count:
        raise Conflict(f"warm pool {name} has its {pool.size} desktops: somebody else made them", next="Nothing to do")


def members(session: Session, pool: WarmPool) -> list[tuple[Member, Vm]]:
    current = _current(session, pool.image)
    rows = session.scalars(select(Vm).where(Vm.warm_pool == pool.name, Vm.deleted_at.is_(None)).order_by(Vm.name)).all()
    busy = busy_of(session, [vm.id for vm in rows])
    return [
        (Member(vm.name, vm.image_id == current.get(vm.home) and vm.profile == pool.profile, vm.state,
                vm.ready_at is not None, vm.id in busy), vm)
        for vm in rows
    ]  # fmt: skip


def _current(session: Session, image: str) -> dict[str, str]:
    """Domain node → id of the version that clones take there; empty where the image is no more."""
    try:
        return {home: found.id for home, found in versions(session, image).items()}
    except NotFound:
        return {}
