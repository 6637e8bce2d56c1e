"""Scheduled storms: desktops that are to be ready at a time. A sweep begins what is due; beat runs the sweep.

A run claims its moment by moving ``slot_at`` on, so it happens once however many beats there are; moments missed while
nobody was there are caught up by one run. Then it opens its operations under idempotency keys made of that moment: a
process that died in between is made up for by the next sweep. Until its desktops are ready (or ``WATCHED_S`` after the
time) the sweep notes which was ready when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Conflict, HdcsError, Invalid, NoCapacity
from hdcs_tasks.image.control import get_image
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.pool.control import get_domain_node
from hdcs_tasks.pool.profiles import get_profile
from hdcs_tasks.routing import check_name
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import Operation, Storm, Vm, now
from hdcs_tasks.store.naming import named
from hdcs_tasks.vm import control_clone
from hdcs_tasks.vm.control import start_many
from hdcs_tasks.vm.control_list import list_vms
from hdcs_tasks.vm.control_ready import boots_s, ready_by
from hdcs_tasks.vm.control_select import check_selector
from hdcs_tasks.vm.rules import expand_names
from hdcs_tasks.vm.storm_rules import UNBOUNDED_STARTS, Pace, lead_s
from hdcs_tasks.when import check_when, last_due, next_due

log = logger(__name__)

SELECTOR = frozenset({"names", "tag", "owner", "home", "profile"})
CLONE = frozenset({"image", "profile", "count", "name", "domain_node", "owner", "tag"})
RUNS_KEPT = 10
WATCHED_S = 3600.0


# --- the record


def create(
    control: Control, name: str, *, schedule: str, selector: Mapping[str, Any] | None = None,
    clone: Mapping[str, Any] | None = None, lead_s: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Record a storm: its desktops are to be ready at each moment of ``schedule`` (words of ``when``, UTC) from now on.

    ``selector``: VMs that are (names, tag, owner, home, profile; all must match); or ``clone``: image, profile, count,
    name (a pattern), and domain_node, owner, tag: those of an earlier run are started again, missing ones are cloned.
    ``lead_s``: begin so long before; None: as measured. Raises Invalid, NotFound, Conflict (the name is taken).
    """
    check_name("storm", name)
    check_when(schedule)
    if bool(selector) == bool(clone):
        raise Invalid("a storm needs either VMs to start or an image to clone them from",
                      next="As in --tag class-a, or --image mini --count 60 --name 'a-{:02d}'")  # fmt: skip
    if lead_s is not None and not 0 <= lead_s <= 86_400:
        raise Invalid(f"a lead of {lead_s} s is not between 0 and a day")
    if unknown := sorted(set(selector or {}) - SELECTOR):
        raise Invalid(f"VMs are not selected by {unknown[0]!r}", next=f"Known: {', '.join(sorted(SELECTOR))}")
    with control.transaction() as tx:
        if tx.session.get(Storm, name) is not None:
            raise Conflict(f"there is a storm {name} already", next="See: hdcs storm list")
        wanted = _checked_clone(tx.session, clone) if clone else {}
        check_selector(tx.session, selector or {})
        # Due moments count from now on, also those whose lead has begun.
        storm = Storm(name=name, schedule=schedule, selector=dict(selector or {}), clone=wanted, lead_s=lead_s,
                      slot_at=now(), runs=[])  # fmt: skip
        tx.session.add(storm)
        tx.session.flush()
    return show(control, name)


