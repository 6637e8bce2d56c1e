"""What ``pool_place.lua`` answers, in words: the place and how it was weighed, or the refusal of each server node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hdcs_tasks.errors import Conflict, HdcsError, NoCapacity
from hdcs_tasks.reservations.ips import ip_text
from hdcs_tasks.reservations.model import Placed, PlaceRequest, Weighed

NAMED = 5  # server nodes named in a refusal's message; details has them all


def placed(request: PlaceRequest, answer: Sequence[Any]) -> Placed | HdcsError:
    """What the script answered to ``request``: the place and the claim, or the error that says why there is none."""
    if answer[0] == "ok":
        return Placed(answer[1], int(answer[2]), ip_text(int(answer[3])), answer[4], _weighed(answer[5:]))
    if answer[0] == "two":
        return Conflict(
            f"VM {request.vm} holds claims on {answer[1]} and {answer[2]} already",
            next="Wait for its migration to end, or release the claim of the node it is not on",
        )
    if answer[0] == "amounts":
        return Conflict(
            f"VM {request.vm} holds a claim of another size on {answer[1]}",
            next="Stop it first; the claim ends with it",
        )
    return _refused(request, answer)


def _weighed(told: Sequence[Any]) -> tuple[Weighed, ...]:
    return tuple(
        Weighed(node, int(vcpus), int(memory), float(score) if score else None, why and _why(why, memory, vcpus))
        for node, vcpus, memory, score, why in zip(*(told[i::5] for i in range(5)), strict=True)
    )


def _refused(request: PlaceRequest, answer: Sequence[Any]) -> NoCapacity:
    rows: list[dict[str, Any]] = [
        {"node": node, "free_vcpus": int(vcpus), "free_memory_mib": int(memory), "why": why}
        for node, vcpus, memory, why in zip(*(answer[i::4] for i in range(2, 6)), strict=True)
    ]
    rows.sort(key=lambda row: str(row["node"]))
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["why"]] = counts.get(row["why"], 0) + 1
    details = {"vm": request.vm, "domain_node": request.domain_node, "vcpus": request.vcpus,
               "memory_mib": request.memory_mib, "nodes": rows, "counts": counts, "ports": answer[1],
               "best": sorted(rows, key=lambda row: -row["free_memory_mib"])[:NAMED]}  # fmt: skip
    shape = request.label or f"VM {request.vm} ({request.vcpus} vCPU, {request.memory_mib} MiB)"
    if answer[1]:
        why, hint = _POOL_WORDS[answer[1]]
        return NoCapacity(f"domain node {request.domain_node} cannot take {shape}: {why}", next=hint, details=details)
    said = [_words(row) for row in rows[:NAMED]]
    if len(rows) > NAMED:
        said.append(f"and {len(rows) - NAMED} more")
    return NoCapacity(
        f"no server node of {request.domain_node} fits {shape}: {', '.join(said) or 'it has none'}",
        next=request.hint or "See: hdcs pool capacity",
        details=details,
    )


_POOL_WORDS = {
    "port": ("all console ports are in use or cooling", "Wait for ports to cool, or widen the range"),
    "no range": ("it has no range of console ports", "Wait for ports to cool, or widen the range"),
    "starts": ("as many starts are under way on its storage as may be", "Wait, or: hdcs domain set --max-starts"),
}


def _words(row: dict[str, Any]) -> str:
    return f"{row['node']} {_why(row['why'], row['free_memory_mib'], row['free_vcpus'])}"


def _why(why: str, free_memory_mib: int, free_vcpus: int) -> str:
    """The script's word for a refusal, in words."""
    if why == "memory":
        return f"{free_memory_mib} MiB free"
    if why == "vcpus":
        return f"{free_vcpus} vCPU free"
    if why.startswith("tag "):
        return f"lacks tag {why[4:]}"
    if why.startswith("apart !"):
        return f"runs a VM that is kept apart from tag {why[7:]}"
    if why.startswith("apart "):
        return f"runs a VM tagged {why[6:]}, to be kept apart"
    if why.startswith("together "):
        return f"runs no VM tagged {why[9:]}, to be kept together"
    words = {
        "ip": "has no free IP",
        "no subnet": "has no subnet",
        "unpinned": "is not the pinned node",
        "starts": "has as many starts under way as it may",
    }
    return words.get(why, why)
