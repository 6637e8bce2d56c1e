"""Files between the storages of two domain nodes, on the control plane: specs of the steps of ``pool/node_files``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hdcs_tasks.errors import Unreachable
from hdcs_tasks.operations.rules import CAN_BE_ASKED_AGAIN
from hdcs_tasks.states import IN_POOL
from hdcs_tasks.store.models import ServerNode


def sources_of(session: Session, domain_node: str, first: str | None = None) -> list[dict[str, str]]:
    """Server nodes of ``domain_node`` that files of its storage can be read from, ``first`` first; Unreachable where
    none is up."""
    query = select(ServerNode).where(ServerNode.domain_node == domain_node, ServerNode.state.in_(IN_POOL))
    rows = sorted(session.scalars(query), key=lambda node: (node.name != first, node.name))
    if not rows:
        raise Unreachable(
            f"no server node of domain node {domain_node} is up to read its storage from",
            next="Bring one back: hdcs node list",
        )
    return [{"node": node.name, "address": node.ip} for node in rows]


def fetch_spec(
    session: Session, source: str, files: Iterable[dict[str, Any]], *, first: str | None = None,
    bandwidth_mib_s: int | None = None, shown: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Spec of a ``fetch`` step, to be published to the domain node that wants the ``files``.

    ``source``: the domain node that has them; ``files``: ``{path, size_bytes, sha256}`` each, as ``offer`` answers or
    as the record knows them, optionally with ``to`` (the path they get) and ``allocated_bytes``.
    """
    return {
        "shown": shown or {"from": source}, "sources": sources_of(session, source, first), "files": list(files),
        "bandwidth_mib_s": bandwidth_mib_s, **CAN_BE_ASKED_AGAIN,
    }  # fmt: skip


def offer_spec(
    paths: Sequence[str], *, optional: Sequence[str] = (), shown: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Spec of an ``offer`` step, to be published to the domain node that has the files. Only for files whose size and
    hash nobody knows yet: those of images and backups stand in the record."""
    return {"shown": shown or {"files": len(paths)}, "paths": list(paths), "optional": list(optional)}
