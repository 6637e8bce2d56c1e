"""Two requests about one VM's points at the same moment, on PostgreSQL, where neither sees what the other has begun."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from hdcs_tasks.backup import control as backups
from hdcs_tasks.backup import control_prune, control_restore
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.operations.control import Asked
from hdcs_tasks.operations.views import show
from tests.contract.backup_place import Place
from tests.contract.test_backup_control import place  # noqa: F401 - a fixture
from tests.contract.test_operations import desk  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.contract, pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True),
]  # fmt: skip

Request = Callable[[], Any]


class Pause:
    """Stops the first who comes here in the middle of its transaction, until the other request has ended, or has had
    time enough to show that it waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        real = getattr(module, name)

        def stopped(*args: Any, **more: Any) -> Any:
            if not self.reached.is_set():
                self.reached.set()
                self.go_on.wait(1.5)
            return real(*args, **more)

        monkeypatch.setattr(module, name, stopped)

    def race(self, first: Request, second: Request) -> list[Any]:
        """What the requests gave, or raised: ``first`` is in the middle when ``second`` is made."""
        ended: list[Any] = [None, None]

        def run(number: int, request: Request) -> None:
            try:
                ended[number] = request()
            except HdcsError as error:
                ended[number] = error
            if number == 1:
                self.go_on.set()

        one = threading.Thread(target=run, args=(0, first))
        one.start()
        assert self.reached.wait(30)
        two = threading.Thread(target=run, args=(1, second))
        two.start()
        one.join(60)
        two.join(60)
        assert not one.is_alive() and not two.is_alive()
        return ended


def two_chains(place: Place) -> list[str]:  # noqa: F811
    place.vm()
    return [place.take("desk-01", full=True).id for _ in range(2)]


@pytest.mark.parametrize("first", ["restore", "prune"])
def test_a_point_is_not_pruned_while_its_restore_is_asked_for(
    place: Place, monkeypatch: pytest.MonkeyPatch, first: str  # noqa: F811
) -> None:  # fmt: skip
    points = two_chains(place)
    requests: dict[str, Request] = {
        "restore": lambda: control_restore.restore(place.control, points[0], Asked(), name="back", start=False),
        "prune": lambda: control_prune.prune(place.control, "desk-01", Asked(), Keep(last=1)),
    }
    module, where = {"restore": (control_restore, "open_as_new"), "prune": (control_prune, "plan_prune")}[first]
    order = [requests.pop(first), *requests.values()]
    won, lost = Pause(monkeypatch, module, where).race(*order)
    assert isinstance(lost, HdcsError) and lost.message.endswith(("is being read", "is deleting")), str(lost)
    place.work()
    assert show(place.control, won.id)["state"] == "done"


def test_a_point_is_not_deleted_while_an_increment_on_it_is_planned(
    place: Place, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    points = two_chains(place)
    won, lost = Pause(monkeypatch, backups, "next_point").race(
        lambda: backups.create(place.control, "desk-01", Asked()),
        lambda: backups.delete(place.control, points[1], Asked()),
    )
    assert isinstance(lost, HdcsError) and "is the base of" in lost.message
    place.work()
    assert show(place.control, won.id)["state"] == "done"
    assert place.row(str(place.request(won.id)["backup"])).kind == "increment"
