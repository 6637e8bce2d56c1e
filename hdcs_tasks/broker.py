"""Redis as the broker: kombu's transport, with one answer mended.

A channel outlives its connection: an acknowledgement may wait in the worker's loop, or a message be given back while
the channel closes. Asked for its address then, kombu 5.7 fails with AttributeError, which nobody expects there and
which ends the whole worker. It is a lost connection and said to be one: whoever asks knows what to do with that.
"""

from __future__ import annotations

from typing import Any

import redis
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis


class Channel(kombu_redis.Channel):
    """A channel that is closed says so."""

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None or self.connection.client is None:
            raise redis.exceptions.ConnectionError("the connection of this channel is closed")
        found: dict[str, Any] = super()._connparams(asynchronous=asynchronous)  # type: ignore[misc]  # not in the stubs
        return found


class Transport(kombu_redis.Transport):
    """What ``redis://`` and ``rediss://`` stand for in every process that uses the Celery app."""

    Channel = Channel


def register() -> None:
    """From now on kombu takes this transport for a Redis address."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:Transport"))
