"""A control plane and two server nodes of east, with the test as the broker's hand (fixture ``desk``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import redis
from sqlalchemy import select

from hdcs_tasks.app import make_app
from hdcs_tasks.errors import WrongState
from hdcs_tasks.hypervisor.connection import HostPool
from hdcs_tasks.operations.control import Asked, Control, Tx
from hdcs_tasks.operations.handlers import on_start
from hdcs_tasks.operations.node import NodeContext, Run, execute
from hdcs_tasks.operations.recovery import settle
from hdcs_tasks.operations.spool import Spool
from hdcs_tasks.operations.views import show
from hdcs_tasks.reservations import Reservations
from hdcs_tasks.routing import queue_for
from hdcs_tasks.states import ServerNodeState
from hdcs_tasks.store.models import DomainNode, Operation, ServerNode, Step, Vm, now
from tests.contract.test_store import vm_row

Handler = Callable[[Run, dict[str, Any]], dict[str, Any]]


@on_start("test.on_vm")
def _begin_on_vm(tx: Tx, operation: Operation) -> None:
    tx.step(operation, "test.work", "east", {"shown": {"vm": operation.subject}})
    if operation.request.get("refuse"):
        raise WrongState("it cannot begin")


class Desk:
    """The control plane, two server nodes and the test as the broker's hand."""

    def __init__(self, control: Control, folder: Path) -> None:
        self.control = control
        self.nodes = {name: self._node(name, folder) for name in ("node1", "node2")}
        with control.store.session() as session:
            session.add(DomainNode(name="east", token_key="k", port_first=20000, port_last=20999))
            session.flush()
            session.add_all(self._row(name) for name in self.nodes)

    def _node(self, name: str, folder: Path) -> NodeContext:
        config = self.control.settings.model_copy(update={"server_node": name, "state_dir": folder / name})
        reservations = Reservations.from_settings(config)
        return NodeContext(config, make_app(config), reservations, HostPool(), Spool(folder / name / "spool"))

    @staticmethod
    def _row(name: str) -> ServerNode:
        return ServerNode(
            name=name, domain_node="east", state=ServerNodeState.UP, ip="127.0.0.1", subnet="10.0.0.0/24",
            instance="i", facts={}, vcpus=8, memory_mib=8192,
        )  # fmt: skip

    # ---- asking

    def ask(self) -> str:
        with self.control.transaction() as tx:
            operation = tx.open("test.one", asked=Asked())
            tx.step(operation, "test.work", "east", {"shown": {}})
            return operation.id

    def vm(self) -> str:
        with self.control.store.session() as session:
            vm = vm_row()
            session.add(vm)
            session.flush()
            return vm.id

    def ask_on(self, vm_id: str, *, supersede: bool = False, **request: Any) -> str:
        with self.control.transaction() as tx:
            vm = tx.session.get_one(Vm, vm_id)
            return tx.open("test.on_vm", asked=Asked(), vm=vm, request=request, supersede=supersede).id

    def lose(self, operation: str) -> None:
        """Its step, as if Redis had never heard of it."""
        key = f"{self.control.settings.key_prefix}step:{self.step(operation).id}"
        assert redis.Redis.from_url(self.control.settings.redis_url).delete(key)

    # ---- messages

    def messages(self, queue: str = "east") -> list[dict[str, Any]]:
        """Take every message out of a queue; their keyword arguments."""
        with self.control.celery.connection_for_write() as connection:
            simple = connection.SimpleQueue(queue_for(queue))
            found: list[dict[str, Any]] = []
            try:
                while True:
                    message = simple.get(block=False)
                    message.ack()
                    body = message.payload
                    found.append(body[1])
            except Empty:
                return found
            finally:
                simple.close()

    def work(
        self, message: dict[str, Any], handler: Handler, node: str = "node1",
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> str:  # fmt: skip
        return execute(self.nodes[node], "test.work", handler, on_progress, queue="east", **message)

    def settle_all(self) -> int:
        reports = [message["report"] for message in self.messages("control")]
        for report in reports:
            settle(self.control, report)
        return len(reports)

    def run(self, handler: Handler, node: str = "node1", queue: str = "east") -> list[str]:
        """Deliver, execute and settle everything that waits in a queue."""
        answers = [self.work(message, handler, node) for message in self.messages(queue)]
        self.settle_all()
        return answers

    # ---- looking

    def state(self, operation: str) -> str:
        return str(show(self.control, operation)["state"])

    def step(self, operation: str) -> Step:
        with self.control.store.read() as session:
            return session.scalars(select(Step).where(Step.operation_id == operation)).one()

    def due(self, operation: str, **fields: Any) -> None:
        """Let a step's moments lie in the past, as if time had gone by."""
        with self.control.store.session() as session:
            step = session.scalars(select(Step).where(Step.operation_id == operation)).one()
            for name, value in fields.items():
                setattr(step, name, value)


def good(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    run.check()
    return {"by": run.ctx.server_node}


def failing(error: Exception) -> Handler:
    def handler(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
        raise error

    return handler


def never(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("must not run")


def ago(seconds: float) -> Any:
    return now() - timedelta(seconds=seconds)


@pytest.fixture
def desk(control: Control, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(control, tmp_path)
    yield made
    for node in made.nodes.values():
        node.celery.close()
