"""The one way to Redis: keys, Lua scripts, and Redis's errors as ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from hdcs_tasks.errors import Invalid, RebuildPending, Unavailable, Unreachable
from hdcs_tasks.reservations.scripts import Call, Scripts, Value

_CLOSED = "HDCSCLOSED"
_TOKEN = re.compile(r"[^\s,;|:][^\s,;|]{0,199}")


def connect(url: str) -> redis.Redis:
    """A client as every process of HDCS uses it: text answers, time-outs, a bounded number of reconnects."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=10,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=10,
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), 4),
    )


def check_token(kind: str, text: str) -> str:
    """``text`` if it may stand in a key or a packed value: 1 to 200 characters, no blank, ``,``, ``;`` or ``|``,
    the first no ``:`` (fields of a hash that begin with it are not names)."""
    if not _TOKEN.fullmatch(text):
        raise Invalid(
            f"{text!r} cannot name a {kind}",
            next="Use 1 to 200 characters, none of them blank , ; | and the first no :",
        )
    return text


class redis_errors:
    """Redis's exceptions as ours; the only place that knows both."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            _translate(error)


def _translate(e: BaseException) -> None:
    """Raise what ``e`` means to our callers; return where it is not Redis's."""
    if isinstance(e, redis.exceptions.ConnectionError | redis.exceptions.TimeoutError):
        raise Unreachable(
            f"Redis does not answer: {e}",
            next="Check HDCS_REDIS_URL and that the Redis server runs; asking again is safe",
        ) from e
    if isinstance(e, redis.exceptions.ReadOnlyError):
        raise Unreachable(
            f"Redis takes no writes here: {e}", next="HDCS_REDIS_URL must name the primary, not a replica"
        ) from e
    if isinstance(e, redis.exceptions.OutOfMemoryError):
        raise Unavailable(f"Redis is out of memory: {e}", next="Raise its maxmemory; asking again is safe") from e
    if isinstance(e, redis.exceptions.ResponseError) and _CLOSED in str(e):
        raise RebuildPending(
            "reservations are closed: Redis restarted or was emptied since they were last rebuilt",
            next="The control plane rebuilds them from record and world; asking again is safe",
        ) from e


class Link:
    """A client and the prefix of every key."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        if not client.get_connection_kwargs().get("decode_responses"):
            raise Invalid("a Redis client without decode_responses", next="Use Reservations.from_settings")
        self.client = client
        self._raw: Any = client  # redis-py leaves execute_command untyped
        self._scripts = Scripts(client)
        self.prefix = prefix

    def key(self, *parts: str) -> str:
        return self.prefix + ":".join(parts)

    def do(self, *command: Value) -> Any:
        """One plain command."""
        with redis_errors():
            return self._raw.execute_command(*command)

    def call(self, name: str, keys: Sequence[str], *args: Value) -> Any:
        """Run a script once."""
        try:  # what redis_errors does, without its two calls
            return self._scripts.run_one(name, keys, args)
        except Exception as error:
            _translate(error)
            raise

    def call_many(self, name: str, calls: Iterable[Call], batch: int = 500) -> list[Any]:
        """Run a script many times, ``batch`` calls to a round trip."""
        answers: list[Any] = []
        waiting = list(calls)
        for at in range(0, len(waiting), batch):
            with redis_errors():
                answers += self._scripts.run(name, waiting[at : at + batch])
        return answers

    def commands(self, commands: Iterable[Sequence[Value]]) -> list[Any]:
        """Many plain commands, pipelined."""
        with redis_errors():
            pipe = self._raw.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            return list(pipe.execute()) if len(pipe) else []

    def transaction(self, commands: Iterable[Sequence[Value]], *, while_: tuple[str, str] | None = None) -> bool:
        """Many plain commands, all or none; with ``while_`` only if that key holds that text. False: it does not."""
        with redis_errors():
            pipe = self._raw.pipeline(transaction=True)
            if while_ is not None:
                pipe.watch(while_[0])
                if pipe.get(while_[0]) != while_[1]:
                    pipe.reset()
                    return False
                pipe.multi()
            for command in commands:
                pipe.execute_command(*command)
            try:
                pipe.execute()
            except redis.WatchError:
                return False
            return True

    def scan(self, pattern: str) -> list[str]:
        """Every key below the prefix that fits the pattern."""
        escaped = "".join(f"\\{c}" if c in "*?[]\\" else c for c in self.prefix)
        with redis_errors():
            return list(self._raw.scan_iter(escaped + pattern, count=1000))

    def pairs(self, answer: Any) -> dict[str, str]:
        """What HGETALL answered, under either protocol version."""
        if isinstance(answer, dict):
            return answer
        return dict(zip(answer[::2], answer[1::2], strict=True))

    def owners(self, key: str) -> dict[str, str]:
        """Name -> what it owns, of a hash that keeps facts of its own too: in fields that begin with a colon."""
        pairs = self.pairs(self.do("HGETALL", key))
        return {name: value for name, value in pairs.items() if name[:1] != ":"}
