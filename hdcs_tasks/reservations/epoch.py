"""Whether the reservations in Redis can be trusted: the epoch."""

from __future__ import annotations

from hdcs_tasks.clock import random_hex
from hdcs_tasks.reservations.link import Link


class Epoch:
    """Redis's ``run_id`` at the last rebuild.

    It changes with every start of Redis (a lost AOF second does not look like a loss), and the key is gone when Redis
    was emptied; either way allocating scripts fail closed with RebuildPending."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._key = link.key("epoch", "run_id")

    def run_id(self) -> str:
        """The id of the Redis process that answers now."""
        return str(self._link.do("INFO", "server")["run_id"])

    def current(self) -> str | None:
        """The run_id the reservations were last rebuilt for; None: never, or emptied."""
        epoch: str | None = self._link.do("GET", self._key)
        return epoch

    def is_open(self) -> bool:
        return self.current() == self.run_id()

    def open(self, run_id: str | None = None) -> None:
        """Let allocation begin: the reservations in Redis are complete.

        Pass the ``run_id`` read *before* the rebuild wrote anything; if Redis restarted since, allocation stays closed.
        """
        self._link.do("SET", self._key, run_id or self.run_id())

    def close(self) -> str:
        """Stop allocation, to read record and world for a rebuild while nothing new is given out. The answer is the
        text that now stands for the epoch: only who holds it ends the rebuild."""
        token = f"closed:{random_hex(8)}"
        self._link.do("SET", self._key, token)
        return token

    def take_rebuild(self, run_id: str) -> str | None:
        """``close``, unless the reservations are open already (None): of two that rebuild, the later one does it."""
        token = random_hex(8)
        return f"closed:{token}" if self._link.call("epoch_take", [self._key], run_id, token) else None
