"""The lab's own Redis, inside the hub: AOF once a second, no eviction, a password, its own port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

from deploy.lab.space import Space, start_time, wait_until
from hdcs_tasks.errors import NotFound

PORT = 6390


class PrivateRedis:
    """``folder`` holds configuration, data, log and pid file. It listens on ``ip`` inside the hub only."""

    def __init__(self, ip: str, folder: Path) -> None:
        self.ip = ip
        self.folder = folder
        self.password = ""

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{self.ip}:{PORT}/0"

    def write_files(self) -> None:
        conf = self.folder / "redis.conf"
        conf.touch(mode=0o600)
        conf.write_text(
            f"bind {self.ip} 127.0.0.1\n"
            f"port {PORT}\n"
            f"requirepass {self.password}\n"
            f"dir {self.folder}\n"
            "appendonly yes\n"
            "appendfsync everysec\n"
            'save ""\n'
            "maxmemory 512mb\n"
            "maxmemory-policy noeviction\n"
            "daemonize no\n"
        )

    def start(self, hub: Space, wait: bool = True) -> None:
        """Start it with the data it has; after ``wait`` it answers."""
        pid = hub.spawn(["redis-server", str(self.folder / "redis.conf")], {}, self.folder / "redis.log")
        (self.folder / "pid").write_text(f"{pid} {start_time(pid)}\n")
        if wait:
            self.wait()

    def wait(self, timeout_s: float = 10) -> None:
        wait_until(self.answers, timeout_s, "Redis does not answer", self._tail)

    @property
    def pid(self) -> int:
        """Its host pid; NotFound when it is not running."""
        with contextlib.suppress(OSError, ValueError):
            pid, started = (int(word) for word in (self.folder / "pid").read_text().split())
            if start_time(pid) == started:
                return pid
        raise NotFound("the lab's Redis is not running", next="Start it with Lab.redis.start(lab.hub)")

    def kill(self, number: signal.Signals = signal.SIGKILL, wipe: bool = False) -> None:
        """End it (SIGKILL: up to a second of writes is lost); ``wipe`` throws its data away too."""
        pid, started = self.pid, start_time(self.pid)
        os.kill(pid, number)
        wait_until(lambda: start_time(pid) != started, 10, "Redis does not end", self._tail)
        if wipe:
            for file in (self.folder / "appendonlydir").glob("*"):
                file.unlink()

    def answers(self) -> bool:
        """Whether it answers PONG to this machine."""
        with contextlib.suppress(OSError), socket.create_connection((self.ip, PORT), timeout=1) as link:
            link.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
            reply = b""
            while reply.count(b"\r\n") < 2 and (chunk := link.recv(256)):
                reply += chunk
            return reply == b"+OK\r\n+PONG\r\n"
        return False

    def _tail(self) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / "redis.log").read_text()[-800:]
        return ""
