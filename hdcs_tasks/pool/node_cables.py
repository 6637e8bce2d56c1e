"""A guest that goes on from its memory does not know where it is: once it runs, its network cable is pulled for a
second, and it asks the DHCP of its server node.

Whoever lets it run notes that in a file of the server node and does not wait for that second. What cannot be done right
then (it stands still, somebody works on the VM, the worker dies) is done when it is resumed, or by the next round of
``pool.dhcp_sweep``.
"""

from __future__ import annotations

from pathlib import Path

from hdcs_tasks.clock import start_thread
from hdcs_tasks.errors import HdcsError
from hdcs_tasks.hypervisor import agent, guests
from hdcs_tasks.hypervisor.locks import vm_lock
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import NodeContext

log = logger(__name__)

DONE = "renewed"
SOON = "renewed within seconds"
AT_RESUME = "renewed at its resume"
_WAIT_S = 10.0


def _note(ctx: NodeContext, vm_id: str) -> Path:
    return ctx.settings.state_dir / "cables" / vm_id


def note(ctx: NodeContext, vm_id: str) -> None:
    """The guest is about to run here with the network of another place in its memory. For the holder of its lock."""
    path = _note(ctx, vm_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def forget(ctx: NodeContext, vm_id: str) -> None:
    """The guest is not here any more."""
    _note(ctx, vm_id).unlink(missing_ok=True)


def renew(ctx: NodeContext, vm_id: str, mac: str) -> str:
    """Pull the cable now, and wait for it; a guest that stands still would not see it. What the operation tells of it.
    For the holder of its lock."""
    note(ctx, vm_id)
    try:
        seen = guests.info(ctx.host(), vm_id)
        if seen is not None and seen.state != "running":
            return AT_RESUME
        agent.renew_network(ctx.host(), vm_id, mac)
    except HdcsError as error:
        log.warning("network not renewed yet", vm=vm_id, error=str(error))
        return f"not renewed yet: {error.message}"
    forget(ctx, vm_id)
    return DONE


def renew_soon(ctx: NodeContext, vm_id: str) -> None:
    """Beside the caller, once that has let the VM's lock go: nothing where nothing is noted."""
    if _note(ctx, vm_id).exists():
        start_thread(lambda: _renew_noted(ctx, vm_id, _WAIT_S), f"cable-{vm_id[:8]}")


def renew_all_noted(ctx: NodeContext) -> None:
    """What is noted still, and runs: whoever was to do it could not."""
    folder = _note(ctx, "any").parent
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        _renew_noted(ctx, path.name, 0)


def _renew_noted(ctx: NodeContext, vm_id: str, wait_s: float) -> None:
    try:
        with vm_lock(ctx.settings.state_dir, vm_id, wait_s):
            seen = guests.info(ctx.host(), vm_id)
            if seen is None or not seen.active:
                forget(ctx, vm_id)
            elif seen.state == "running" and _note(ctx, vm_id).exists():
                agent.renew_network(ctx.host(), vm_id, seen.mac)
                forget(ctx, vm_id)
    except HdcsError as error:
        log.info("network not renewed yet", vm=vm_id, error=str(error))
