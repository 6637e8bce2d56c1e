"""Alarms on the control plane: signals become alarms, raised once, acknowledged, cleared; and their history."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import HdcsError, NotFound, WrongState
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor import alarm_rules
from hdcs_tasks.monitor.alarm_rules import Known, Rule, Signal, Verdict, judge
from hdcs_tasks.monitor.control_notices import add_notices
from hdcs_tasks.monitor.control_signals import GATHERERS
from hdcs_tasks.operations.control import Control, Tx
from hdcs_tasks.states import AlarmState
from hdcs_tasks.store.models import now
from hdcs_tasks.store.models_watch import Alarm, Notice
from hdcs_tasks.store.transitions import move

log = logger(__name__)

Gather = Callable[[Control], Iterable[Signal]]


def alarm_sweep(control: Control, gatherers: dict[tuple[str, ...], Gather] | None = None) -> dict[str, int]:
    """Measure everything and settle every alarm; how many of each verdict. What cannot be measured stays as it is."""
    counts = {verdict.value: 0 for verdict in Verdict}
    for kinds, gather in (GATHERERS if gatherers is None else gatherers).items():
        try:
            signals = list(gather(control))
            for verdict in settle(control, kinds, signals):
                counts[verdict.value] += 1
        except HdcsError as error:
            log.warning("not measured this time", kinds=", ".join(kinds), error=str(error))
        except Exception:  # one thing that cannot be measured must not hide the others
            log.exception("not measured", kinds=", ".join(kinds))
    return counts


def settle(control: Control, kinds: Iterable[str], signals: list[Signal]) -> list[Verdict]:
    """Bring the alarms of these kinds to what was measured. A subject that is not among the signals is well."""
    rules = alarm_rules.rules(control.settings.alarm)
    verdicts = []
    with control.transaction() as tx:
        live = select(Alarm).where(Alarm.live_key.is_not(None), Alarm.kind.in_(tuple(kinds)))
        known = {(alarm.kind, alarm.subject): alarm for alarm in tx.session.scalars(live.with_for_update())}
        measured = {(signal.kind, signal.subject): signal for signal in signals}
        for key in sorted(measured.keys() | known.keys()):
            signal = measured.get(key) or Signal(*key, 0.0, "")
            verdicts.append(_settle_one(tx, signal, known.get(key), rules[key[0]]))
    return verdicts


def _settle_one(tx: Tx, signal: Signal, alarm: Alarm | None, rule: Rule) -> Verdict:
    at = now()
    verdict = judge(signal, _known(alarm, at), rule)
    if verdict is Verdict.NOTHING:
        return verdict
    if alarm is None:
        alarm = Alarm(
            kind=signal.kind, subject=signal.subject, severity=rule.severity, state=AlarmState.PENDING,
            live_key=f"{signal.kind}:{signal.subject}"[:300], message=signal.message, next=rule.next,
            value=signal.value, since_at=at, seen_at=at,
        )  # fmt: skip
        tx.session.add(alarm)
        tx.session.flush()
    if verdict is Verdict.FORGET:
        tx.session.delete(alarm)
    elif verdict is Verdict.EASES:
        alarm.ok_since = alarm.ok_since or at
    elif verdict is Verdict.CLEAR:
        _clear(tx, alarm)
    else:
        alarm.seen_at, alarm.ok_since = at, None
        alarm.value, alarm.message = signal.value, signal.message or alarm.message
        if verdict is Verdict.RAISE:
            alarm.raised_at = at
            move(alarm, AlarmState.RAISED)
            tx.event("alarm.raised", alarm.subject, alarm.message, alarm=alarm.kind, severity=alarm.severity)
            add_notices(tx, alarm, "raised")
    return verdict


def _known(alarm: Alarm | None, at: datetime) -> Known | None:
    if alarm is None:
        return None
    ok_s = (at - alarm.ok_since).total_seconds() if alarm.ok_since is not None else None
    return Known(alarm.state.value, (at - alarm.since_at).total_seconds(), ok_s)


def _clear(tx: Tx, alarm: Alarm) -> None:
    move(alarm, AlarmState.CLEARED)
    alarm.cleared_at, alarm.live_key = now(), None
    tx.event("alarm.cleared", alarm.subject, f"cleared: {alarm.message}", alarm=alarm.kind, severity=alarm.severity)
    add_notices(tx, alarm, "cleared")


# --- operators


def acknowledge(control: Control, alarm_id: str, by: str, note: str = "") -> dict[str, Any]:
    """Say that somebody looks after it. An alarm about something that happened once ends with that."""
    with control.transaction() as tx:
        alarm = get_alarm(tx.session, alarm_id)
        if alarm.state is AlarmState.ACKNOWLEDGED:
            return view(alarm)
        if alarm.state is not AlarmState.RAISED:
            raise WrongState(f"alarm {alarm.id} is {alarm.state}", next="Only a raised one is acknowledged")
        move(alarm, AlarmState.ACKNOWLEDGED)
        alarm.acknowledged_at, alarm.acknowledged_by, alarm.note = now(), by, note
        tx.event("alarm.acknowledged", alarm.subject, f"{by} looks after it: {alarm.message}", alarm=alarm.kind)
        if alarm_rules.rules(control.settings.alarm)[alarm.kind].ends_when_seen:
            _clear(tx, alarm)
        return view(alarm)


def get_alarm(session: Session, alarm_id: str) -> Alarm:
    """The alarm of this id (or unique prefix of at least 6 characters); else NotFound."""
    found = session.get(Alarm, alarm_id)
    if found is None and len(alarm_id) >= 6:
        matches = session.scalars(select(Alarm).where(Alarm.id.startswith(alarm_id, autoescape=True)).limit(2)).all()
        found = matches[0] if len(matches) == 1 else None
    if found is None or found.state is AlarmState.PENDING:
        raise NotFound(f"there is no alarm {alarm_id!r}", next="See: hdcs alarm list, hdcs alarm history")
    return found


def list_alarms(control: Control) -> list[dict[str, Any]]:
    """Every alarm that is raised or acknowledged; the worst and newest first."""
    with control.store.read() as session:
        states = (AlarmState.RAISED, AlarmState.ACKNOWLEDGED)
        rows = session.scalars(select(Alarm).where(Alarm.state.in_(states)).order_by(Alarm.raised_at.desc())).all()
    return sorted(map(view, rows), key=lambda shown: shown["severity"] != alarm_rules.CRITICAL)


def history(control: Control, limit: int = 50) -> list[dict[str, Any]]:
    """Alarms of all times but pending ones, that which changed last first."""
    with control.store.read() as session:
        query = select(Alarm).where(Alarm.state != AlarmState.PENDING).order_by(Alarm.state_at.desc()).limit(limit)
        return [view(alarm) for alarm in session.scalars(query)]


def show(control: Control, alarm_id: str) -> dict[str, Any]:
    """One alarm with its notices: what went out, how often it was tried, and what came in the way."""
    with control.store.read() as session:
        alarm = get_alarm(session, alarm_id)
        rows = session.scalars(select(Notice).where(Notice.alarm_id == alarm.id).order_by(Notice.id)).all()
        notices = [
            {"what": n.what, "target": n.target, "attempts": n.attempts, "sent_at": _iso(n.sent_at),
             "given_up_at": _iso(n.given_up_at), "error": n.error}
            for n in rows
        ]  # fmt: skip
        return view(alarm) | {"notices": notices}


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at else None


def view(alarm: Alarm) -> dict[str, Any]:
    keys = ("id", "kind", "subject", "severity")
    return {key: getattr(alarm, key) for key in keys} | {
        "state": alarm.state.value, "message": alarm.message, "next": alarm.next, "value": alarm.value,
        "raised_at": _iso(alarm.raised_at), "acknowledged_at": _iso(alarm.acknowledged_at),
        "acknowledged_by": alarm.acknowledged_by, "note": alarm.note, "cleared_at": _iso(alarm.cleared_at),
        "seen_at": _iso(alarm.seen_at),
    }  # fmt: skip
