"""Alarms on a real record and Redis, with notices to a real web hook and a real SMTP server."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import time_machine

from hdcs_tasks.config import AlarmSettings
from hdcs_tasks.errors import Invalid, NotFound, WrongState
from hdcs_tasks.monitor import alarm_rules, control_alarms, control_notices, control_signals
from hdcs_tasks.monitor.alarm_rules import Signal
from hdcs_tasks.operations.control import Control
from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.states import BackupState, OperationState
from hdcs_tasks.store.models import Backup, BackupPolicy, Operation, now
from hdcs_tasks.store.transitions import move
from tests.contract.test_samples import HOST, pool, running, sample_of  # noqa: F401 - pool is a fixture
from tests.contract.test_tidy import join_request, stopped_vm

pytestmark = pytest.mark.contract


@contextmanager
def web_hook(status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A real HTTP server: its apprise URL, and what was posted to it. ``status`` of its answers."""
    posted: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answers.pop(0) if answers else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    answers = [status] if status != 200 else []
    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"json://user:sesame@127.0.0.1:{server.server_port}/hook", posted
        server.shutdown()


@contextmanager
def mail_server() -> Iterator[tuple[str, list[str]]]:
    """A real SMTP server that takes every letter: its apprise URL, and the letters."""
    letters: list[str] = []

    class Smtp(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 ready\r\n")
            for line in iter(self.rfile.readline, b""):
                word = line[:4].upper().strip()
                if word == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    letters.append(b"".join(iter(self.rfile.readline, b".\r\n")).decode())
                self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
                if word == b"QUIT":
                    return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Smtp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        yield f"mailto://127.0.0.1:{port}?from=hdcs@example.org&to=ops@example.org&mode=insecure", letters
        server.shutdown()


def tell(control: Control, tmp_path: Path, *urls: str) -> None:
    file = tmp_path / "alarm-urls"
    file.write_text("# whom alarms reach\n" + "\n".join(urls) + "\n")
    control.settings.alarm = AlarmSettings(urls_file=file, for_s=60, clear_for_s=60)


def cpu(control: Control, value: float | None) -> None:
    control_alarms.settle(control, ["node_cpu"], [Signal("node_cpu", "node1", value, f"CPU {value} %")])


def live(control: Control) -> list[tuple[str, str, str]]:
    return [(a["kind"], a["subject"], a["state"]) for a in control_alarms.list_alarms(control)]


def test_a_flapping_signal_raises_once_and_clears_once_and_both_are_told_once(control: Control, tmp_path: Path) -> None:
    with (
        web_hook() as (hook, posted),
        mail_server() as (mail, letters),
        time_machine.travel(now(), tick=False) as clock,
    ):
        tell(control, tmp_path, hook, mail)
        for value in [95.0] * 8 + [50.0, 95.0, 88.0, 70.0] * 10 + [20.0] * 10:
            cpu(control, value)
            clock.shift(timedelta(seconds=10))
            control_notices.notice_sweep(control)
        assert live(control) == []
        (alarm,) = control_alarms.history(control)
        assert (alarm["state"], alarm["raised_at"] < alarm["cleared_at"]) == ("cleared", True)
    assert [post["title"] for post in posted] == ["HDCS warning: node_cpu node1", "HDCS cleared: node_cpu node1"]
    assert "CPU 95.0 %" in posted[0]["message"] and "hdcs vm migrate" in posted[0]["message"]
    assert len(letters) == 2 and "Subject: HDCS warning: node_cpu node1" in letters[0]
    notices = control_alarms.show(control, alarm["id"])["notices"]
    assert [(n["what"], n["attempts"], bool(n["sent_at"])) for n in notices] == [
        ("raised", 1, True), ("raised", 1, True), ("cleared", 1, True), ("cleared", 1, True),
    ]  # fmt: skip


def test_a_target_that_fails_is_tried_again_and_its_url_is_never_told(
    control: Control, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with web_hook(status=500) as (hook, posted), time_machine.travel(now(), tick=False) as clock:
        tell(control, tmp_path, hook, "json://user:sesame@127.0.0.1:1/nobody")
        control_alarms.settle(control, ["node_lost"], [Signal("node_lost", "node1", 1.0, "lost")])
        assert control_notices.notice_sweep(control) == {"sent": 0, "failed": 2, "given up": 0}
        assert control_notices.notice_sweep(control) == {"sent": 0, "failed": 0, "given up": 0}, "not at once"
        clock.shift(timedelta(seconds=11))
        assert control_notices.notice_sweep(control) == {"sent": 1, "failed": 1, "given up": 0}
        assert len(posted) == 2
        (alarm,) = control_alarms.list_alarms(control)
        notices = control_alarms.show(control, alarm["id"])["notices"]
        assert sorted(bool(n["sent_at"]) for n in notices) == [False, True]
        tell(control, tmp_path, hook)
        clock.shift(timedelta(hours=1))
        assert control_notices.notice_sweep(control) == {"sent": 0, "failed": 0, "given up": 1}, "out of the file"
    out = capfd.readouterr()
    assert "sesame" not in out.out + out.err + json.dumps(control_alarms.show(control, alarm["id"]))


def test_a_test_notice_says_of_each_target_whether_it_took_it(control: Control, tmp_path: Path) -> None:
    with web_hook() as (hook, posted):
        tell(control, tmp_path, hook, "json://127.0.0.1:1/nobody", "nonsense")
        found = control_notices.try_targets(control, "me")
    assert [row["ok"] for row in found] == [True, False, False] and len(posted) == 1
    control.settings.alarm = AlarmSettings()
    with pytest.raises(Invalid, match="sent to nobody"):
        control_notices.try_targets(control, "me")


def test_an_acknowledged_alarm_is_cleared_by_itself(control: Control) -> None:
    with time_machine.travel(now(), tick=False) as clock:
        for value in (95.0,) * 2:
            cpu(control, value)
            clock.shift(timedelta(minutes=3))
        (alarm,) = control_alarms.list_alarms(control)
        shown = control_alarms.acknowledge(control, alarm["id"][:8], "ops", "on it")
        assert (shown["state"], shown["acknowledged_by"], shown["note"]) == ("acknowledged", "ops", "on it")
        cpu(control, 95.0)
        assert live(control) == [("node_cpu", "node1", "acknowledged")], "not raised again"
        for _ in range(2):
            cpu(control, 5.0)
            clock.shift(timedelta(minutes=3))
        assert live(control) == []
    with pytest.raises(WrongState):
        control_alarms.acknowledge(control, alarm["id"], "ops")
    with pytest.raises(NotFound):
        control_alarms.acknowledge(control, "nothing", "ops")


def test_a_lost_server_node_raises_an_alarm_until_it_is_back(pool: Control) -> None:  # noqa: F811
    pool.settings.alarm = AlarmSettings(for_s=0, clear_for_s=0)
    pool.reservations.samples.write(sample_of("node1", now().timestamp()) | {"host": HOST}, kept=2, ttl_s=60)
    control_alarms.alarm_sweep(pool)
    assert live(pool) == []
    pool.reservations.leases.drop("node", "node1", "instance-node1")
    assert pool_control.lease_sweep(pool) == ["node1"]
    for _ in range(3):
        control_alarms.alarm_sweep(pool)
    assert live(pool) == [("node_lost", "node1", "raised")]
    pool_control.join(pool, join_request())
    control_alarms.alarm_sweep(pool)
    assert live(pool) == []


def test_what_is_measured_of_a_data_center(pool: Control) -> None:  # noqa: F811
    running(pool)
    busy = {"cpu_percent": 99.0, "memory_total_mib": 1000, "memory_available_mib": 10, "clock_skew_s": -7.5}
    pool.reservations.samples.write(sample_of("node1", now().timestamp()) | {"host": busy}, kept=2, ttl_s=60)
    found = {(s.kind, s.subject): s for gather in control_signals.GATHERERS.values() for s in gather(pool)}
    assert found["node_cpu", "node1"].value == 99.0
    assert found["node_memory", "node1"].value == 99.0
    assert found["clock_skew", "node1"].value == 7.5
    assert found["pool_storage", "east"].value == 0.0
    assert found["queue_backlog", "control"].value == 0.0
    assert 0 < (found["pool_capacity", "east"].value or 0) < 100
    assert found["pool_n_plus_one", "east"].value == 0.0
    assert (found["node_ips", "node1"].value or 0) > 0
    pool.celery.send_task("nobody.reads", queue="control")
    (backlog,) = [s for s in control_signals.queues(pool) if s.subject == "control"]
    assert backlog.value == 1.0
    stale = now() + timedelta(hours=1)
    with time_machine.travel(stale, tick=False):
        found = {(s.kind, s.subject): s for s in control_signals.node_load(pool)}
        assert found["node_cpu", "node1"].value is None, "an old sample says nothing"
        (silent,) = [s for s in control_signals.node_states(pool) if s.kind == "node_silent"]
        assert silent.value == 1.0


def test_backups_that_failed_are_late_or_were_never_proven(pool: Control) -> None:  # noqa: F811
    vm_id = stopped_vm(pool)
    long_ago = now() - timedelta(days=40)
    with pool.transaction() as tx:
        facts = {"vm_id": vm_id, "vm_name": "desk-1", "domain_node": "east", "chain": "c", "kind": "full"}
        tx.session.add(Backup(**facts, seq=1, state=BackupState.READY, created_at=long_ago))
        newest = Backup(**facts, seq=2, state=BackupState.CREATING, created_at=now())
        tx.session.add(newest)
        tx.session.flush()
        move(newest, BackupState.FAILED)
        tx.session.add(BackupPolicy(
            name="nightly", selector={}, schedule="hourly", full_every=7, keep={}, concurrency=1,
            pending=["x"], slot_at=now() - timedelta(hours=30),
        ))  # fmt: skip
    (failed,) = [s for s in control_signals.backups(pool) if s.kind == "backup_failed"]
    assert (failed.subject, failed.value) == ("desk-1", 1.0)
    (overdue,) = [s for s in control_signals.backups(pool) if s.kind == "backup_overdue"]
    assert 0 <= (overdue.value or 0) <= 3600
    (unproven,) = control_signals.unproven(pool)
    assert (unproven.subject, unproven.message.split()[0]) == ("east", "1")


def test_an_operation_that_needs_an_operator_is_told_until_somebody_saw_it(pool: Control) -> None:  # noqa: F811
    vm_id = stopped_vm(pool)
    with pool.transaction() as tx:
        tx.session.add(Operation(
            kind="vm.start", state=OperationState.FAILED, subject="desk-1", vm_id=vm_id, request={},
            needs_operator=True, ended_at=now(), error={"message": "nobody knows"},
        ))  # fmt: skip
    control_alarms.alarm_sweep(pool)
    (alarm,) = [a for a in control_alarms.list_alarms(pool) if a["kind"] == "operation_stuck"]
    assert "vm.start of desk-1 needs an operator: nobody knows" in alarm["message"]
    control_alarms.acknowledge(pool, alarm["id"], "ops")
    control_alarms.alarm_sweep(pool)
    assert [a for a in control_alarms.list_alarms(pool) if a["kind"] == "operation_stuck"] == []


def test_one_thing_that_cannot_be_measured_hides_no_other(control: Control) -> None:
    def broken(_: Control) -> list[Signal]:
        raise ValueError("no")

    lost = {("node_cpu",): broken, ("node_lost",): lambda _: [Signal("node_lost", "node9", 1.0, "lost")]}
    control_alarms.alarm_sweep(control, lost)
    assert live(control) == [("node_lost", "node9", "raised")]


def test_a_late_sweep_raises_an_alarm(control: Control) -> None:
    control.reservations.samples.swept("recovery", now().timestamp() - 300, 0.1, 5.0)
    control_alarms.alarm_sweep(control)
    assert live(control) == [("sweep_late", "recovery", "raised")]


def test_ports_nearly_used_up_raise_an_alarm_and_every_kind_is_measured(pool: Control) -> None:  # noqa: F811
    rules = alarm_rules.rules(pool.settings.alarm)
    measured = [kind for kinds in control_signals.GATHERERS for kind in kinds]
    assert sorted(measured) == sorted(rules), "a rule nobody measures never raises, a kind without a rule cannot"
    pool.settings.alarm = AlarmSettings(for_s=0, clear_for_s=0)
    pool.reservations.ports.set_range("east", 20000, 20000)
    running(pool)
    control_alarms.alarm_sweep(pool)
    assert ("pool_ports", "east", "raised") in live(pool)
    pool.reservations.ports.set_range("east", 20000, 20999)
    control_alarms.alarm_sweep(pool)
    assert "pool_ports" not in {kind for kind, _, _ in live(pool)}


def test_a_target_that_never_answers_holds_up_no_sweep(control: Control, tmp_path: Path) -> None:
    """It takes connections and says nothing: alarms are judged all the while, without a word to it."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        tell(control, tmp_path, f"json://127.0.0.1:{mute.getsockname()[1]}/")
        control_alarms.settle(control, ["node_lost"], [Signal("node_lost", "node1", 1.0, "lost")])
        counts: list[dict[str, int]] = []
        telling = threading.Thread(target=lambda: counts.append(control_notices.notice_sweep(control)))
        telling.start()
        mute.settimeout(60)
        taken, _ = mute.accept()  # the notice is in hand
        with taken:
            lost = {("node_lost",): lambda _: [Signal("node_lost", f"node{n}", 1.0, "lost") for n in (1, 2)]}
            control_alarms.alarm_sweep(control, lost)
            assert ("node_lost", "node2", "raised") in live(control)
            mute.setblocking(False)
            with pytest.raises(BlockingIOError):  # the sweep has not even called it
                mute.accept()
            telling.join(60)
    assert counts == [{"sent": 0, "failed": 1, "given up": 0}]
