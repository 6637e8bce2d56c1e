"""Backup policies: which VMs when, what is kept, what is proven. A sweep opens what is due; beat runs the sweep.

A run claims its moment by moving ``slot_at`` on, so it happens once however many beats there are, and moments missed
while nobody was there are caught up by one run. Its VMs wait in ``pending`` and are begun as far as the storage of
each domain node may be busy; a backup that ends wakes the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup.control_copy import open_copy
from hdcs_tasks.backup.control_drill import drill
from hdcs_tasks.backup.control_prune import add_prune_steps
from hdcs_tasks.backup.rules import CHAIN_MAX, Keep, Point, bandwidth_share, choose_drills
from hdcs_tasks.errors import Conflict, HdcsError, Invalid, Unavailable, WrongState
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_done, on_failed
from hdcs_tasks.operations.sending import send
from hdcs_tasks.operations.settling import has_live_step
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.routing import CONTROL, check_name
from hdcs_tasks.states import OPERATION_LIVE
from hdcs_tasks.store.models import Backup, BackupPolicy, Operation, Step, Vm, now
from hdcs_tasks.store.naming import named
from hdcs_tasks.vm.control_list import list_vms
from hdcs_tasks.vm.control_select import check_selector
from hdcs_tasks.when import check_when, last_due

log = logger(__name__)

SELECTOR = frozenset({"names", "tag", "owner", "home", "profile"})


# --- the record


def create(
    control: Control, name: str, *, schedule: str, selector: Mapping[str, Any], keep: Keep,
    full_every: int = CHAIN_MAX, full_percent: int | None = None, merge: bool = False,
    bandwidth_mib_s: int | None = None, concurrency: int = 2, drill_schedule: str | None = None, drill_points: int = 1,
    copy_to: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Record a policy; its first run is at the next moment of ``schedule`` (UTC; words as in ``when.last_due``).

    ``selector``: names, tag, owner, home, profile, all of which a VM must match; empty means every VM. ``concurrency``:
    backups at once on one domain node's storage; ``bandwidth_mib_s``: what they may copy in all. ``copy_to``: the
    domain node that gets a second copy of each point. Raises Invalid, Conflict (the name is taken), NotFound.
    """
    check_name("policy", name)
    _check(selector, full_every, full_percent, bandwidth_mib_s, concurrency, drill_points)
    check_when(schedule)
    if drill_schedule is not None:
        check_when(drill_schedule)
    with control.transaction() as tx:
        if tx.session.get(BackupPolicy, name) is not None:
            raise Conflict(f"there is a policy {name} already", next="See: hdcs policy list")
        check_selector(tx.session, selector)
        if copy_to is not None:
            get_domain_node(tx.session, copy_to)
        begun = now()
        policy = BackupPolicy(
            name=name, selector=dict(selector), schedule=schedule, full_every=full_every, full_percent=full_percent,
            keep=asdict(keep), merge=merge, bandwidth_mib_s=bandwidth_mib_s, concurrency=concurrency,
            drill_schedule=drill_schedule, drill_points=drill_points, copy_to=copy_to, slot_at=begun,
            drill_slot_at=begun, created_at=begun, pending=[],
        )  # fmt: skip
        tx.session.add(policy)
        tx.session.flush()
        return view(policy)


def _check(
    selector: Mapping[str, Any], full_every: int, full_percent: int | None, bandwidth_mib_s: int | None,
    concurrency: int, drill_points: int,
) -> None:  # fmt: skip
    if unknown := sorted(set(selector) - SELECTOR):
        raise Invalid(f"VMs are not selected by {unknown[0]!r}", next=f"Known: {', '.join(sorted(SELECTOR))}")
    for what, number, least, most in (
        ("a full one every", full_every, 1, CHAIN_MAX), ("full percent", full_percent, 1, 100_000),
        ("bandwidth in MiB/s", bandwidth_mib_s, 1, 1_000_000), ("concurrency", concurrency, 1, 1000),
        ("points per drill", drill_points, 1, 1000),
    ):  # fmt: skip
        if number is not None and not least <= number <= most:
            raise Invalid(f"{what} {number} is not between {least} and {most}")


def _get(session: Session, name: str) -> BackupPolicy:
    return named(session, BackupPolicy, name, "policy", "hdcs policy list")


def show(control: Control, name: str) -> dict[str, Any]:
    with control.store.read() as session:
        return view(_get(session, name))


def list_policies(control: Control) -> list[dict[str, Any]]:
    with control.store.read() as session:
        return [view(policy) for policy in session.scalars(select(BackupPolicy).order_by(BackupPolicy.name))]


def delete(control: Control, name: str) -> None:
    """Delete a policy; its backups stay."""
    with control.transaction() as tx:
        tx.session.delete(_get(tx.session, name))


