"""Claims of step attempts: one executor per attempt, and no word from an older one (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hdcs_tasks.clock import random_hex
from hdcs_tasks.reservations.link import Link, check_token
from hdcs_tasks.reservations.model import Check, ClaimAnswer, StepStatus
from hdcs_tasks.reservations.scripts import Call, Value

KEY_TTL_S = 7 * 24 * 3600
_FIELDS = ("attempt", "holder", "node", "done", "cancel", "percent", "phase", "eta_s")


class Steps:
    """Every method is one round trip and may be repeated when its answer was lost."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def _keys(self, step: str) -> list[str]:
        check_token("step", step)
        return [self._link.key("step", step), self._link.key("lease", "step", step)]

    def issue(self, step: str, attempt: int, node: str | None = None) -> bool:
        """Make ``attempt`` the step's present one, free to claim; False where one as new is there already.

        ``node``: the server node it was claimed on before, kept for whoever looks; the queue decides who gets it.
        """
        return self.issue_many([(step, attempt, node or "")])[0]

    def issue_many(self, attempts: Iterable[tuple[str, int, str]]) -> list[bool]:
        """``issue`` for each (step, attempt, server node or ''), pipelined."""
        calls: list[Call] = [
            (self._keys(step), (attempt, random_hex(8), node, KEY_TTL_S)) for step, attempt, node in attempts
        ]
        return [bool(answer) for answer in self._link.call_many("step_issue", calls)]

    def claim(self, step: str, attempt: int, holder: str, node: str, ttl_s: float) -> ClaimAnswer:
        """Become the executor of an attempt on server node ``node``; the lease lives ``ttl_s`` unless renewed."""
        ttl_ms = max(1, round(ttl_s * 1000))
        check_token("holder", holder)
        return ClaimAnswer(self._link.call("step_claim", self._keys(step), attempt, holder, node, ttl_ms, KEY_TTL_S))

    def _hold(self, step: str, attempt: int, holder: str, verb: str, *args: Value) -> bool:
        return bool(self._link.call("step_hold", self._keys(step), attempt, holder, verb, *args))

    def renew(self, step: str, attempt: int, holder: str, ttl_s: float) -> bool:
        """Prolong the executor's lease (also one that ended, if no newer attempt was issued). False: stop working."""
        return self._hold(step, attempt, holder, "renew", max(1, round(ttl_s * 1000)))

    def check(self, step: str, attempt: int, holder: str) -> Check:
        """To be asked right before each side effect: ``ok`` go on, ``lost`` stop, report nothing, ``cancel`` undo."""
        key = self._keys(step)[0]
        present, owner, done, cancel = self._link.do("HMGET", key, "attempt", "holder", "done", "cancel")
        if present != str(attempt) or owner != holder or done:
            return "lost"
        return "cancel" if cancel else "ok"

    def hand_over(self, step: str, attempt: int, holder: str) -> bool:
        """Give the attempt up unworked, for another node to claim: holder, node and lease are cleared."""
        return self._hold(step, attempt, holder, "hand_over")

    def finish(self, step: str, attempt: int, holder: str) -> bool:
        """The attempt has its outcome: nobody claims it again; the lease ends."""
        return self._hold(step, attempt, holder, "finish")

    def request_cancel(self, step: str, attempt: int) -> bool:
        """Ask the attempt's executor to stop at its next check; an unclaimed attempt can no longer be claimed.
        False: it is not the step's present attempt."""
        return bool(self._link.call("step_cancel", self._keys(step)[:1], attempt))

    def progress(
        self, step: str, attempt: int, holder: str, percent: float, phase: str, eta_s: float | None = None
    ) -> bool:
        """Tell how far the attempt is (percent 0 to 100). False: it is not the holder's."""
        eta = "" if eta_s is None else f"{eta_s:.1f}"
        return self._hold(step, attempt, holder, "progress", f"{percent:.1f}", phase, eta)

    def status(self, step: str) -> StepStatus | None:
        return self.statuses([step])[0]

    def statuses(self, steps: Sequence[str]) -> list[StepStatus | None]:
        """What is known of each step, None where nothing is; one round trip."""
        commands: list[Sequence[Value]] = []
        for step in steps:
            key, lease = self._keys(step)
            commands += [("HMGET", key, *_FIELDS), ("EXISTS", lease)]
        answers = self._link.commands(commands)
        return [_status(fields, bool(leased)) for fields, leased in zip(answers[::2], answers[1::2], strict=True)]

    def close(self, step: str, attempt: int) -> None:
        """The step has ended with ``attempt``, whoever may hold it still: that one's claim is gone, and a message of it
        or of an older one, sent late, can no longer be claimed."""
        self.issue(step, attempt + 1)

    def ack(self, step: str, attempt: int) -> None:
        """Control settled this outcome: the node may drop it from its spool."""
        self._link.do("SET", self._link.key("ack", step, str(attempt)), 1, "EX", KEY_TTL_S)

    def acked(self, attempts: Sequence[tuple[str, int]]) -> list[bool]:
        if not attempts:
            return []
        return [a is not None for a in self._link.do("MGET", *(self._link.key("ack", s, str(n)) for s, n in attempts))]


def _status(fields: Sequence[str | None], leased: bool) -> StepStatus | None:
    attempt, holder, node, done, cancel, percent, phase, eta_s = fields
    if attempt is None:
        return None
    return StepStatus(
        attempt=int(attempt),
        holder=holder,
        node=node,
        leased=leased,
        done=bool(done),
        cancel=bool(cancel),
        percent=float(percent) if percent else None,
        phase=phase or "",
        eta_s=float(eta_s) if eta_s else None,
    )
