"""Whether the reservations in Redis can be trusted: the epoch."""

from __future__ import annotations

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

    def close(self) -> None:
        """Stop allocation, to read record and world for a rebuild while nothing new is given out."""
        self._link.do("DEL", self._key)
