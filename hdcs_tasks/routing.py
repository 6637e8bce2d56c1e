"""Queue and worker names, and the rules for names that become part of them.

    control                    requests, outcomes, sweeps           -> control worker
    <domain node>              long steps of that resource pool     -> any of its server nodes
    <domain node>@<server node>.dq2         long steps of one server node   -> its prefork worker
    <domain node>.quick@<server node>.dq2   short commands of one node      -> its threaded worker

``.dq2`` and the exchange ``C.dq2`` are Celery's own (``worker_direct``).
"""

from __future__ import annotations

import re
from typing import Any

from celery.utils.nodenames import worker_direct

from hdcs_tasks.errors import Invalid

CONTROL = "control"

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_RESERVED = frozenset({CONTROL, "celery"})


def check_name(kind: str, name: str) -> str:
    """``name`` if it can safely be a queue, host, file and XML name (RFC 1123 label, lower case); else Invalid."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise Invalid(
            f"{name!r} is not a valid {kind} name",
            next="Use 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
            + (f"; reserved: {', '.join(sorted(_RESERVED))}" if name in _RESERVED else ""),
        )
    return name


def worker_name(domain_node: str, server_node: str) -> str:
    """Name of a server node's prefork worker: the long work."""
    return f"{domain_node}@{server_node}"


def quick_worker_name(domain_node: str, server_node: str) -> str:
    """Name of a server node's threaded worker: the short commands."""
    return f"{domain_node}.quick@{server_node}"


def direct_queue(domain_node: str, server_node: str) -> str:
    return f"{worker_name(domain_node, server_node)}.dq2"


def quick_queue(domain_node: str, server_node: str) -> str:
    return f"{quick_worker_name(domain_node, server_node)}.dq2"


def server_node_of(queue: str) -> str | None:
    """The server node a direct or quick queue is of; None for a domain node's."""
    return queue.partition("@")[2].removesuffix(".dq2") or None


def queue_for(name: str) -> Any:
    """What to hand to ``apply_async(queue=…)``: a direct queue needs its exchange and routing key said."""
    if name.endswith(".dq2"):
        return worker_direct(name.removesuffix(".dq2"))
    return name
