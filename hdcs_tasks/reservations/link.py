"""The one way to Redis: keys, Lua scripts, and Redis's errors as ours."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

from hdcs_tasks.errors import Invalid, RebuildPending, Unavailable, Unreachable

_FOLDER = Path(__file__).parent
_NEEDS = re.compile(r"^-- needs: (.+)$", re.MULTILINE)
_CLOSED = "HDCSCLOSED"
_TOKEN = re.compile(r"[^\s,;|]{1,200}")

Value = str | int | float
Call = tuple[Sequence[str], Sequence[Value]]  # keys, arguments


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
    """``text`` if it may stand in a key or a packed value: 1 to 200 characters, no blank, ``,``, ``;`` or ``|``."""
    if not _TOKEN.fullmatch(text):
        raise Invalid(f"{text!r} cannot name a {kind}", next="Use 1 to 200 characters, none of them blank , ; |")
    return text


@cache
def script_text(name: str) -> str:
    """A script with the libraries its ``-- needs:`` line names in front of it."""
    text = (_FOLDER / f"{name}.lua").read_text(encoding="utf-8")
    needs = _NEEDS.search(text)
    libraries = needs.group(1).split(", ") if needs else []
    return "\n".join([*((_FOLDER / f"{lib}.lua").read_text(encoding="utf-8") for lib in libraries), text])


@cache
def script_sha(name: str) -> str:
    return hashlib.sha1(script_text(name).encode(), usedforsecurity=False).hexdigest()


@contextmanager
def redis_errors() -> Iterator[None]:
    """Redis's exceptions as ours; the only place that knows both."""
    try:
        yield
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as e:
        raise Unreachable(
            f"Redis does not answer: {e}",
            next="Check HDCS_REDIS_URL and that the Redis server runs; asking again is safe",
        ) from e
    except redis.exceptions.ReadOnlyError as e:
        raise Unreachable(
            f"Redis takes no writes here: {e}", next="HDCS_REDIS_URL must name the primary, not a replica"
        ) from e
    except redis.exceptions.OutOfMemoryError as e:
        raise Unavailable(f"Redis is out of memory: {e}", next="Raise its maxmemory; asking again is safe") from e
    except redis.exceptions.ResponseError as e:
        if _CLOSED in str(e):
            raise RebuildPending(
                "reservations are closed: Redis restarted or was emptied since they were last rebuilt",
                next="The control plane rebuilds them from record and world; asking again is safe",
            ) from e
        raise


class Link:
    """A client and the prefix of every key."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        if not client.get_connection_kwargs().get("decode_responses"):
            raise Invalid("a Redis client without decode_responses", next="Use Reservations.from_settings")
        self.client = client
        self._raw: Any = client  # redis-py leaves execute_command untyped
        self.prefix = prefix

    def key(self, *parts: str) -> str:
        return self.prefix + ":".join(parts)

    def do(self, *command: Value) -> Any:
        """One plain command."""
        with redis_errors():
            return self._raw.execute_command(*command)

    def call(self, name: str, keys: Sequence[str], *args: Value) -> Any:
        """Run a script by its hash; where Redis does not know it yet, by its text."""
        with redis_errors():
            try:
                return self._raw.execute_command("EVALSHA", script_sha(name), len(keys), *keys, *args)
            except NoScriptError:
                return self._raw.execute_command("EVAL", script_text(name), len(keys), *keys, *args)

    def call_many(self, name: str, calls: Iterable[Call], batch: int = 500) -> list[Any]:
        """Run a script many times, ``batch`` calls to a round trip."""
        answers: list[Any] = []
        waiting = list(calls)
        for at in range(0, len(waiting), batch):
            answers += self._batch(name, waiting[at : at + batch])
        return answers

    def _batch(self, name: str, calls: Sequence[Call]) -> list[Any]:
        with redis_errors():
            for _ in range(3):
                pipe = self._raw.pipeline(transaction=False)
                for keys, args in calls:
                    pipe.execute_command("EVALSHA", script_sha(name), len(keys), *keys, *args)
                answers = pipe.execute(raise_on_error=False)
                if not any(isinstance(a, NoScriptError) for a in answers):
                    break
                self._raw.execute_command("SCRIPT", "LOAD", script_text(name))
            for answer in answers:
                if isinstance(answer, redis.exceptions.RedisError):
                    raise answer
            return list(answers)

    def commands(self, commands: Iterable[Sequence[Value]]) -> list[Any]:
        """Many plain commands, pipelined."""
        with redis_errors():
            pipe = self._raw.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            return list(pipe.execute()) if len(pipe) else []

    def transaction(self, commands: Iterable[Sequence[Value]]) -> None:
        """Many plain commands, all or none."""
        with redis_errors():
            pipe = self._raw.pipeline(transaction=True)
            for command in commands:
                pipe.execute_command(*command)
            pipe.execute()

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
