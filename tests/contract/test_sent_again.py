"""A message Redis gave to a server node that was just cut off is sent again: when it is lost, and when it is back."""

from __future__ import annotations

from typing import Any

import pytest

from hdcs_tasks.pool import control as pool_control
from hdcs_tasks.routing import quick_queue
from tests.contract.test_moves import Played, center

__all__ = ["center"]

pytestmark = pytest.mark.contract


def swallowed(played: Played, queue: str) -> int:
    """Take every message off a queue, as a connection that leads nowhere does."""
    redis: Any = played.control.celery.connection_for_write().channel().client
    count = int(redis.llen(queue))
    redis.delete(queue)
    return count


def test_when_a_server_node_is_lost_and_when_it_is_back(center: Played) -> None:
    before = center.started("a")
    center.clone("b")
    node = before["server_node"]
    swallowed(center, "east")
    center.cloud.vms["b"].start()
    suspended = center.cloud.vms["a"].suspend()
    own = quick_queue("east", node)
    assert (swallowed(center, "east"), swallowed(center, own)) == (1, 1)
    center.control.reservations.leases.drop("node", node, f"i-{node}")
    assert pool_control.lease_sweep(center.control) == [node]
    assert (swallowed(center, "east"), swallowed(center, own)) == (1, 0), "others of its domain node can take it"
    center.node("east", node, 1024)
    assert (swallowed(center, "east"), swallowed(center, own)) == (1, 1), "it may have been given what came since"
    center.play()
    center.node("east", node, 1024)
    assert (swallowed(center, "east"), swallowed(center, own)) == (0, 0), "what has been taken is not sent again"
    assert suspended.state == "done" and center.vm("b")["state"] == "running"
