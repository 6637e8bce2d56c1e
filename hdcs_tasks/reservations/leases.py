"""Timed ownership: a server node's liveness, a sweep's slot."""

from __future__ import annotations

from collections.abc import Sequence

from hdcs_tasks.reservations.link import Link, check_token


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


class Leases:
    """Leases by (kind, name). A lease ends by itself ``ttl_s`` after it was last granted or renewed."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def _key(self, kind: str, name: str) -> str:
        return self._link.key("lease", kind, check_token("lease", name))

    def grant(self, kind: str, name: str, holder: str, ttl_s: float) -> bool:
        """False when another living holder has it; the same holder is granted it again."""
        return bool(self._link.call("lease_grant", [self._key(kind, name)], check_token("holder", holder), _ms(ttl_s)))

    def renew(self, kind: str, name: str, holder: str, ttl_s: float) -> bool:
        """False when it is no longer the holder's: it ended, or another has it."""
        return bool(self._link.call("lease_renew", [self._key(kind, name)], holder, _ms(ttl_s)))

    def drop(self, kind: str, name: str, holder: str) -> bool:
        """Give it up early. False when it was not the holder's."""
        return bool(self._link.call("lease_drop", [self._key(kind, name)], holder))

    def holder(self, kind: str, name: str) -> str | None:
        holder: str | None = self._link.do("GET", self._key(kind, name))
        return holder

    def holders(self, kind: str, names: Sequence[str]) -> dict[str, str | None]:
        """The living holder of each name, in one round trip."""
        if not names:
            return {}
        return dict(zip(names, self._link.do("MGET", *(self._key(kind, n) for n in names)), strict=True))
