"""Quotas per owner: checked when something is asked for, in the transaction that would grant it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Invalid, NotFound, QuotaExceeded
from hdcs_tasks.operations.control import Control, Tx
from hdcs_tasks.states import VM_HOLDS_GUEST, VmState
from hdcs_tasks.store.models import Vm
from hdcs_tasks.store.models_watch import Quota
from hdcs_tasks.vm.quota_rules import NAMES, Amounts, refusals

EVERYBODY = "*"
_OF = (
    select(Quota).where(Quota.owner == bindparam("owner")).with_for_update()
    .execution_options(populate_existing=True)
)  # fmt: skip
_RUNS = (*sorted(VM_HOLDS_GUEST), VmState.CREATING)
"""A VM that is being cloned counts as running: most are started as soon as they are there."""
_CHECKED = "hdcs_quota"


def check_quota(tx: Tx, owner: str, asked: Amounts) -> None:
    """QuotaExceeded if ``asked`` on top of what the owner has passes a limit.

    The quota's row stays locked until the transaction ends: two requests at once cannot both take the last of it.
    """
    known: dict[str, Quota | None] = tx.session.info.setdefault(_CHECKED, {})
    if owner not in known:
        known[owner] = _quota_of(tx.session, owner)
    quota = known[owner]
    if quota is None:
        return
    found = refusals(_limits(quota), used_by(tx.session, owner), asked)
    if found:
        raise QuotaExceeded(
            f"the quota of {owner or 'whoever has no name'} does not allow it: {'; '.join(found)}",
            next=f"Stop or delete VMs, or have the quota raised: hdcs quota set {quota.owner}",
            details={"owner": owner, "refused": found},
        )


def _quota_of(session: Session, owner: str) -> Quota | None:
    for name in (owner, EVERYBODY):
        found = session.scalar(_OF, {"owner": name})
        if found is not None:
            return found
    return None


def starting(vm: Vm) -> Amounts:
    """What one more running VM takes."""
    return Amounts(running_vms=1, vcpus=vm.vcpus, memory_mib=vm.memory_mib)


def used_by(session: Session, owner: str) -> Amounts:
    living = (Vm.owner == owner, Vm.deleted_at.is_(None))
    count, disk = session.execute(select(func.count(), func.sum(Vm.disk_bytes)).where(*living)).one()
    running, vcpus, memory = session.execute(
        select(func.count(), func.sum(Vm.vcpus), func.sum(Vm.memory_mib)).where(*living, Vm.state.in_(_RUNS))
    ).one()
    return Amounts(count, running, int(vcpus or 0), int(memory or 0), int(disk or 0))


def _limits(quota: Quota) -> dict[str, int | None]:
    return {name: getattr(quota, name) for name in NAMES}


def set_quota(control: Control, owner: str, **changes: int | None) -> dict[str, Any]:
    """Change limits of an owner (``*``: of everybody without a quota); None: no limit. What is in use stays."""
    if not owner or len(owner) > 255:
        raise Invalid(f"{owner!r} cannot be an owner", next="Name one, or * for everybody without a quota")
    unknown = sorted(set(changes) - set(NAMES))
    if unknown:
        raise Invalid(f"there is no limit {unknown[0]!r}", next=f"Known: {', '.join(NAMES)}")
    for name, value in changes.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53):
            raise Invalid(f"{name} {value!r} is not a number from 0")
    with control.transaction() as tx:
        quota = tx.session.get(Quota, owner, with_for_update=True) or Quota(owner=owner)
        for name, value in changes.items():
            setattr(quota, name, value)
        tx.session.add(quota)
        tx.session.flush()
        return _view(tx.session, quota)


def drop_quota(control: Control, owner: str) -> None:
    """The owner has no quota of their own any more; NotFound."""
    with control.transaction() as tx:
        quota = tx.session.get(Quota, owner)
        if quota is None:
            raise NotFound(f"{owner!r} has no quota", next="See: hdcs quota list")
        tx.session.delete(quota)


def list_quotas(control: Control) -> list[dict[str, Any]]:
    """Every quota with what its owner has in use."""
    with control.store.read() as session:
        return [_view(session, quota) for quota in session.scalars(select(Quota).order_by(Quota.owner))]


def _view(session: Session, quota: Quota) -> dict[str, Any]:
    used = None if quota.owner == EVERYBODY else used_by(session, quota.owner)
    return {"owner": quota.owner} | _limits(quota) | {
        f"used_{name}": None if used is None else getattr(used, name) for name in NAMES
    }  # fmt: skip
