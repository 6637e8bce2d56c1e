"""Console tickets: a ``.vv`` text whose password works once the server node has set it, and soon no more.

The password travels in a short-lived Redis note, never in the ledger, a message or a log.
"""

from __future__ import annotations

import secrets

from hdcs_tasks.errors import WrongState
from hdcs_tasks.operations.control import Asked, Control
from hdcs_tasks.pool.control import get_server_node
from hdcs_tasks.routing import quick_queue
from hdcs_tasks.states import VmState
from hdcs_tasks.store.models import now
from hdcs_tasks.vm.control import check_reachable, get_vm

_VIEWER = """[virt-viewer]
type=spice
host={host}
port={port}
password={password}
title={name}
delete-this-file=1
"""


def console(control: Control, name: str, asked: Asked, *, ttl_s: float) -> tuple[str, str]:
    """Ask for a fresh ticket on the running guest: the operation's id, and the viewer's text for when it is done.

    Raises WrongState, NotFound, or Unreachable when its server node has left.
    """
    password = secrets.token_urlsafe(18)
    with control.transaction() as tx:
        vm = get_vm(tx.session, name)
        if vm.state is not VmState.RUNNING or vm.server_node is None or vm.port is None:
            raise WrongState(f"VM {vm.name} is {vm.state}: no console", next=f"Start it: hdcs vm start {vm.name}")
        check_reachable(tx.session, vm)
        node = get_server_node(tx.session, vm.server_node)
        vm.active_at = now()  # somebody is about to sit down at it
        operation = tx.open("vm.console", asked=asked, subject=vm.name)
        control.reservations.notes.write(f"ticket:{operation.id}", "password", password, ttl_s=ttl_s)
        spec = {"shown": {"vm": vm.name}, "vm_id": vm.id, "note": f"ticket:{operation.id}", "ttl_s": ttl_s}
        tx.step(operation, "vm.console_on_node", quick_queue(node.domain_node, node.name), spec, node=node.name)
        host, port = node.ip, vm.port
    return operation.id, _VIEWER.format(host=host, port=port, password=password, name=name)
