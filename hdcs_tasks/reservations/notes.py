"""Notes: small hashes that end by themselves. For what may be lost: reports of a rebuild, console tickets, samples."""

from __future__ import annotations

from hdcs_tasks.reservations.link import Link


class Notes:
    """Named hashes of text, each with a time to live."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def write(self, name: str, field: str, value: str, ttl_s: float) -> None:
        """Set one field; the whole note lives ``ttl_s`` seconds from now."""
        key = self._link.key("note", name)
        self._link.transaction([("HSET", key, field, value), ("PEXPIRE", key, round(ttl_s * 1000))])

    def read(self, name: str) -> dict[str, str]:
        """Every field of the note; empty when there is none."""
        return self._link.pairs(self._link.do("HGETALL", self._link.key("note", name)))

    def drop(self, name: str) -> None:
        self._link.do("UNLINK", self._link.key("note", name))
