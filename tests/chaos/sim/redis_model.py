"""A Redis in one process, with a clock that is told: the commands HDCS uses, and its own Lua scripts in a real Lua.

Checked against a real Redis by tests/contract/test_redis_model.py. Commands run at once and whole, as in Redis; every
change is journalled for a second, so that a restart can lose the end of it, as an AOF written every second does.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hiredis
import redis
from lupa import lua51
from redis.exceptions import NoScriptError

LOST_AT_MOST_MS = 1000

Words = Sequence[Any]


def text_of(value: Any) -> str:
    """A value as Redis keeps it; whole numbers without a fraction, as Lua's conversion has it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.17g}"
    return str(value)


class RedisModel:
    """One Redis server: its keys, their ends, and what changed in the last second."""

    def __init__(self, now_ms: Callable[[], int], run_id: str = "first") -> None:
        self.now_ms = now_ms
        self.run_id = run_id
        self.keys: dict[str, Any] = {}
        self.ends: dict[str, int] = {}
        self._journal: deque[tuple[int, str, Any, int | None]] = deque()
        self._lua = _Scripts()

    # --- what happens to a server

    def restart(self, run_id: str, lost_ms: int = 0) -> int:
        """A new process; what was written in the last ``lost_ms`` is gone. Returns how many changes that were."""
        self.run_id = run_id
        since, undone = self.now_ms() - lost_ms, 0
        while self._journal and self._journal[-1][0] > since:
            _, key, value, end = self._journal.pop()
            self._put(key, value, end)
            undone += 1
        self._journal.clear()
        self._lua.known.clear()
        return undone

    def wipe(self) -> None:
        self.keys.clear()
        self.ends.clear()
        self._journal.clear()

    def copy_from(self, other: RedisModel) -> None:
        """Hold what ``other`` holds; values are copied."""
        self.wipe()
        self.run_id = other.run_id
        self.keys = {key: value if isinstance(value, str) else value.copy() for key, value in other.keys.items()}
        self.ends = dict(other.ends)
        self._lua.known = set(other._lua.known)

    def _put(self, key: str, value: Any, end: int | None) -> None:
        if value is None:
            self.keys.pop(key, None)
        else:
            self.keys[key] = value
        if value is None or end is None:
            self.ends.pop(key, None)
        else:
            self.ends[key] = end

    # --- commands

    def run(self, *words: Any) -> Any:
        """One command, answered as redis-py answers it (decoded text). Raises redis's exceptions."""
        name = str(words[0]).upper()
        if name == "EVALSHA":
            return self._lua.run_sha(self, str(words[1]), int(words[2]), words[3:])
        if name == "EVAL":
            return self._lua.run_text(self, str(words[1]), int(words[2]), words[3:])
        if name == "SCRIPT":
            return self._lua.load(str(words[2]))
        answer = self.command(name, [text_of(word) for word in words[1:]])
        if name == "HGETALL":
            return dict(zip(answer[::2], answer[1::2], strict=True))
        return answer

    def command(self, name: str, words: list[str]) -> Any:
        method = _COMMANDS.get(name)
        if method is None:
            raise redis.ResponseError(f"the model has no command {name}")
        return method(self, words)

    def _find(self, key: str) -> Any:
        end = self.ends.get(key)
        if end is not None and end <= self.now_ms():
            del self.ends[key]
            self.keys.pop(key, None)
        return self.keys.get(key)

    def _touch(self, key: str, make: Callable[[], Any] | None = None) -> Any:
        """The value that is about to be changed, journalled as it was; made where there is none."""
        value = self._find(key)
        now = self.now_ms()
        journal = self._journal
        while journal and journal[0][0] < now - LOST_AT_MOST_MS:
            journal.popleft()
        kept = value if value is None or isinstance(value, str) else value.copy()
        journal.append((now, key, kept, self.ends.get(key)))
        if value is None and make is not None:
            value = self.keys[key] = make()
        return value

    def _drop_if_empty(self, key: str) -> None:
        if not self.keys.get(key, "keep"):
            self.keys.pop(key, None)
            self.ends.pop(key, None)

    def scan(self, pattern: str) -> list[str]:
        plain = pattern.replace("\\", "")
        return [key for key in list(self.keys) if fnmatch.fnmatchcase(key, plain) and self._find(key) is not None]

    # --- strings and keys

    def _get(self, w: list[str]) -> Any:
        return self._find(w[0])

    def _mget(self, w: list[str]) -> Any:
        return [self._find(key) for key in w]

    def _set(self, w: list[str]) -> Any:
        options = [word.upper() for word in w[2:]]
        if "NX" in options and self._find(w[0]) is not None:
            return None
        self._touch(w[0])
        self.keys[w[0]] = w[1]
        self.ends.pop(w[0], None)
        for unit, factor in (("PX", 1), ("EX", 1000)):
            if unit in options:
                self.ends[w[0]] = self.now_ms() + int(w[3 + options.index(unit)]) * factor
        return "OK"

    def _del(self, w: list[str]) -> int:
        count = 0
        for key in w:
            if self._find(key) is not None:
                self._touch(key)
                self._put(key, None, None)
                count += 1
        return count

    def _exists(self, w: list[str]) -> int:
        return sum(self._find(key) is not None for key in w)

    def _incrby(self, w: list[str]) -> int:
        value = int(self._find(w[0]) or 0) + (int(w[1]) if len(w) > 1 else 1)
        self._touch(w[0])
        self.keys[w[0]] = str(value)
        return value

    def _decrby(self, w: list[str]) -> int:
        return self._incrby([w[0], str(-int(w[1]))])

    def _pexpire(self, w: list[str], factor: int = 1) -> int:
        if self._find(w[0]) is None:
            return 0
        self._touch(w[0])
        self.ends[w[0]] = self.now_ms() + int(w[1]) * factor
        return 1

    def _expire(self, w: list[str]) -> int:
        return self._pexpire(w, 1000)

    def _time(self, w: list[str]) -> list[str]:
        now = self.now_ms()
        return [str(now // 1000), str(now % 1000 * 1000)]

    def _info(self, w: list[str]) -> str:
        return f"# Server\r\nredis_version:7.0.15\r\nrun_id:{self.run_id}\r\n"

    # --- hashes

    def _hget(self, w: list[str]) -> Any:
        return (self._find(w[0]) or {}).get(w[1])

    def _hmget(self, w: list[str]) -> Any:
        found = self._find(w[0]) or {}
        return [found.get(field) for field in w[1:]]

    def _hset(self, w: list[str]) -> int:
        found = self._touch(w[0], dict)
        before = len(found)
        found.update(zip(w[1::2], w[2::2], strict=True))
        return len(found) - before

    def _hsetnx(self, w: list[str]) -> int:
        return 0 if w[1] in (self._find(w[0]) or {}) else self._hset(w)

    def _hdel(self, w: list[str]) -> int:
        if self._find(w[0]) is None:
            return 0
        found = self._touch(w[0])
        count = sum(found.pop(field, None) is not None for field in w[1:])
        self._drop_if_empty(w[0])
        return count

    def _hexists(self, w: list[str]) -> int:
        return int(w[1] in (self._find(w[0]) or {}))

    def _hlen(self, w: list[str]) -> int:
        return len(self._find(w[0]) or {})

    def _hvals(self, w: list[str]) -> list[str]:
        return list((self._find(w[0]) or {}).values())

    def _hgetall(self, w: list[str]) -> list[str]:
        return [part for pair in (self._find(w[0]) or {}).items() for part in pair]

    # --- sorted sets, as dicts of scores

    def _zadd(self, w: list[str]) -> int:
        rest = w[1:]
        only_new = rest[0].upper() == "NX"
        if only_new:
            rest = rest[1:]
        found = self._touch(w[0], dict)
        before = len(found)
        for score, member in zip(rest[::2], rest[1::2], strict=True):
            if not (only_new and member in found):
                found[member] = float(score)
        return len(found) - before

    def _range(self, key: str, low: str, high: str) -> list[tuple[float, str]]:
        first, last = float(low), float(high)
        return sorted((s, m) for m, s in (self._find(key) or {}).items() if first <= s <= last)

    def _limited(self, rows: list[tuple[float, str]], options: list[str]) -> list[str]:
        upper = [option.upper() for option in options]
        if "LIMIT" in upper:
            at = upper.index("LIMIT")
            start, count = int(options[at + 1]), int(options[at + 2])
            rows = rows[start:] if count < 0 else rows[start : start + count]
        if "WITHSCORES" in upper:
            return [part for score, member in rows for part in (member, text_of(score))]
        return [member for _, member in rows]

    def _zrangebyscore(self, w: list[str]) -> list[str]:
        return self._limited(self._range(w[0], w[1], w[2]), w[3:])

    def _zrevrangebyscore(self, w: list[str]) -> list[str]:
        return self._limited(self._range(w[0], w[2], w[1])[::-1], w[3:])

    def _zrange(self, w: list[str]) -> list[str]:
        rows = [member for _, member in self._range(w[0], "-inf", "+inf")]
        last = int(w[2])
        return rows[int(w[1]) :] if last == -1 else rows[int(w[1]) : last + 1]

    def _zremrangebyscore(self, w: list[str]) -> int:
        return self._zrem([w[0], *(member for _, member in self._range(w[0], w[1], w[2]))])

    def _zrem(self, w: list[str]) -> int:
        return self._hdel(w)

    def _zscore(self, w: list[str]) -> str | None:
        score = (self._find(w[0]) or {}).get(w[1])
        return None if score is None else f"{score:.17g}"

    def _zcount(self, w: list[str]) -> int:
        return len(self._range(w[0], w[1], w[2]))

    # --- sets and lists

    def _sadd(self, w: list[str]) -> int:
        found = self._touch(w[0], dict)
        before = len(found)
        found.update(dict.fromkeys(w[1:], ""))
        return len(found) - before

    def _srem(self, w: list[str]) -> int:
        return self._hdel(w)

    def _smembers(self, w: list[str]) -> list[str]:
        return list(self._find(w[0]) or {})

    def _rpush(self, w: list[str]) -> int:
        found = self._touch(w[0], list)
        found.extend(w[1:])
        return len(found)

    def _lpop(self, w: list[str]) -> Any:
        if self._find(w[0]) is None:
            return None
        answer = self._touch(w[0]).pop(0)
        self._drop_if_empty(w[0])
        return answer

    def _lrem(self, w: list[str]) -> int:
        """Of all that are equal: ``count`` 0 is all its callers ask for."""
        assert w[1] == "0"
        found = self._find(w[0]) or []
        kept = [value for value in found if value != w[2]]
        gone = len(found) - len(kept)
        if gone:
            self._touch(w[0])[:] = kept
            self._drop_if_empty(w[0])
        return gone

    def _llen(self, w: list[str]) -> int:
        return len(self._find(w[0]) or [])


_M = RedisModel
_COMMANDS: dict[str, Callable[[RedisModel, list[str]], Any]] = {
    "GET": _M._get, "MGET": _M._mget, "SET": _M._set, "DEL": _M._del, "UNLINK": _M._del, "EXISTS": _M._exists,
    "INCR": _M._incrby, "INCRBY": _M._incrby, "DECRBY": _M._decrby, "EXPIRE": _M._expire, "PEXPIRE": _M._pexpire,
    "TIME": _M._time, "INFO": _M._info, "HGET": _M._hget, "HMGET": _M._hmget, "HSET": _M._hset,
    "HSETNX": _M._hsetnx, "HDEL": _M._hdel, "HEXISTS": _M._hexists, "HLEN": _M._hlen, "HVALS": _M._hvals,
    "HGETALL": _M._hgetall, "ZADD": _M._zadd, "ZREM": _M._zrem, "ZCARD": _M._hlen, "ZCOUNT": _M._zcount,
    "ZSCORE": _M._zscore,
    "ZRANGE": _M._zrange, "ZRANGEBYSCORE": _M._zrangebyscore, "ZREVRANGEBYSCORE": _M._zrevrangebyscore,
    "ZREMRANGEBYSCORE": _M._zremrangebyscore, "SADD": _M._sadd, "SCARD": _M._hlen, "SREM": _M._srem,
    "SMEMBERS": _M._smembers,
    "RPUSH": _M._rpush, "LPOP": _M._lpop, "LLEN": _M._llen, "LREM": _M._lrem,
}  # fmt: skip


class _Scripts:
    """The Lua side: scripts compiled once for the whole process, known to a server once it was told them."""

    _runtime: Any = None
    _compiled: dict[str, Any] = {}
    _server: RedisModel

    def __init__(self) -> None:
        self.known: set[str] = set()

    def load(self, text: str) -> str:
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        if sha not in _Scripts._compiled:
            lua = self._lua()
            _Scripts._compiled[sha] = lua.eval(f"function(KEYS, ARGV)\n{text}\nend")
        self.known.add(sha)
        return sha

    def run_text(self, server: RedisModel, text: str, key_count: int, words: Words) -> Any:
        return self._run(server, self.load(text), key_count, words)

    def run_sha(self, server: RedisModel, sha: str, key_count: int, words: Words) -> Any:
        if sha not in self.known:
            raise NoScriptError("NOSCRIPT No matching script. Please use EVAL.")
        return self._run(server, sha, key_count, words)

    def _run(self, server: RedisModel, sha: str, key_count: int, words: Words) -> Any:
        lua = self._lua()
        texts = [text_of(word) for word in words]
        _Scripts._server = server
        keys, arguments = lua.table_from(texts[:key_count]), lua.table_from(texts[key_count:])
        return _answer(_Scripts._compiled[sha](keys, arguments))

    @classmethod
    def _lua(cls) -> Any:
        if cls._runtime is None:
            cls._runtime = lua51.LuaRuntime()
            api = cls._runtime.table_from({"call": cls._call})
            cls._runtime.globals()["redis"] = api
            cls._runtime.execute("function redis.error_reply(text) return {err = text} end")
        return cls._runtime

    @classmethod
    def _call(cls, name: str, *words: Any) -> Any:
        """``redis.call``: nil is false in Lua, a list a table."""
        answer = cls._server.command(name, [text_of(word) for word in words])
        if answer is None:
            return False
        if isinstance(answer, list):
            return cls._runtime.table_from([False if part is None else part for part in answer])
        return answer


def _answer(value: Any) -> Any:
    """What a script returned, as redis-py gives it: a table ends at its first nil, numbers lose their fraction."""
    if value is None or value is False:
        return None
    if value is True:
        return 1
    if isinstance(value, float):
        return int(value)
    if lua51.lua_type(value) == "table":
        if value["err"] is not None:
            raise redis.ResponseError(value["err"])
        found, at = [], 1
        while (part := value[at]) is not None:
            found.append(_answer(part))
            at += 1
        return found
    return value


class ModelClient:
    """What ``Reservations`` asks of a client. ``gate`` is asked before each round trip and may raise or wait."""

    def __init__(self, server: RedisModel, gate: Callable[[Words], bool] | None = None) -> None:
        """``gate(words)``: True to have the commands run twice, as a client does whose first answer was lost."""
        self.server = server
        self.gate = gate

    @property
    def connection_pool(self) -> ModelClient:
        return self  # no attribute: a circle would keep every client until the next collection

    def get_connection_kwargs(self) -> dict[str, Any]:
        return {"decode_responses": True}

    def get_connection(self) -> ModelConnection:
        return ModelConnection(self)

    def release(self, connection: ModelConnection) -> None:
        return None

    def asked(self, words: Words) -> bool:
        return self.gate is not None and self.gate(words)

    def execute_command(self, *words: Any) -> Any:
        if self.asked(words):
            self.server.run(*words)
        answer = self.server.run(*words)
        if words[0] == "INFO":
            return dict(line.split(":", 1) for line in answer.splitlines() if ":" in line)
        return answer

    def pipeline(self, transaction: bool = True) -> _Pipeline:
        return _Pipeline(self)

    def scan_iter(self, pattern: str, count: int = 0) -> Iterator[str]:
        return iter(self.server.scan(pattern))

    def through(self, commands: list[Words], raise_on_error: bool, watched: tuple[str, Any] | None = None) -> list[Any]:
        """One round trip of many commands; none of them where a watched key has changed."""
        if commands:
            self.asked(commands[0])
        if watched is not None and self.server.run("GET", watched[0]) != watched[1]:
            raise redis.WatchError("Watched variable changed.")
        answers: list[Any] = []
        for words in commands:
            try:
                answers.append(self.server.run(*words))
            except redis.RedisError as error:
                if raise_on_error:
                    raise
                answers.append(error)
        return answers


class _ClosedError(redis.ConnectionError):
    """The process this connection was opened to is gone."""


class ModelConnection:
    """A connection as ``reservations.scripts`` uses one. It ends with the server's process."""

    def __init__(self, client: ModelClient) -> None:
        self._client = client
        self._answers: deque[Any] = deque()
        self._run_id: str | None = None

    @property
    def retry(self) -> ModelConnection:
        return self

    def call_with_retry(self, do: Callable[[], Any], fail: Callable[[Exception], Any]) -> Any:
        try:
            return do()
        except _ClosedError as error:  # it was kept from before the restart: a client opens it anew
            fail(error)
            return do()

    def disconnect(self) -> None:
        self._answers.clear()
        self._run_id = None

    def send_packed_command(self, packed: Sequence[bytes]) -> None:
        reader = hiredis.Reader(encoding="utf-8")
        for part in packed:
            reader.feed(part)
        commands: list[Words] = []
        while (words := reader.gets()) is not False:
            commands.append(tuple(words))
        self._send(commands)

    def _send(self, commands: Sequence[Words]) -> None:
        twice = self._client.asked(commands[0])
        server = self._client.server
        if self._run_id not in (None, server.run_id):
            raise _ClosedError("the server closed the connection")
        self._run_id = server.run_id
        for _ in range(2 if twice else 1):
            self._answers.clear()
            for words in commands:
                try:
                    self._answers.append(server.run(*words))
                except redis.RedisError as error:
                    self._answers.append(error.with_traceback(None))

    def send_command(self, *words: Any, check_health: bool = True) -> None:
        self._send([words])

    def read_response(self) -> Any:
        answer = self._answers.popleft()
        if not isinstance(answer, Exception):
            return answer
        try:
            raise answer
        finally:
            del answer  # an error whose traceback holds it is freed by the collector only


class _Pipeline:
    def __init__(self, client: ModelClient) -> None:
        self._client = client
        self._commands: list[Words] = []
        self._watched: tuple[str, Any] | None = None

    def watch(self, key: str) -> None:
        self._watched = (key, self._client.execute_command("GET", key))

    def get(self, key: str) -> Any:
        return self._client.execute_command("GET", key)

    def multi(self) -> None:
        return None

    def reset(self) -> None:
        self._commands, self._watched = [], None

    def __len__(self) -> int:
        return len(self._commands)

    def execute_command(self, *words: Any) -> None:
        self._commands.append(words)

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands, watched = self._commands, self._watched
        self.reset()
        return self._client.through(commands, raise_on_error, watched)
