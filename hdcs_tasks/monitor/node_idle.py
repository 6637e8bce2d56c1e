"""Looking on a server node whether somebody uses a desktop: when an idle policy asks, and right before it acts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hdcs_tasks.errors import Cancelled, HdcsError, NotFound, Unavailable
from hdcs_tasks.hypervisor import agent, guests
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.logs import logger
from hdcs_tasks.monitor.idle_rules import Limits, sample_use, use_inside
from hdcs_tasks.monitor.node import console_clients, looked_at
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


def look_and_tell(ctx: NodeContext, wanted: Sequence[Mapping[str, Any]], asked: str) -> None:
    """Look at each of ``[{vm_id, inside, warn}]``; who is not used is shown the text ``warn`` if there is one.

    Control hears of it as ``monitor.looked``: ``{node, at, looks, asked}``, with ``told`` where it was to be told.
    """
    host = ctx.host()
    with ThreadPoolExecutor(AT_ONCE, "idle-look") as pool:
        looks = [found for found in pool.map(lambda one: _look_and_tell(host, one), wanted) if found is not None]
    report = {"node": ctx.server_node, "at": time.time(), "looks": looks, "asked": asked}
    send(ctx.celery, "monitor.looked", {"report": report}, CONTROL, expires_s=60)


def _look_and_tell(host: Host, one: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        found = look(host, one["vm_id"], inside=one["inside"])
        if one.get("warn") and not use_inside(found):
            found["told"] = found["agent"] and agent.tell_users(host, one["vm_id"], one["warn"])
            looked_at[one["vm_id"]] = time.time()
    except HdcsError as error:
        log.info("not looked at", vm=one["vm_id"], error=str(error))
        return None
    return found


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
