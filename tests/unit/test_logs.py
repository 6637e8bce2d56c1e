"""Logs: what a line holds, where JSON is written, and what is never written."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from hdcs_tasks import logs
from hdcs_tasks.app import describe
from hdcs_tasks.config import Settings

SECRET = "s3cr3t-w0rd"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Configured as on a server node, into memory; a function that gives the lines as objects."""
    root, config = logging.getLogger(), structlog.get_config()
    before = (root.handlers[:], root.level)
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    logs.configure_logging(Settings(log_format="json", server_node="node1"))
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    root.handlers[:], root.level = before
    structlog.configure(**config)


def test_a_line_inside_a_task_tells_what_it_is_about(lines: Any) -> None:
    spec = {"shown": {"vm": "desk-001", "node": "node1"}}
    kwargs = {"operation": "op-1", "step": "step-1", "attempt": 2, "spec": spec}
    with logs.bound_contextvars(**logs.context_of("vm.stop_on_node", "step-1.2", kwargs)):
        logs.logger("hdcs").info("stopping", took_s=1.5)
        logging.getLogger("library").warning("%s is slow", "something")
    logs.logger("hdcs").info("after")
    first, second, third = lines()
    about = {
        "task": "vm.stop_on_node", "task_id": "step-1.2", "operation": "op-1", "step": "step-1", "attempt": 2,
        "vm": "desk-001", "server_node": "node1",
    }  # fmt: skip
    assert {key: first[key] for key in about} == about and (first["event"], first["took_s"]) == ("stopping", 1.5)
    assert {key: second[key] for key in about} == about and second["event"] == "something is slow"
    assert third["server_node"] == "node1" and "operation" not in third
    assert {"timestamp", "level", "logger"} <= set(third)


def test_celerys_own_lines_tell_it_too(lines: Any) -> None:
    """ "received" and "succeeded" are written outside the task: by the description its message carries."""
    kwargs = {"operation": "1a2b3c4d-rest", "step": "s", "attempt": 1, "spec": {"shown": {"vm": "desk-001"}}}
    aside = {"id": "s.1", "name": "vm.stop_on_node", "args": "", "kwargs": describe(kwargs)}
    logging.getLogger("celery.worker.strategy").warning("Task %(name)s[%(id)s] received", aside, extra={"data": aside})
    (line,) = lines()
    about = {"task": "vm.stop_on_node", "task_id": "s.1", "operation": "1a2b3c4d-rest", "vm": "desk-001"}
    assert {key: line.get(key) for key in about} == about and line["server_node"] == "node1"


def test_the_context_of_messages_to_control() -> None:
    report = {"step": "s", "attempt": 1, "node": "node2", "result": {"password": SECRET}}
    report |= {"operation": "1a2b3c4d-rest", "vm": "desk-001"}
    assert logs.context_of("operations.outcome", "t", {"report": report}) == {
        "task": "operations.outcome", "task_id": "t", "step": "s", "attempt": 1, "server_node": "node2",
        "operation": "1a2b3c4d-rest", "vm": "desk-001",
    }  # fmt: skip
    assert describe({"report": report}) == "vm=desk-001 node=node2 op=1a2b3c4d-rest"
    assert logs.context_of("vm.start", None, {"vm": "desk-001"}) == {"task": "vm.start", "vm": "desk-001"}
    assert logs.context_of("vm.start", "t", {"vm": ["a"], "spec": None}) == {"task": "vm.start", "task_id": "t"}


def test_secrets_are_replaced_wherever_they_stand(lines: Any) -> None:
    log = logs.logger("hdcs")
    log.info("keys", password=SECRET, join_token=SECRET, proof=SECRET, HDCS_FLOWER_AUTH=SECRET, ticket=SECRET)
    log.info(
        "inside", settings={"url": f"redis://:{SECRET}@127.0.0.1/0", "tokens": [SECRET]}, more=[{"secret": SECRET}]
    )
    log.info(f"cannot reach postgresql+psycopg://hdcs:{SECRET}@db/hdcs", error=f"password={SECRET}; retry")
    logging.getLogger("kombu").error("Connected to redis://user:%s@host:6379//", SECRET)
    try:
        raise RuntimeError(f"mailto://me:{SECRET}@example.org refused")
    except RuntimeError:
        log.exception("not sent")
        logging.getLogger("library").exception("not sent")
    written = lines()
    assert len(written) == 6
    assert all(SECRET not in json.dumps(line) for line in written)
    assert written[2]["event"] == "cannot reach postgresql+psycopg://hdcs:***@db/hdcs"
    assert written[1]["settings"]["url"] == "redis://:***@127.0.0.1/0"


def test_what_is_no_secret_stays(lines: Any) -> None:
    logs.logger("hdcs").info("see http://127.0.0.1:5555/ and a@b", url="spice://10.0.0.1:20000", token=None)
    (line,) = lines()
    assert line["event"].endswith("a@b") and line["url"] == "spice://10.0.0.1:20000" and line["token"] is None


def test_json_where_nobody_reads_along_and_under_systemd() -> None:
    program = "from hdcs_tasks.logs import as_json, to_journal; from hdcs_tasks.config import Settings; " \
        "print(as_json(Settings(log_format='auto')), to_journal())"  # fmt: skip

    def run(stderr: Any, **env: str) -> str:
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=stderr, check=True,
                              text=True, env=os.environ | env)  # fmt: skip
        return done.stdout.strip()

    with tempfile.TemporaryFile() as file:
        seen = os.fstat(file.fileno())
        assert run(file, JOURNAL_STREAM=f"{seen.st_dev}:{seen.st_ino}") == "True True"
        assert run(file, JOURNAL_STREAM="1:1") == "True False"
    leader, terminal = os.openpty()
    try:
        assert run(terminal, JOURNAL_STREAM="") == "False False"
    finally:
        os.close(leader)
        os.close(terminal)


def test_a_callers_own_program_is_not_written_to() -> None:
    program = "from hdcs_tasks.logs import logger; logger('x').info('chatter'); logger('x').warning('careful', a=1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "" and "chatter" not in done.stderr and "careful" in done.stderr