def enable(control: Control, name: str, enabled: bool) -> dict[str, Any]:
    """Switch a policy on or off; moments it slept through are caught up by one run."""
    with control.transaction() as tx:
        policy = _get(tx.session, name)
        policy.enabled = enabled
        return view(policy)


def view(policy: BackupPolicy) -> dict[str, Any]:
    keys = (
        "name", "enabled", "schedule", "selector", "full_every", "full_percent", "keep", "merge", "bandwidth_mib_s",
        "concurrency", "drill_schedule", "drill_points", "copy_to",
    )  # fmt: skip
    return {key: getattr(policy, key) for key in keys} | {
        # Until its first run the moment it last began with is that of its creation.
        "last_run_at": policy.slot_at.isoformat() if policy.slot_at > policy.created_at else None,
        "slot_at": policy.slot_at.isoformat(), "pending": len(policy.pending),
        "created_at": policy.created_at.isoformat(),
    }  # fmt: skip


def terms(policy: BackupPolicy) -> dict[str, Any]:
    """What a backup asked for by this policy carries along."""
    keys = ("name", "full_every", "full_percent", "keep", "merge", "copy_to")
    share = bandwidth_share(policy.bandwidth_mib_s, policy.concurrency)
    return {key: getattr(policy, key) for key in keys} | {"bandwidth_mib_s": share}


# --- runs


def policy_sweep(control: Control) -> None:
    """Begin the runs and drills that are due, then as many backups as may run at once."""
    with control.store.read() as session:
        policies = list(session.scalars(select(BackupPolicy).where(BackupPolicy.enabled)))
    for policy in policies:
        if (slot := last_due(policy.schedule, now())) > policy.slot_at:
            begin_run(control, policy.name, slot)
        if policy.drill_schedule and (slot := last_due(policy.drill_schedule, now())) > policy.drill_slot_at:
            _begin_drills(control, policy, slot)
    open_pending(control)


def run(control: Control, name: str) -> dict[str, Any]:
    """Begin a run now, besides the schedule; returns the policy's view with how many VMs are pending."""
    with control.store.read() as session:
        _get(session, name)
    begin_run(control, name, now())
    found = show(control, name)
    open_pending(control)
    return found


def begin_run(control: Control, name: str, slot: datetime) -> bool:
    """Claim the moment ``slot`` and put the selected VMs in line; False if somebody else has claimed it."""
    with control.transaction() as tx:
        claim = update(BackupPolicy).where(BackupPolicy.name == name, BackupPolicy.slot_at < slot).values(slot_at=slot)
        if getattr(tx.session.execute(claim), "rowcount", 0) != 1:
            return False
        policy = tx.session.get_one(BackupPolicy, name, populate_existing=True)
        if policy.pending:
            tx.event(
                "backup.missed", name, f"policy {name}: {len(policy.pending)} VMs were not backed up in time",
                vms=policy.pending,
            )  # fmt: skip
        policy.pending = [vm["id"] for vm in list_vms(control, with_warm=False, **policy.selector)]
        return True


def open_pending(control: Control) -> int:
    """Begin backups of VMs in line, as far as each domain node's storage may be busy; returns how many."""
    with control.store.read() as session:
        waiting = select(BackupPolicy).where(BackupPolicy.enabled).order_by(BackupPolicy.slot_at)
        policies = [policy for policy in session.scalars(waiting) if policy.pending]
        busy = _busy(session) if policies else {}
        homes = _homes(session, [vm_id for policy in policies for vm_id in policy.pending])
    opened = 0
    for policy in policies:
        done = {vm_id for vm_id in policy.pending if vm_id not in homes}  # deleted meanwhile
        for vm_id in policy.pending:
            home = homes.get(vm_id)
            if home is None or busy.get(home, 0) >= policy.concurrency:
                continue
            if (begun := _begin(control, policy, vm_id)) is not None:
                done.add(vm_id)
                busy[home] = busy.get(home, 0) + begun
                opened += begun
        _out_of_line(control, policy, done)
    return opened


def _busy(session: Session) -> dict[str, int]:
    """Backups under way, by domain node."""
    query = select(Vm.home, func.count()).join(Operation, Operation.vm_id == Vm.id)
    query = query.where(Operation.kind == "backup.create", Operation.state.in_(OPERATION_LIVE)).group_by(Vm.home)
    return {home: int(count) for home, count in session.execute(query)}


def _homes(session: Session, vm_ids: list[str]) -> dict[str, str]:
    rows = session.execute(select(Vm.id, Vm.home).where(Vm.id.in_(vm_ids), Vm.deleted_at.is_(None)))
    return {vm_id: home for vm_id, home in rows}


