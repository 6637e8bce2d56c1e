"""The two Celery workers of a server node, and the thread that keeps the node in its pool."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from celery import bootsteps
from celery.signals import worker_process_init
from celery.worker import state

import hdcs_tasks.backup.node_tasks
import hdcs_tasks.image.node_tasks
import hdcs_tasks.monitor.node_tasks
import hdcs_tasks.pool.node_tasks
import hdcs_tasks.vm.node_tasks  # noqa: F401 - importing registers the tasks
from hdcs_tasks.app import app
from hdcs_tasks.config import settings
from hdcs_tasks.errors import Conflict, HdcsError, Rejected, Unavailable
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor.node import Watcher
from hdcs_tasks.operations.node import resend_spooled
from hdcs_tasks.operations.node_tasks import node_context
from hdcs_tasks.pool import node as pool_node
from hdcs_tasks.pool.identity import joined_file
from hdcs_tasks.pool.node_admission import Admission
from hdcs_tasks.routing import direct_queue, quick_queue, quick_worker_name, worker_name
from workers.server_node import REFUSED

log = logger(__name__)

JOIN_RETRY_S = 2.0
JOINED_POLL_S = 0.1


class Membership:
    """Joins, renews the lease, joins again when it ran out, sends spooled outcomes, leaves."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)

    def start(self) -> None:
        self.join_until_taken()
        self._thread.start()

    def join_until_taken(self) -> None:
        """Join before any work is taken. A refusal ends the process with its reason; silence is waited out."""
        while not self._stop.is_set():
            state.maybe_shutdown()
            try:
                pool_node.join(node_context())
                joined_file(settings()).touch()
                return
            except Unavailable as error:
                log.warning("not joined yet; trying again", error=str(error))
                self._stop.wait(JOIN_RETRY_S)
            except HdcsError as error:
                log.error("refused", error=str(error))
                os._exit(REFUSED if isinstance(error, Rejected | Conflict) else 1)

    def _run(self) -> None:
        every_s = min(settings().lease_ttl_s / 3, 5.0)
        renewed = time.monotonic()
        while not self._stop.wait(1.0):
            try:
                if time.monotonic() - renewed >= every_s:
                    renewed = time.monotonic()
                    if not pool_node.renew(node_context()):
                        log.warning("the lease ran out; joining again")
                        pool_node.join(node_context())
                resend_spooled(node_context())
            except HdcsError as error:
                log.warning("membership", error=str(error))
            except Exception:  # the thread must outlive a broker's every mood
                log.exception("membership")

    def stop(self) -> None:
        self._stop.set()
        try:
            pool_node.leave(node_context())
        except Exception as error:  # noqa: BLE001 - leaving is a courtesy: the lease runs out by itself
            log.warning("left without a word", error=str(error))


class MembershipStep(bootsteps.StartStopStep):
    """Worker-level: a consumer step would be torn down at every reconnect."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._membership = Membership()

    def start(self, worker: Any) -> None:
        self._membership.start()

    def stop(self, worker: Any) -> None:
        self._membership.stop()

    def terminate(self, worker: Any) -> None:
        self._membership.stop()


class WatcherStep(bootsteps.StartStopStep):
    """Watches the guests and the load: events to control, the bound on starts to the pool."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._watcher: Watcher | None = None
        self._admission: Admission | None = None

    def start(self, worker: Any) -> None:
        self._admission = Admission(node_context())
        self._watcher = Watcher(node_context(), self._admission.booted)
        self._admission.start()
        self._watcher.start()

    def stop(self, worker: Any) -> None:
        if self._watcher is not None:
            self._watcher.stop()
        if self._admission is not None:
            self._admission.stop()


class JoinedStep(bootsteps.StartStopStep):
    """The long worker takes no work before the quick one has joined."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        while not joined_file(settings()).exists():
            state.maybe_shutdown()  # nobody else looks before the consumer runs
            time.sleep(JOINED_POLL_S)


@worker_process_init.connect
def _warm(**_: Any) -> None:
    """Open libvirt and Redis in the fresh pool child, so that its first task does not pay for it."""
    try:
        node_context().host()
        node_context().reservations.epoch.is_open()
    except HdcsError as error:
        log.warning("not warm", error=str(error))


def run_long() -> None:
    """``<domain node>@<server node>``: the node's own direct queue first, then the domain node's.

    The process its pool is forked from opens no libvirt: a child forked after that could not use it.
    """
    config = settings()
    app.steps["worker"].add(JoinedStep)
    queues = f"{direct_queue(config.domain_node, config.server_node)},{config.domain_node}"
    _run("prefork", config.node_concurrency, worker_name(config.domain_node, config.server_node), queues)


def run_quick() -> None:
    """``<domain node>.quick@<server node>``: its own direct queue only. Keeps the node in its pool."""
    config = settings()
    app.steps["worker"].update((MembershipStep, WatcherStep))
    queue = quick_queue(config.domain_node, config.server_node)
    _run("threads", config.quick_concurrency, quick_worker_name(config.domain_node, config.server_node), queue)


def _run(pool: str, concurrency: int, name: str, queues: str) -> None:
    app.worker_main([
        "worker", "--pool", pool, "--concurrency", str(concurrency), "--queues", queues, "--hostname", name,
        "--without-mingle", "--without-gossip", "--loglevel", settings().log_level,
    ])  # fmt: skip
