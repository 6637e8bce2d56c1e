"""Looking on a server node whether somebody uses a desktop: when an idle policy asks, and right before it acts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hdcs_tasks.errors import Cancelled, HdcsError, NotFound, Unavailable
from hdcs_tasks.hypervisor import agent, guests
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor.idle_rules import Limits, sample_use, use_inside
from hdcs_tasks.monitor.node import looked_at
from hdcs_tasks.monitor.node_clients import console_clients
from hdcs_tasks.operations.node import NodeContext, Run
from hdcs_tasks.operations.sending import send
from hdcs_tasks.routing import CONTROL
from hdcs_tasks.vm import node as vm_node

log = logger(__name__)

AT_ONCE = 8
SAMPLES_SEEN = 5
AGENT_S = 5
LAST_AGENT_S = 10
"""How long an agent may take to answer before it counts as silent: on a busy server node it takes seconds."""


def look(host: Host, vm_id: str, *, inside: bool, agent_s: int = AGENT_S) -> dict[str, Any]:
    """Who uses a guest right now: ``{vm_id, console_clients, agent, users, processes, says}``.

    ``users``: names of who is logged in, ``processes``: programs of people's accounts; None where the guest agent does
    not tell, and ``says`` why; ``unsure``: it answers, but not to this in time. ``inside``: whether it is asked at all.
    Raises NotFound (no such guest), Unreachable.
    """
    seen = guests.info(host, vm_id)
    if seen is None or not seen.active:
        raise NotFound(f"there is no guest {vm_id} here")
    found: dict[str, Any] = {
        "vm_id": vm_id, "console_clients": console_clients().get(seen.console_port or 0, 0), "agent": False,
        "users": None, "processes": None, "says": "",
    }  # fmt: skip
    if seen.state != "running":
        return found | {"says": "it is suspended"}
    if not inside:
        return found | {"says": "its policy does not ask the guest agent"}
    if not agent.ping(host, vm_id, agent_s):
        return found | {"says": "the guest agent is silent; the rest decides"}
    found["agent"] = True
    looked_at[vm_id] = float("inf")  # until it is over
    try:
        found["users"] = _asked(found, "who is logged in", lambda: sorted({u.name for u in agent.users(host, vm_id)}))
        found["processes"] = _asked(found, "whose processes run", lambda: agent.user_processes(host, vm_id))
    finally:
        looked_at[vm_id] = time.time()
    return found


def _asked(found: dict[str, Any], what: str, ask: Callable[[], list[str]]) -> list[str] | None:
    try:
        return ask()
    except HdcsError as error:
        found["says"] = f"{what} is not known: {error.message}"
        found["unsure"] = found.get("unsure") or isinstance(error, Unavailable)
        return None


class Looker:
    """Threads that look into guests, apart from those of the quick worker: agents that are silent keep it from no stop
    and no sample, nor one another from being looked into for longer than it takes."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, "idle-look")
        self._lock = threading.Lock()
        self._asked: set[str] = set()

    def ask(self, vm_id: str, look: Callable[[], None]) -> bool:
        """Have it looked into; False: it waits for that already, or this process ends."""
        with self._lock:
            if vm_id in self._asked:
                return False
            self._asked.add(vm_id)
        try:
            self._pool.submit(self._look, vm_id, look)
        except RuntimeError:  # shut down
            return False
        return True

    def _look(self, vm_id: str, look: Callable[[], None]) -> None:
        try:
            look()
        except Exception:  # a thread's error would be seen by nobody
            log.exception("not looked at", vm=vm_id)
        finally:
            with self._lock:
                self._asked.discard(vm_id)

    def stop(self) -> None:
        """Forget whom nobody has begun to look into: the next worker is asked anew."""
        self._pool.shutdown(wait=False, cancel_futures=True)


looker = Looker()


def look_and_tell(ctx: NodeContext, wanted: Sequence[Mapping[str, Any]]) -> None:
    """Look into each of ``[{vm_id, inside, warn, found}]`` who is not being looked into; who is not used is shown the
    text ``warn`` if there is one. Returns at once.

    Control hears of each as ``monitor.looked``: ``{node, looks}``, with ``told`` where it was to be told, and ``found``
    as it came.
    """
    for one in wanted:
        looker.ask(one["vm_id"], lambda one=one: _look_and_tell(ctx, one))  # type: ignore[misc]


def _look_and_tell(ctx: NodeContext, one: Mapping[str, Any]) -> None:
    host, vm_id = ctx.host(), one["vm_id"]
    try:
        seen = look(host, vm_id, inside=one["inside"]) | {"found": one["found"]}
        if one.get("warn") and not use_inside(seen):
            seen["told"] = seen["agent"] and agent.tell_users(host, vm_id, one["warn"])
            looked_at[vm_id] = time.time()
    except HdcsError as error:
        log.info("not looked at", vm=vm_id, error=str(error))
        return
    send(ctx.celery, "monitor.looked", {"report": {"node": ctx.server_node, "looks": [seen]}}, CONTROL, expires_s=60)


def check_unused(run: Run, spec: dict[str, Any]) -> None:
    """The last look before an idle policy's step: raises Cancelled if somebody uses the VM. An absent guest is nobody's
    (an earlier attempt ended it)."""
    ctx, guard = run.ctx, spec["guard"]
    # Samples first: one that is taken while we look tells of our own work.
    samples = ctx.reservations.samples.vm_history(spec["vm_id"], SAMPLES_SEEN)
    seen = next((sample for sample in samples if not sample.get("looked")), None)
    try:
        used = use_inside(look(ctx.host(), spec["vm_id"], inside=guard["inside"], agent_s=LAST_AGENT_S))
    except NotFound:
        return
    if not used and seen is not None:
        used = sample_use(Limits(**guard["limits"]), seen)
    if used:
        raise Cancelled(f"left alone: {used}", details={"used": used})


vm_node.last_looks.append(check_unused)
