"""Flower with our tabs, in a real browser: a real Flower process, a real control and node worker, a real record."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from hdcs_tasks.operations.control import Asked
from hdcs_tasks.reservations import PoolNode
from hdcs_tasks.states import AlarmState, BackupState, VmState
from hdcs_tasks.store.models import Backup, DomainNode, Profile, ServerNode, Vm, now
from hdcs_tasks.store.models_watch import Alarm
from tests.browser import chromium, picture
from tests.contract.test_operations_workers import Center, center, eventually  # noqa: F401 - center is a fixture
from tests.contract.test_store import vm_row
from tests.services import Missing, free_port, require

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]
LOGIN = "admin:open-sesame"
EVIL = "<script>document.title='taken'</script>"
SLOW_S = 60.0


class Flower:
    """The process, and its pages in a browser that has logged in."""

    def __init__(self, port: int, browser: Chrome) -> None:
        self.port = port
        self.browser = browser

    def status(self, path: str, *, login: str = "", method: str = "GET") -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        if login:
            request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def open(self, path: str) -> None:
        self.browser.get(f"http://{LOGIN}@127.0.0.1:{self.port}{path}")
        self.wait(lambda: "Updated" in self.browser.find_element(By.ID, "hdcs-status").text, f"{path} has its data")

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def wait(self, look: Callable[[], bool], why: str) -> None:
        def fresh() -> bool:
            try:
                return look()
            except StaleElementReferenceException:
                return False  # the page drew itself anew meanwhile

        eventually(fresh, SLOW_S, why, every_s=0.2)

    def text(self, css: str = "main") -> str:
        return self.browser.find_element(By.CSS_SELECTOR, css).text

    def follow(self, link: str) -> None:
        """As a click would; the page may draw itself anew under a real one."""
        self.browser.get(self.browser.find_element(By.LINK_TEXT, link).get_attribute("href") or "")

    def bar(self, operation: str) -> str:
        found = self.browser.find_elements(By.CSS_SELECTOR, f"tr[id='{operation}'] .progress")
        return found[0].get_attribute("aria-valuenow") or "" if found else ""


@pytest.fixture
def flower(center: Center) -> Iterator[Flower]:  # noqa: F811
    port = free_port()
    environment = os.environ | {
        "HDCS_REDIS_URL": center.redis.url, "HDCS_DATABASE_URL": center.settings.database_url,
        "HDCS_STATE_DIR": str(center.settings.state_dir), "HDCS_FLOWER_AUTH": LOGIN, "HDCS_FLOWER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = ["-m", "celery", "-A", "hdcs_tasks.app", "flower", f"--conf={ROOT}/deploy/flowerconfig.py"]
    with (center.folder / "flower.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *command], env=environment, cwd=ROOT, stdout=log, stderr=log)
    try:
        with chromium() as browser:
            made = Flower(port, browser)
            eventually(lambda: made.status("/healthcheck") == 200, SLOW_S, "Flower answers")
            # It tells of a task by the events it hears, and answers before it listens.
            eventually(lambda: "east@node1" in made.metrics(), SLOW_S, "Flower hears the workers")
            yield made
    except Missing as missing:
        require(missing)
    finally:
        process.terminate()
        process.wait(20)


def add_desktops(center: Center, count: int = 20) -> None:  # noqa: F811
    pool = center.control.reservations.pool
    pool.put_node("east", PoolNode("node1", 64, 96 * 1024, "10.0.0.0/22"))
    center.control.reservations.ports.set_range("east", 20000, 20999)
    with center.control.store.session() as session:
        east = session.get_one(DomainNode, "east")
        east.storage_total_bytes, east.storage_free_bytes = 4 << 40, 3 << 40
        session.get_one(ServerNode, "node1").vcpus, session.get_one(ServerNode, "node1").memory_mib = 96, 128 * 1024
        session.get_one(ServerNode, "node1").observed_at = now()
        session.add(Alarm(
            kind="backup.overdue", subject="desk-007", severity="warning", state=AlarmState.RAISED,
            message=f"no backup of desk-007 by {EVIL} for 3 d", next="hdcs backup create desk-007", raised_at=now(),
        ))  # fmt: skip
        session.add(Profile(name="small", vcpus=1, memory_mib=2048))
        for number in range(1, count + 1):
            runs = number % 3 != 0
            vm = vm_row(
                f"desk-{number:03d}", mac=f"52:54:00:00:01:{number:02x}", owner=EVIL if number == 1 else "anna",
                state=VmState.RUNNING if runs else VmState.STOPPED, server_node="node1" if runs else None,
                ip=f"10.0.0.{number}" if runs else None, tags=["office"] if number % 2 else [],
                active_at=now() - timedelta(minutes=7 * number), observed_at=now(),
            )  # fmt: skip
            session.add(vm)
        session.flush()
        session.add(Backup(
            vm_id=session.query(Vm).filter_by(name="desk-002").one().id, vm_name="desk-002", domain_node="east",
            chain="c", seq=1, kind="full", state=BackupState.READY, created_at=now() - timedelta(hours=26),
            proven_at=now() - timedelta(hours=3),
        ))  # fmt: skip


def ask(center: Center, percent: Path) -> str:  # noqa: F811
    percent.write_text("20")
    with center.control.transaction() as tx:
        operation = tx.open("test.copy", asked=Asked(by=EVIL, reason=f"because {EVIL}"), subject="desk-001")
        spec = {"log": str(center.log), "until": str(center.go), "percent": str(percent)}
        tx.step(operation, "test.work", "east", spec | {"shown": {"vm": "desk-001", "from": "node1", "to": "node2"}})
        return operation.id


def test_flower_refuses_strangers_and_shows_the_record_to_those_who_log_in(
    center: Center, flower: Flower, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    add_desktops(center)
    percent = tmp_path / "percent"
    operation = ask(center, percent)
    eventually(lambda: len(center.notes("begin")) == 1, SLOW_S, "begun")

    for path in ("/data-center", "/desktops", "/desktops/data", "/operations", "/operations/data", "/operation/abcdef"):
        assert flower.status(path) == 401, path
        assert flower.status(path, login="admin:guess") == 401, path
    assert flower.status("/operation/00000000/data", login=LOGIN) == 404
    assert flower.status("/desktops/data?start=-1", login=LOGIN) == 400

    _sees_desktops(flower)
    _sees_a_bar_move(flower, operation, percent)
    _sees_the_operation(center, flower, operation)
    flower.open("/data-center")
    picture(flower.browser, "data-center")
    assert "east" in flower.text() and "node1" in flower.text() and "Desktops running" in flower.text()
    assert "small" in flower.text(), "how many more desktops of each profile fit"
    assert f"no backup of desk-007 by {EVIL} for 3 d" in flower.text() and flower.browser.title != "taken"
    flower.follow("Desktops")
    assert flower.browser.current_url.endswith("/desktops") and flower.browser.find_elements(By.ID, "hdcs-table")

    step = center.step_of(operation)
    task = f"{step.id}.{step.attempt}"
    assert flower.status(f"/api/task/revoke/{task}?terminate=true", login=LOGIN, method="POST") in (401, 403, 405)
    assert flower.status("/api/worker/shutdown/east@node1", login=LOGIN, method="POST") in (401, 403, 405)
    center.go.touch()
    center.sweep_until(lambda: center.done(operation), SLOW_S, "done, not terminated")
    flower.open("/operations")
    flower.wait(lambda: "done" in flower.browser.find_element(By.ID, operation).text, "it stays there as history")


def _sees_desktops(flower: Flower) -> None:
    flower.open("/desktops")
    flower.wait(lambda: "desk-015" in flower.text(), "the first page")
    picture(flower.browser, "desktops")
    shown = flower.text()
    assert "desk-016" not in shown and "of 20" in shown
    assert EVIL in shown and flower.browser.title != "taken"
    assert "1 d" not in shown and "26 h ago" in shown and "10.0.0.1" in shown and "7 min" in shown
    search = flower.browser.find_element(By.CSS_SELECTOR, "input[type=search]")
    search.send_keys("desk-017")
    flower.wait(lambda: "desk-017" in flower.text() and "desk-001" not in flower.text(), "only what is searched for")
    search.clear()
    search.send_keys("%")
    flower.wait(lambda: "No desktops match" in flower.text(), "a % means itself")


def _sees_a_bar_move(flower: Flower, operation: str, percent: Path) -> None:
    flower.open("/operations")
    flower.browser.execute_script("window.neverReloaded = true")  # type: ignore[no-untyped-call]
    flower.wait(lambda: flower.bar(operation) == "20", "the bar stands at 20")
    shown = flower.text()
    picture(flower.browser, "operations")
    assert "disk 12/27 GiB, about 1 min 35 s left" in shown and "vm=desk-001 node1 → node2" in shown
    assert EVIL in shown and flower.browser.title != "taken"
    percent.write_text("60")
    flower.wait(lambda: flower.bar(operation) == "60", "the bar has moved to 60")
    assert flower.browser.execute_script("return window.neverReloaded")  # type: ignore[no-untyped-call]


def _sees_the_operation(center: Center, flower: Flower, operation: str) -> None:  # noqa: F811
    flower.open(f"/operation/{operation}")
    assert "test.work" in flower.text() and f"because {EVIL}" in flower.text() and flower.browser.title != "taken"
    picture(flower.browser, "operation")
    flower.follow("test.work")
    flower.wait(lambda: "PROGRESS" in flower.text(), "Flower's own page of the task, with its progress")
    assert "60% disk 12/27 GiB" in flower.text() and "desk-001 node1 → node2" in flower.text()
    assert not flower.browser.find_elements(By.ID, "task-terminate")
    flower.browser.get(f"http://{LOGIN}@127.0.0.1:{flower.port}/tasks")
    flower.wait(lambda: "60% disk 12/27 GiB" in _cell(flower, "test.work", "Result"), "progress in the Result column")
    picture(flower.browser, "tasks")
    assert _cell(flower, "test.work", "kwargs").startswith("vm=desk-001 node1 → node2")
    flower.browser.get(f"http://{LOGIN}@127.0.0.1:{flower.port}/workers")
    flower.wait(lambda: "east@node1" in flower.text(), "workers by domain node and server node")


def _cell(flower: Flower, task: str, column: str) -> str:
    """Of Flower's own table of tasks: a cell of the row of this task."""
    heads = [str(head.get_attribute("textContent")).strip().lower()
             for head in flower.browser.find_elements(By.CSS_SELECTOR, "#tasks-table thead th")]  # fmt: skip
    for row in flower.browser.find_elements(By.CSS_SELECTOR, "#tasks-table tbody tr"):
        cells = [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        if task in cells:
            return cells[heads.index(column.lower())]
    return ""


def test_the_pages_data_are_plain_numbers_and_moments(center: Center) -> None:  # noqa: F811
    from hdcs_tasks.errors import Invalid
    from hdcs_tasks.monitor.control_overview import data_center, desktops
    from hdcs_tasks.operations.pages import page

    add_desktops(center, 4)
    found = desktops(center.control, limit=2, order="active_at", descending=True)
    assert (found["total"], found["found"], [r["name"] for r in found["rows"]]) == (4, 4, ["desk-001", "desk-002"])
    assert found["rows"][1]["proven"]["taken_at"] < found["rows"][1]["proven"]["proven_at"]
    assert desktops(center.control, state="stopped")["found"] == 1
    assert desktops(center.control, search="office")["found"] == 2
    sheet: dict[str, Any] = json.loads(json.dumps(data_center(center.control)))
    assert sheet["counts"]["desktops"] == {"running": 3, "stopped": 1}
    assert sheet["server_nodes"][0]["guests"] == 3
    for wrong in ({"limit": 0}, {"offset": -1}, {"order": "mac"}, {"state": "flying"}):
        with pytest.raises(Invalid):
            desktops(center.control, **wrong)  # type: ignore[arg-type]
    with pytest.raises(Invalid):
        page(center.control, show="nothing")
