"""Lua scripts: their texts, how Redis gets to know them, and the shortest way to run them.

A guarded script (one that needs ``epoch_guard``) holds the ``run_id`` of the Redis process it is loaded into. Why that
fails closed after a restart stands in epoch_guard.lua.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hiredis
import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from hdcs_tasks.errors import Unavailable

_FOLDER = Path(__file__).parent
_NEEDS = re.compile(r"^-- needs: (.+)$", re.MULTILINE)
_RUN_ID = "@RUN_ID@"
_OLDEST = 7
_CHUNK = 64  # calls sent at once: Redis works on them while the next are packed
_ROUNDS = 3  # tries to make a script known; more are needed only if Redis restarts in between each time

Value = str | int | float
pack_command: Callable[[tuple[Value, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]  # of one element
Call = tuple[Sequence[str], Sequence[Value]]  # keys, arguments


@cache
def _source(name: str) -> str:
    """A script with the libraries its ``-- needs:`` line names in front of it."""
    text = (_FOLDER / f"{name}.lua").read_text(encoding="utf-8")
    needs = _NEEDS.search(text)
    libraries = needs.group(1).split(", ") if needs else []
    return "\n".join([*((_FOLDER / f"{lib}.lua").read_text(encoding="utf-8") for lib in libraries), text])


def script_text(name: str, run_id: str) -> str:
    """The script as the Redis process with this ``run_id`` may know it."""
    return _source(name).replace(_RUN_ID, run_id)


@cache
def script_sha(name: str, run_id: str) -> str:
    return hashlib.sha1(script_text(name, run_id).encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """Runs scripts by their hash on connections of ``client``, several calls to a round trip.

    Leaner than redis-py's own ``execute_command`` (half of its time on a call is its own), with the same retries.
    Commands are packed by hiredis itself: redis-py looks at each argument in Python first, 4 µs of a call's 35.
    Connections are kept rather than asked of the client's pool for each call: that costs as much as packing, sending
    and reading together. A kept one that broke meanwhile is opened anew by the retry.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._pool: Any = client.connection_pool
        self._run_id = "none yet"
        self._kept: list[Any] = []  # idle connections; append and pop are atomic, so threads may share it
        self._pid = os.getpid()

    def run_one(self, name: str, keys: Sequence[str], args: Sequence[Value]) -> Any:
        """``run`` for one call; the shortest way to an answer that is no error."""
        command = ("EVALSHA", script_sha(name, self._run_id), len(keys), *keys, *args)
        answer = self._exchange((command,))[0]
        if isinstance(answer, NoScriptError):
            return self.run(name, ((keys, args),))[0]
        if isinstance(answer, ResponseError):
            raise answer
        return answer

    def run(self, name: str, calls: Sequence[Call]) -> list[Any]:
        """The answer of each call; raises the first error among them. Redis executes all it got, also after one."""
        errors: list[ResponseError] = []
        for _ in range(_ROUNDS):
            sha = script_sha(name, self._run_id)
            answers = self._exchange([("EVALSHA", sha, len(keys), *keys, *args) for keys, args in calls])
            errors = [answer for answer in answers if isinstance(answer, ResponseError)]
            if not errors:
                return answers
            if not any(isinstance(error, NoScriptError) for error in errors):
                break
            self._load(name)
        raise errors[0]

    def _exchange(self, commands: Sequence[tuple[Value, ...]]) -> list[Any]:
        if self._pid != os.getpid():  # forked since: the sockets are the parent's
            self._kept, self._pid = [], os.getpid()
        try:
            connection = self._kept.pop()
        except IndexError:
            connection = self._pool.get_connection()
        try:
            try:
                answers = _send_and_read(connection, commands)
            except (RedisConnectionError, RedisTimeoutError):
                connection.disconnect()
                answers = connection.retry.call_with_retry(
                    lambda: _send_and_read(connection, commands), lambda _error: connection.disconnect()
                )
        except BaseException:  # also a signal's, between question and answer: nobody else may read that answer
            connection.disconnect()
            self._pool.release(connection)
            raise
        self._kept.append(connection)
        return answers

    def _load(self, name: str) -> None:
        """Read the run_id and load the script that holds it, both over one connection that is not opened anew."""
        connection = self._pool.get_connection()
        try:
            facts = dict(line.split(":", 1) for line in _ask(connection, "INFO", "server").splitlines() if ":" in line)
            if int(facts["redis_version"].split(".")[0]) < _OLDEST:
                raise Unavailable(
                    f"Redis {facts['redis_version']} keeps scripts over a restart: a lost second would look like none",
                    next=f"Use Redis {_OLDEST} or newer",
                )
            _ask(connection, "SCRIPT", "LOAD", script_text(name, facts["run_id"]))
            self._run_id = facts["run_id"]
        finally:
            self._pool.release(connection)


def _send_and_read(connection: Any, commands: Sequence[tuple[Value, ...]]) -> list[Any]:
    if len(commands) == 1:
        connection.send_packed_command((pack_command(commands[0]),))
    else:
        for at in range(0, len(commands), _CHUNK):
            connection.send_packed_command((b"".join(map(pack_command, commands[at : at + _CHUNK])),))
    answers: list[Any] = []
    for _ in commands:
        try:
            answers.append(connection.read_response())
        except ResponseError as error:  # this call's alone: the answers of the others follow
            answers.append(error)
    return answers


def _ask(connection: Any, *command: str) -> str:
    """One command on this connection as it is: the health check could open another."""
    connection.send_command(*command, check_health=False)
    return str(connection.read_response())
