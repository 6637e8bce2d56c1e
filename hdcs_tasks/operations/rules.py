"""Pure decisions about steps: what to do with an outcome, and with a step whose executor may be gone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any

from hdcs_tasks.errors import BY_CODE, HdcsError

REPUBLISH_AFTER_S = 60.0
"""A message nobody claimed for this long may have been lost by the broker; the same attempt is sent again."""

UNKNOWN_AFTER_S = 2.0
"""A message is claimable this soon after the commit, or its attempt was lost with Redis or with control itself."""

WAITING = frozenset({"no_capacity", "rebuild_pending"})
"""Codes that cost no attempt: nothing was touched, and the step waits until its deadline."""


class Verdict(StrEnum):
    """What control does with a published step."""

    LEAVE = "leave"
    SEND_AGAIN = "send_again"
    NEW_ATTEMPT = "new_attempt"
    GIVE_UP = "give_up"


@dataclass(frozen=True)
class StepFacts:
    """What is known of a published step. ``known``: its Redis key exists and holds its attempt.

    ``spent``: attempts that count against ``attempts_max``, the present one included. ``age_s``: seconds since its
    message was last sent; ``done_s``: seconds since control first saw its executor finished.
    """

    spent: int
    attempts_max: int
    known: bool
    holder: bool
    leased: bool
    done: bool
    age_s: float
    done_s: float
    lease_ttl_s: float


def judge(facts: StepFacts) -> Verdict:
    """Decide what becomes of a published step. Leaves alone whoever may still be at work.

    A missing key means that Redis was lost or that control died between commit and publishing: no node can claim it, so
    a new attempt is safe once the message had time to arrive. An executor whose lease ran out has stopped by contract.
    """
    if not facts.known:
        return _again(facts) if facts.age_s > UNKNOWN_AFTER_S else Verdict.LEAVE
    if facts.done:
        # The outcome is on its way or in the node's spool; ask again only long after it should have come.
        return _again(facts) if facts.done_s > 10 * facts.lease_ttl_s else Verdict.LEAVE
    if facts.holder:
        return Verdict.LEAVE if facts.leased else _again(facts)
    return Verdict.SEND_AGAIN if facts.age_s > REPUBLISH_AFTER_S else Verdict.LEAVE


def _again(facts: StepFacts) -> Verdict:
    return Verdict.NEW_ATTEMPT if facts.spent < facts.attempts_max else Verdict.GIVE_UP


def backoff_s(attempt: int, base_s: float = 2.0, cap_s: float = 60.0) -> float:
    """Seconds before attempt ``attempt + 1``: doubles from ``base_s`` up to ``cap_s``."""
    return float(min(cap_s, base_s * 2 ** min(30, max(0, attempt - 1))))


def is_retryable(error: dict[str, object]) -> bool:
    """Whether an error of this code is worth another attempt: a property of its class."""
    return BY_CODE.get(str(error.get("code")), HdcsError).retryable


def operation_percent(plan: Mapping[str, float], steps: Sequence[str], percent: float) -> float:
    """How far an operation is (0 to 99) when the last of ``steps`` (names, in order) is at ``percent``.

    ``plan``: what each step usually is of the whole, or one of several (``a|b``). A step that is not in it (an undo,
    another feature's) adds nothing; without a plan the last step is all there is.
    """
    if not plan:
        return min(99.0, percent)
    done = 0.0
    for names, weight in plan.items():
        taken = [name for name in names.split("|") if name in steps]
        done += weight * (percent if steps[-1] in taken else 100.0 if taken else 0.0)
    return min(99.0, done / sum(plan.values()))


def bulk_percent(children: list[float]) -> float:
    """A parent's progress: the mean of its children's, in percent."""
    return sum(children) / len(children) if children else 0.0


def attempts_spent(history: Sequence[Mapping[str, Any]]) -> int:
    """How many attempts in a step's history count: each once (it may be lost and report late), waits not at all."""
    return len({entry.get("attempt") for entry in history if not is_waiting(entry.get("error"))})


def is_waiting(error: Mapping[str, Any] | None) -> bool:
    return error is not None and error.get("code") in WAITING


def is_touched(attempt: int, node: str | None) -> bool:
    """Whether an attempt before this one may have left something behind on ``node``."""
    return attempt > 1 and node is not None


def is_binding(spec: Mapping[str, Any]) -> bool:
    """Whether a step is to be done whatever is asked meanwhile: what it tidies up after cannot be taken back any more.
    A cancel that comes while it runs comes too late."""
    return bool(spec.get("binding"))


def ends_with_its_node(spec: Mapping[str, Any]) -> bool:
    """Whether a step is to fail (Unreachable) once its server node is lost, instead of waiting for its return: its
    feature has another way to go on."""
    return bool(spec.get("ends_with_its_node"))


def bears_loss_s(spec: Mapping[str, Any]) -> float:
    """Of a step that ends with its server node: for how many seconds that may be lost before. The step goes on where it
    was if its server node is back by then; a cancel does not wait for that."""
    return float(spec.get("bears_loss_s", 0.0))


CAN_BE_ASKED_AGAIN: dict[str, Any] = {"ends_with_its_node": True, "bears_loss_s": 60.0}
"""In the spec of a step that may be asked for anew, since it reads, removes, or makes something of its own: it goes on
when its server node is back within a minute, and is off after that. Nobody is locked out by a server that burned down.
An executor that is at it still finds its claim gone."""


def awaits_its_node(spec: Mapping[str, Any]) -> bool:
    """Of a step that ends with its server node: whether only its removal from the record is that end. A lost one may
    come back with what the step is for."""
    return bool(spec.get("awaits_its_node"))


def line_eta_s(place: int, through: int, window_s: float) -> float | None:
    """Seconds until the one at this place in a line is through, when ``through`` were in the last ``window_s``; None:
    nothing to go by."""
    return None if through < 1 else round(place * window_s / through, 1)


def first_few(told: Sequence[str], operation_id: str, few: int = 3) -> str:
    """The first of what is told of an operation, and where the rest can be read."""
    more = [f"and {len(told) - few} more: hdcs op show {operation_id}"] if len(told) > few else []
    return "; ".join([*told[:few], *more])


def request_digest(kind: str, subject: str, words: Mapping[str, Any]) -> str:
    """What tells a request from another one: its kind, its subject and its parameters (JSON-able), as asked for. 60 and
    60.0 are the same; so are a tuple and a list."""
    return sha256(json.dumps([kind, subject, _plain(words)], sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
