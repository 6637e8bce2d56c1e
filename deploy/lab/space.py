"""One machine of the lab: network, mount, uts, ipc and pid namespaces below a PID 1 that reaps.

Nothing here has a name in the kernel: namespaces, mounts and links live exactly as long as the space's processes, so
the end of its PID 1 is the end of all of it. Processes are found again by a mark in their environment, never by name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from hdcs_tasks.errors import HdcsError, NotFound

MARK = "HDCS_LAB_MARK"  # environment variable every process of a lab carries: the lab's folder
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")


class Space:
    """A machine of namespaces. ``folder`` holds its scripts, logs and the pid file of its PID 1 (host pid)."""

    def __init__(self, name: str, folder: Path, mark: str) -> None:
        self.name = name
        self.folder = folder
        self.mark = mark
        self._children: list[subprocess.Popen[bytes]] = []
        self._boot: subprocess.Popen[bytes] | None = None

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    def unshare(self, script: Path, env: Mapping[str, str] | None = None) -> None:
        """Make the namespaces; ``script`` (sh, PID 1) waits for a line on stdin, sets itself up and execs its PID 1."""
        argv = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        with (self.folder / "boot.log").open("ab") as log:
            self._boot = subprocess.Popen(
                [*argv, "sh", str(script)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env=self._env({"NODE": self.name} | dict(env or {})),
            )  # fmt: skip
        parent = self._boot.pid
        self._children.append(self._boot)
        wait_until(lambda: _children(parent), 5, f"{self.name}: no process in the new namespaces", self.tail)
        pid = _children(parent)[0]
        self._pid_file.write_text(f"{pid} {start_time(pid)}\n")

    def go(self) -> None:
        """Let the script of ``unshare`` run on: its network links are in place."""
        boot = self._boot
        assert boot is not None
        assert boot.stdin is not None
        boot.stdin.write(b"go\n")
        boot.stdin.close()

    @property
    def pid(self) -> int:
        """Host pid of the space's PID 1; NotFound when it is off."""
        with contextlib.suppress(OSError, ValueError):
            pid, started = (int(word) for word in self._pid_file.read_text().split())
            if start_time(pid) == started:
                return pid
        raise NotFound(f"{self.name} is off", next="Start it with: python -m deploy.lab power-on " + self.name)

    @property
    def on(self) -> bool:
        try:
            return bool(self.pid)
        except NotFound:
            return False

    def enter(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` inside this space."""
        return ["nsenter", "-t", str(self.pid), "--net", "--mount", "--uts", "--ipc", "--pid", "--", *argv]

    def run(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a short command inside and give back its output as text; HdcsError if it fails and ``check`` is set."""
        done = subprocess.run(
            self.enter(argv), env=self._env(env or {}), capture_output=True, text=True, timeout=timeout_s,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise HdcsError(f"{self.name}: {' '.join(argv)} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
        return done

    def spawn(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> int:
        """Start a long-lived process inside; its output goes to ``log``. Returns its host pid (not nsenter's)."""
        with log.open("ab") as out:
            entered = subprocess.Popen(
                self.enter(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env=self._env(env),
            )  # fmt: skip
        self._children.append(entered)
        wait_until(
            lambda: _children(entered.pid) or entered.poll() is not None, 5, f"{argv[0]} did not start", self.tail
        )
        inside = _children(entered.pid)
        if not inside:
            raise HdcsError(f"{self.name}: {argv[0]} ended at once with {entered.wait()}", next=f"Read {log}")
        return inside[0]

    def processes(self) -> list[tuple[int, str]]:
        """Host pid and command line of every process inside, PID 1 first."""
        try:
            first = self.pid
        except NotFound:
            return []
        wanted = _namespace(first)
        return [(pid, command_line(pid)) for pid in pids() if _namespace(pid) == wanted]

    def power_off(self) -> None:
        """Kill PID 1 as a power cut would: the kernel ends all others inside and drops links and mounts."""
        with contextlib.suppress(NotFound, ProcessLookupError):
            pid = self.pid
            helpers = self._helpers()
            os.kill(pid, signal.SIGKILL)
            _signal(helpers, signal.SIGCONT)  # a stopped helper would not reap its process, and PID 1 waits for that
            wait_until(lambda: not _stat(pid), 10, f"{self.name} does not end", self.tail)
        self._pid_file.unlink(missing_ok=True)
        self.reap()

    def freeze(self) -> None:
        """SIGSTOP everything inside but PID 1: the machine hangs, its links stay up."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)
        _signal(self._helpers(), signal.SIGCONT)  # nsenter stops itself with the process it waits for

    def _helpers(self) -> set[int]:
        """The nsenter processes outside that wait for a process inside."""
        inside = {pid for pid, _ in self.processes()}
        parents = {int(stat[1]) for pid in inside if (stat := _stat(pid))}
        return (parents - inside) & set(marked(self.mark))

    def _signal_all(self, number: signal.Signals) -> None:
        _signal({pid for pid, _ in self.processes()} - {self.pid}, number)

    def reap(self, timeout_s: float = 5) -> None:
        """Collect the ended helpers this object started (unshare, nsenter)."""
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout_s)
        self._children = [c for c in self._children if c.poll() is None]

    def tail(self) -> str:
        """The last lines the space wrote while it came up, for error messages."""
        with contextlib.suppress(OSError):
            return (self.folder / "boot.log").read_text(errors="replace")[-800:]
        return ""

    def _env(self, env: Mapping[str, str]) -> dict[str, str]:
        return marked_env(self.mark, env)


def marked_env(mark: str, env: Mapping[str, str]) -> dict[str, str]:
    """A plain environment for a process of the lab, with the mark it is found again by."""
    base = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": os.environ.get("HOME", "/root"),
        "LANG": "C.UTF-8",
    }
    return base | dict(env) | {MARK: mark}


def _signal(targets: Iterable[int], number: signal.Signals) -> None:
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def marked(mark: str) -> Iterator[int]:
    """Pids of all processes that carry the lab's mark, this one excepted."""
    needle = f"{MARK}={mark}".encode()
    for pid in pids():
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if needle in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                yield pid


def kill_marked(mark: str, timeout_s: float = 10) -> int:
    """Kill every process of a lab, until none is left. Returns how many there were."""
    deadline = time.monotonic() + timeout_s
    seen: set[int] = set()
    while left := [p for p in marked(mark) if not _zombie(p)]:
        if time.monotonic() > deadline:
            raise HdcsError(
                f"processes {left} of the lab do not end", next="Look at them in /proc, then run down again"
            )
        for pid in left:
            seen.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return len(seen)


def pids() -> list[int]:
    return sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def start_time(pid: int) -> int:
    """Clock ticks since boot at which ``pid`` started; with the pid it names a process for good. 0: gone, zombie."""
    stat = _stat(pid)
    return int(stat[19]) if stat and stat[0] != "Z" else 0


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _zombie(pid: int) -> bool:
    return _stat(pid)[:1] == ["Z"]


def _children(parent: int) -> list[int]:
    return [pid for pid in pids() if _stat(pid)[1:2] == [str(parent)]]


def _namespace(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return f"none-{pid}"


def wait_until(done: Callable[[], object], timeout_s: float, what: str, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise HdcsError(f"{what} after {timeout_s:g} s: {why()}")
        time.sleep(0.01)
