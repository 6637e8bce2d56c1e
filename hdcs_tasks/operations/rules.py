"""Pure decisions about steps: what to do with an outcome, and with a step whose executor may be gone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hdcs_tasks.errors import BY_CODE, HdcsError

REPUBLISH_AFTER_S = 60.0
"""A message nobody claimed for this long may have been lost by the broker; the same attempt is sent again."""


class Verdict(StrEnum):
    """What control does with a published step."""

    LEAVE = "leave"
    SEND_AGAIN = "send_again"
    NEW_ATTEMPT = "new_attempt"
    GIVE_UP = "give_up"


@dataclass(frozen=True)
class StepFacts:
    """What is known of a published step; ages in seconds. ``known``: its Redis key exists and holds its attempt."""

    attempt: int
    attempts_max: int
    known: bool
    holder: bool
    leased: bool
    done: bool
    age_s: float
    lease_ttl_s: float


def judge(facts: StepFacts) -> Verdict:
    """Decide what becomes of a published step. Leaves alone whoever may still be at work.

    A missing key means that Redis was lost or that control died between commit and publishing: no node can claim it, so
    a new attempt is safe once the message had time to arrive. An executor whose lease ran out has stopped by contract.
    """
    if not facts.known:
        return _again(facts) if facts.age_s > 2.0 else Verdict.LEAVE
    if facts.done:
        # The outcome is in the node's spool; ask again only long after it should have come.
        return _again(facts) if facts.age_s > 10 * facts.lease_ttl_s else Verdict.LEAVE
    if facts.holder:
        return Verdict.LEAVE if facts.leased else _again(facts)
    return Verdict.SEND_AGAIN if facts.age_s > REPUBLISH_AFTER_S else Verdict.LEAVE


def _again(facts: StepFacts) -> Verdict:
    return Verdict.NEW_ATTEMPT if facts.attempt < facts.attempts_max else Verdict.GIVE_UP


def backoff_s(attempt: int, base_s: float = 2.0, cap_s: float = 60.0) -> float:
    """Seconds before attempt ``attempt + 1``: doubles from ``base_s`` up to ``cap_s``."""
    return float(min(cap_s, base_s * 2 ** max(0, attempt - 1)))


def is_retryable(error: dict[str, object]) -> bool:
    """Whether an error of this code is worth another attempt: a property of its class."""
    return BY_CODE.get(str(error.get("code")), HdcsError).retryable


def bulk_percent(children: list[float]) -> float:
    """A parent's progress: the mean of its children's, in percent."""
    return sum(children) / len(children) if children else 0.0