def _begin(control: Control, policy: BackupPolicy, vm_id: str) -> int | None:
    """1 if the VM's backup was begun, 0 if it never will, None if it stays in line."""
    key = f"policy:{policy.name}:{policy.slot_at.isoformat()}:{vm_id}"
    asked = Asked(by=f"policy {policy.name}", reason=policy.schedule, idempotency_key=key, key_says_all=True)
    try:
        share = bandwidth_share(policy.bandwidth_mib_s, policy.concurrency)
        backups.create(control, vm_id, asked, bandwidth_mib_s=share, policy=terms(policy))
    except (Conflict, WrongState, Unavailable):
        return None  # busy, starting, saved: the next sweep asks again, until the next run
    except HdcsError as error:
        log.warning("policy cannot back up a VM", policy=policy.name, vm=vm_id, error=str(error))
        return 0
    return 1


def _out_of_line(control: Control, policy: BackupPolicy, done: set[str]) -> None:
    if not done:
        return
    with control.transaction() as tx:
        row = tx.session.get(BackupPolicy, policy.name, with_for_update=True)
        if row is not None and row.slot_at == policy.slot_at:
            row.pending = [vm_id for vm_id in row.pending if vm_id not in done]


# --- what follows a backup that a policy asked for


@on_done("backup.create:backup.create_on_node")
def _prune_after(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    policy = operation.request.get("policy")
    if not policy:
        return
    operation.request = operation.request | {"created": result}
    if operation.cancel_asked or not add_prune_steps(
        tx, operation, operation.request["vm_id"], Keep(**policy["keep"]), merge=policy["merge"]
    ):
        _finish(tx, operation)


@on_done("backup.create:backup.prune_on_node")
def _pruned_after(tx: Tx, operation: Operation, step: Step, result: dict[str, Any]) -> None:
    dropped = [*operation.request.get("dropped", []), *result["dropped"]]
    operation.request = operation.request | {"dropped": dropped}
    if not has_live_step(tx, operation):
        _finish(tx, operation)


@on_failed("backup.create:backup.prune_on_node")
def _not_pruned_after(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    """The backup is good all the same; the next one prunes again."""
    tx.event("backup.not_pruned", operation.subject, f"VM {operation.subject}: {error.message}")
    if not has_live_step(tx, operation):
        _finish(tx, operation)


@on_failed("backup.create:backup.create_on_node")
def _not_created(tx: Tx, operation: Operation, step: Step, error: HdcsError) -> None:
    if operation.request.get("policy") and not has_live_step(tx, operation):
        _wake(tx)


def _finish(tx: Tx, operation: Operation) -> None:
    tx.finish(operation, operation.request["created"] | {"dropped": operation.request.get("dropped", [])})
    if operation.request["policy"].get("copy_to") and not operation.cancel_asked:
        _copy_after(tx, operation, operation.request["policy"])
    _wake(tx)


def _copy_after(tx: Tx, operation: Operation, policy: dict[str, Any]) -> None:
    """The second copy is an operation of its own: meanwhile the VM is free. What one misses the next one brings."""
    backup = tx.session.get_one(Backup, operation.request["backup"])
    asked = Asked(by=f"policy {policy['name']}", reason="second copy")
    try:
        open_copy(tx, backup, policy["copy_to"], asked, bandwidth_mib_s=policy["bandwidth_mib_s"])
    except HdcsError as error:
        tx.event("backup.not_copied", backup.id, f"backup {backup.id}: {error.message}")


def _wake(tx: Tx) -> None:
    """There is room for the next in line; should this message be lost, the sweep finds it."""
    celery = tx.control.celery
    tx.after(lambda: send(celery, "backup.open_pending", {}, CONTROL, expires_s=60))


# --- drills


def _begin_drills(control: Control, policy: BackupPolicy, slot: datetime) -> None:
    with control.transaction() as tx:
        claim = update(BackupPolicy).where(BackupPolicy.name == policy.name, BackupPolicy.drill_slot_at < slot)
        if getattr(tx.session.execute(claim.values(drill_slot_at=slot)), "rowcount", 0) != 1:
            return
        vms = list_vms(control, with_warm=False, **policy.selector)
        by_vm: dict[str, list[Point]] = {vm["id"]: backups.points_of(tx.session, vm["id"]) for vm in vms}
    for point in choose_drills(by_vm, policy.drill_points):
        key = f"drill:{policy.name}:{slot.isoformat()}:{point.id}"
        try:
            drill(control, point.id, Asked(by=f"policy {policy.name}", reason="drill", idempotency_key=key))
        except HdcsError as error:
            with control.transaction() as tx:
                tx.event("backup.not_proven", point.id, f"backup {point.id}: no drill: {error.message}")