def _checked_clone(session: Session, clone: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {key: value for key, value in clone.items() if value not in (None, "")}
    if unknown := sorted(set(wanted) - CLONE):
        raise Invalid(f"a storm does not clone with {unknown[0]!r}", next=f"Known: {', '.join(sorted(CLONE))}")
    if missing := [key for key in ("image", "count", "name") if key not in wanted]:
        raise Invalid(f"a storm that clones needs {', '.join(missing)}", next="As in --image mini --count 60 --name …")
    expand_names(wanted["name"], wanted["count"], ())
    get_image(session, wanted["image"])
    get_profile(session, wanted.setdefault("profile", "small"))
    if "domain_node" in wanted:
        get_domain_node(session, wanted["domain_node"])
    return wanted


def _get(session: Session, name: str) -> Storm:
    return named(session, Storm, name, "storm", "hdcs storm list")


def delete(control: Control, name: str) -> None:
    """Delete a storm; its desktops stay."""
    with control.transaction() as tx:
        tx.session.delete(_get(tx.session, name))


def enable(control: Control, name: str, enabled: bool) -> dict[str, Any]:
    """Switch a storm on or off; moments it slept through are caught up by one run."""
    with control.transaction() as tx:
        _get(tx.session, name).enabled = enabled
    return show(control, name)


def list_storms(control: Control) -> list[dict[str, Any]]:
    with control.store.read() as session:
        storms = list(session.scalars(select(Storm).order_by(Storm.name)))
    return [_view(control, storm) for storm in storms]


def show(control: Control, name: str) -> dict[str, Any]:
    with control.store.read() as session:
        storm = _get(session, name)
    return _view(control, storm)


def _view(control: Control, storm: Storm) -> dict[str, Any]:
    """``next_at``: the time; ``begins_at``: when its run begins; ``runs``: the newest first, each ``{slot_at, began_at,
    lead_s, wanted, ready, in_time, last_ready_at, ready_at: {VM: moment}, started, took_s, operations, refused,
    closed}``; ``started``: desktops that its own starts made ready, the last of them ``took_s`` after it began."""
    count = _count(control, storm)
    lead = _lead_s(control, storm, count)
    next_at = next_due(storm.schedule, max(now(), storm.slot_at))
    return {
        "name": storm.name, "enabled": storm.enabled, "schedule": storm.schedule,
        "selector": storm.selector, "clone": storm.clone, "desktops": count,
        "lead_s": lead, "lead_by": "operator" if storm.lead_s is not None else "measured",
        "next_at": next_at.isoformat(), "begins_at": (next_at - timedelta(seconds=lead)).isoformat(),
        "runs": storm.runs, "created_at": storm.created_at.isoformat(),
    }  # fmt: skip


# --- when to begin


def _count(control: Control, storm: Storm) -> int:
    return int(storm.clone["count"]) if storm.clone else len(list_vms(control, with_warm=False, **storm.selector))


def _lead_s(control: Control, storm: Storm, count: int) -> float:
    return storm.lead_s if storm.lead_s is not None else lead_s(count, _pace(control, storm))


def _pace(control: Control, storm: Storm) -> Pace:
    home = storm.clone.get("domain_node") or storm.selector.get("home")
    with control.store.read() as session:
        boots = boots_s(session, home)
    homes = [home] if home else control.reservations.pool.domain_nodes()
    nodes = [node for name in homes for node in control.reservations.pool.nodes(name) if node.schedulable]
    at_once = sum(node.max_starts or UNBOUNDED_STARTS for node in nodes)
    for run in storm.runs:
        if run["closed"] and run["started"]:
            return Pace(boots, at_once, run["started"], run["took_s"])
    return Pace(boots, at_once)


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


# --- runs


def storm_sweep(control: Control) -> int:
    """Begin the runs that are due, finish what a run left open, and note who is ready; returns how many began."""
    with control.store.read() as session:
        storms = list(session.scalars(select(Storm)))
    began = 0
    for storm in storms:
        try:
            began += storm.enabled and _begin_if_due(control, storm)
            _look(control, storm.name)
        except HdcsError as error:
            log.warning("storm not looked after this time", storm=storm.name, error=str(error))
    return began


def _begin_if_due(control: Control, storm: Storm) -> bool:
    lead = _lead_s(control, storm, _count(control, storm))
    slot = last_due(storm.schedule, now() + timedelta(seconds=lead))
    return slot > storm.slot_at and begin(control, storm.name, slot, lead)


def run(control: Control, name: str) -> dict[str, Any]:
    """Run a storm now, besides its schedule: its desktops are wanted at once."""
    show(control, name)
    begin(control, name, now(), 0.0, by_hand=True)
    return show(control, name)


def begin(control: Control, name: str, slot: datetime, lead: float, *, by_hand: bool = False) -> bool:
    """Claim the moment ``slot`` and start its desktops; False if somebody else has claimed it.

    A run by hand takes no moment of the schedule away.
    """
    with control.transaction() as tx:
        if not by_hand:
            claim = update(Storm).where(Storm.name == name, Storm.slot_at < slot).values(slot_at=slot)
            if getattr(tx.session.execute(claim), "rowcount", 0) != 1:
                return False
        storm = tx.session.get_one(Storm, name, populate_existing=True, with_for_update=True)
        fresh = {
            "slot_at": slot.isoformat(), "began_at": now().isoformat(), "lead_s": lead, "opened": False, "wanted": 0,
            "started": 0, "took_s": 0.0, "ready": 0, "in_time": 0, "last_ready_at": None, "ready_at": {}, "vms": {},
            "operations": [], "refused": "", "closed": False,
        }  # fmt: skip
        storm.runs = [fresh, *storm.runs][:RUNS_KEPT]
        tx.event(
            "storm.began", name, f"storm {name} begins: its desktops are wanted at {fresh['slot_at']}", lead_s=lead
        )
    _look(control, name)
    return True


def _look(control: Control, name: str) -> None:
    """Open what a run has not opened yet, and note which of its desktops are ready."""
    with control.store.read() as session:
        storm = session.get(Storm, name)
    if storm is None or all(run["closed"] for run in storm.runs):
        return
    changed = {run["began_at"]: _looked_at(control, storm, run) for run in storm.runs if not run["closed"]}
    with control.transaction() as tx:
        row = tx.session.get(Storm, name, with_for_update=True, populate_existing=True)
        if row is None:
            return
        for run in row.runs:
            late = changed.get(run["began_at"])
            if late is not None and late["closed"] and not run["closed"]:
                _tell(tx, name, late)
        row.runs = [changed.get(run["began_at"], run) for run in row.runs]


def _tell(tx: Any, name: str, run: dict[str, Any]) -> None:
    words = f"storm {name}: {run['in_time']} of {run['wanted']} desktops were ready at {run['slot_at']}"
    if run["ready"] < run["wanted"]:
        words += f", {run['wanted'] - run['ready']} still are not. See: hdcs storm show {name}"
    kind = "storm.ready" if run["ready"] == run["wanted"] else "storm.short"
    tx.event(kind, name, words, **{key: run[key] for key in ("wanted", "ready", "in_time", "refused")})


def _looked_at(control: Control, storm: Storm, run: dict[str, Any]) -> dict[str, Any]:
    run = dict(run)
    if not run["opened"]:
        _open(control, storm, run)
    with control.store.read() as session:
        rows = session.scalars(select(Vm).where(Vm.id.in_(run["vms"]))).all()
        started = ready_by(session, run["operations"])
    moments = {vm.name: started.get(vm.id, vm.ready_at) for vm in rows if vm.deleted_at is None}
    seen = {name: at.isoformat() for name, at in moments.items() if at}
    # Once ready it counts, also if its owner stops it before the last one is.
    run["ready_at"] = seen | run["ready_at"]
    run["ready"] = len(run["ready_at"])
    slot = _moment(run["slot_at"])
    run["in_time"] = sum(_moment(at) <= slot for at in run["ready_at"].values())
    run["last_ready_at"] = max(run["ready_at"].values(), default=None)
    run["started"] = len(started)
    run["took_s"] = (max(started.values()) - _moment(run["began_at"])).total_seconds() if started else 0.0
    over = now() > max(slot, _moment(run["began_at"])) + timedelta(seconds=WATCHED_S)
    run["closed"] = run["opened"] and (run["ready"] >= run["wanted"] or over)
    return run


def _open(control: Control, storm: Storm, run: dict[str, Any]) -> None:
    """Open the run's operations; asked again after a crash, the same keys are answered with the same operations."""
    key = f"storm:{storm.name}:{run['began_at']}"
    asked = Asked(by=f"storm {storm.name}", reason=f"ready at {run['slot_at']}", idempotency_key=key, key_says_all=True)
    vms = list_vms(control, tag=_tag(storm)) if storm.clone else list_vms(control, with_warm=False, **storm.selector)
    operations: list[Operation] = []
    resting = [vm["id"] for vm in vms if vm["state"] in (VmState.STOPPED, VmState.SAVED)]
    if resting:
        operations.append(start_many(control, resting, asked))
    missing = int(storm.clone["count"]) - len(vms) if storm.clone else 0
    if missing > 0:
        operations += _clone(control, storm, run, missing, asked)
        vms = list_vms(control, tag=_tag(storm))
    run["operations"] = [operation.id for operation in operations]
    run["vms"] = [vm["id"] for vm in vms]
    run["wanted"] = int(storm.clone["count"]) if storm.clone else len(vms)
    run["opened"] = True


def _tag(storm: Storm) -> str:
    """What a storm's own clones are found by again."""
    return f"storm:{storm.name}"


def _clone(control: Control, storm: Storm, run: dict[str, Any], missing: int, asked: Asked) -> Sequence[Operation]:
    wanted = storm.clone
    tags = tuple(filter(None, (_tag(storm), wanted.get("tag"))))
    request = control_clone.CloneRequest(
        wanted["image"], wanted["name"], missing, wanted["profile"], wanted.get("domain_node"), True,
        wanted.get("owner", ""), tags,
    )  # fmt: skip
    asked = replace(asked, idempotency_key=f"{asked.idempotency_key}:clone")
    try:
        return [control_clone.clone(control, request, asked)]
    except NoCapacity as error:
        # As many as fit, rather than none: who comes late finds the others ready.
        run["refused"] = error.message
        fit = int(error.details.get("fit", 0))
        if not fit:
            return []
        smaller = control_clone.CloneRequest(**(vars(request) | {"count": fit}))
        return [control_clone.clone(control, smaller, asked)]
    except HdcsError as error:
        run["refused"] = error.message
        return []
