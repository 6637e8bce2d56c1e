"""Telling people about alarms, by apprise: a sweep of its own sends what is due, with growing pauses until it went out.

The targets' URLs hold passwords. They stay in their file: the record knows a fingerprint, logs and errors neither.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select, update

from hdcs_tasks.errors import HdcsError, Invalid
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor.alarm_rules import notice_backoff_s
from hdcs_tasks.operations.control import Control, Tx
from hdcs_tasks.store.models import now
from hdcs_tasks.store.models_watch import Alarm, Notice

log = logger(__name__)

BATCH = 20
ATTEMPTS_MAX = 30
SENDING_S = 120.0
"""A notice in hand is nobody else's for so long."""


def targets(file: Path | None) -> dict[str, str]:
    """Fingerprint -> apprise URL, one per line of the file; ``#`` begins a comment. Invalid if it cannot be read."""
    if file is None:
        return {}
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except OSError as error:
        raise Invalid(
            f"the targets of alarms cannot be read: {error.strerror}: {file}", next="Set HDCS_ALARM_URLS_FILE"
        ) from None
    return {fingerprint(url): url for url in lines if url and not url.startswith("#")}


def fingerprint(url: str) -> str:
    """Its scheme and a short hash: enough to tell targets apart."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    return f"{url.partition('://')[0][:8]}-{digest[:7]}"


def add_notices(tx: Tx, alarm: Alarm, what: str) -> None:
    """One notice per target, to be sent by the sweep."""
    try:
        known = targets(tx.control.settings.alarm.urls_file)
    except HdcsError as error:
        log.error("an alarm reaches nobody", alarm=alarm.kind, subject=alarm.subject, error=str(error))
        return
    title = f"HDCS {alarm.severity if what == 'raised' else what}: {alarm.kind} {alarm.subject}"
    body = f"{alarm.message}\n{alarm.next if what == 'raised' else ''}".strip()
    for target in known:
        tx.session.add(
            Notice(alarm_id=alarm.id, what=what, target=target, title=title, body=body, attempts=0, not_before=now())
        )


def notice_sweep(control: Control) -> dict[str, int]:
    """Send what is due. Returns how many were sent, failed and given up."""
    counts = {"sent": 0, "failed": 0, "given up": 0}
    with control.store.read() as session:
        due = select(Notice.id).where(Notice.not_before <= now()).order_by(Notice.not_before).limit(BATCH)
        ids = list(session.scalars(due))
    if not ids:
        return counts
    known = targets(control.settings.alarm.urls_file)
    for notice_id in ids:
        if (notice := _take(control, notice_id)) is not None:
            counts[_send_one(control, notice, known.get(notice.target))] += 1
    return counts


def _take(control: Control, notice_id: int) -> Notice | None:
    """Take one in hand, unless another control worker did."""
    with control.transaction() as tx:
        claim = update(Notice).where(Notice.id == notice_id, Notice.not_before <= now()).values(
            not_before=now() + timedelta(seconds=SENDING_S), attempts=Notice.attempts + 1
        )  # fmt: skip
        if getattr(tx.session.execute(claim), "rowcount", 0) != 1:
            return None
        return tx.session.get_one(Notice, notice_id, populate_existing=True)


def _send_one(control: Control, taken: Notice, url: str | None) -> str:
    error = "its target is no longer in the file" if url is None else send(url, taken.title, taken.body)
    with control.transaction() as tx:
        notice = tx.session.get_one(Notice, taken.id)
        notice.error = error
        if not error:
            notice.sent_at, notice.not_before = now(), None
            return "sent"
        if url is None or notice.attempts >= ATTEMPTS_MAX:
            notice.given_up_at, notice.not_before = now(), None
            log.error("notice given up", target=notice.target, title=notice.title, error=error)
            return "given up"
        notice.not_before = now() + timedelta(seconds=notice_backoff_s(notice.attempts))
        log.warning("notice not sent", target=notice.target, attempts=notice.attempts, error=error)
        return "failed"


def send(url: str, title: str, body: str) -> str:
    """Send to one target now; what came in the way, or an empty text. Never says the URL."""
    import apprise  # it brings a hundred services along; most processes never send

    logging.getLogger("apprise").disabled = True  # its messages may hold what belongs to the target alone
    sender = apprise.Apprise()
    if not sender.add(url):
        return "its URL is none that apprise knows"
    try:
        sent = bool(sender.notify(title=title, body=body))
    except Exception as error:  # noqa: BLE001 - a target must never end the sweep; its text may hold the URL
        return f"failed: {type(error).__name__}"
    return "" if sent else "the target did not take it"


def try_targets(control: Control, by: str) -> list[dict[str, Any]]:
    """Send a test notice to every target, now: ``{target, ok, message}`` each."""
    known = targets(control.settings.alarm.urls_file)
    if not known:
        raise Invalid("alarms are sent to nobody", next="Put one apprise URL per line into HDCS_ALARM_URLS_FILE")
    found = []
    for target, url in known.items():
        error = send(url, "HDCS test", f"A test of alarms, asked for by {by}. All is well.")
        found.append({"target": target, "ok": not error, "message": error or "sent"})
    return found
