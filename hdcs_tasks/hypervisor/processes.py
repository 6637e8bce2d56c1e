"""Children (qemu-img and the like) that cannot outlive their worker, run away or flood it.

Each child gets a parent-death signal, its own process group, limits on time, memory and output. The signal comes
when the *thread* that started the child ends; ``run`` stays in the calling thread until the child is gone, so that
is never too early.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from hdcs_tasks.errors import Cancelled, HypervisorRefused, Unavailable

STDOUT_MAX_BYTES = 8 << 20
STDERR_MAX_BYTES = 16 << 10
_POLL_S = 0.1
_READ_BYTES = 1 << 16
_PERCENT = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")

Percent = Callable[[float], None]
Cancel = Callable[[], bool]


@dataclass(frozen=True)
class Finished:
    """How a child ended. ``stdout`` is whole; ``stderr`` is its last 16 KiB."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass
class _Output:
    """What a child wrote so far. With a progress callback its stdout is progress and not kept."""

    on_percent: Percent | None
    stdout: bytearray = field(default_factory=bytearray)
    stderr: deque[int] = field(default_factory=lambda: deque(maxlen=STDERR_MAX_BYTES))
    told: float = -1.0

    def take(self, name: str, data: bytes) -> None:
        if name == "stderr":
            self.stderr.extend(data)
            return
        self.stdout += data
        if self.on_percent is None:
            return
        found = _PERCENT.findall(self.stdout)
        self.stdout = self.stdout[-32:]
        if found and float(found[-1]) > self.told:
            self.told = float(found[-1])
            self.on_percent(self.told)


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    on_percent: Percent | None = None,
    cancelled: Cancel | None = None,
    memory_mib: int | None = None,
    cpu_s: int | None = None,
    file_bytes: int | None = None,
    files_max: int | None = None,
    ok: Sequence[int] = (0,),
    pass_fds: Sequence[int] = (),
) -> Finished:
    """Run ``argv`` to its end and return it; ``ok`` lists the exit codes that count as success, ``pass_fds`` the files
    it inherits.

    ``on_percent`` gets 0 to 100 from the progress lines of ``qemu-img -p``. ``cancelled`` is asked ten times a
    second; True ends the child with SIGTERM, after 2 s with SIGKILL, and raises Cancelled. Raises Unavailable
    (longer than ``timeout_s``) and HypervisorRefused (exit code, no such program, too much output), naming ``argv``.
    Limits: ``memory_mib``, ``cpu_s``, ``file_bytes`` (the largest file it may write), ``files_max`` (open at once).
    """
    begun = time.monotonic()
    output = _Output(on_percent)
    limits = _limits(memory_mib, cpu_s, file_bytes, files_max)
    child = _spawn(argv, limits, pass_fds)
    try:
        _attend(child, output, argv, begun + timeout_s, cancelled)
    except BaseException:
        _end(child)
        raise
    finally:
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()
    stderr = bytes(output.stderr).decode(errors="replace").strip()
    if child.returncode not in ok:
        raise HypervisorRefused(
            f"{shlex.join(argv)} ended with {_ending(child.returncode)}: {stderr or 'no message'}",
            next="Read its message; check the disk files it names and free space",
            details={"exit_code": child.returncode},
        )
    stdout = bytes(output.stdout).decode(errors="replace")
    return Finished(child.returncode, stdout, stderr, time.monotonic() - begun)


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _limits(memory_mib: int | None, cpu_s: int | None, file_bytes: int | None, files_max: int | None) -> list[str]:
    wanted = (
        ("as", None if memory_mib is None else memory_mib << 20), ("cpu", cpu_s), ("fsize", file_bytes),
        ("nofile", files_max),
    )  # fmt: skip
    return [f"--{name}={value}" for name, value in wanted if value is not None]


def _spawn(argv: Sequence[str], limits: Sequence[str], pass_fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start ``argv`` behind setpriv and prlimit: both end in exec, so the child's pid is the program's own."""
    guard = ["setpriv", "--pdeathsig", "KILL"]
    if limits:
        guard += ["prlimit", *limits, "--core=0", "--"]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.Popen(
            [*guard, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            process_group=0, env=environment, pass_fds=pass_fds,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise HypervisorRefused(f"cannot run {argv[0]}: {error}", next="Install util-linux and qemu-utils") from error


def _attend(
    child: subprocess.Popen[bytes], output: _Output, argv: Sequence[str], deadline: float, cancelled: Cancel | None
) -> None:
    """Read the child's output until it ends; raises when it must not go on."""
    with selectors.DefaultSelector() as selector:
        for name, stream in (("stdout", child.stdout), ("stderr", child.stderr)):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, name)
        while child.poll() is None or selector.get_map():
            if selector.get_map():
                for key, _ in selector.select(_POLL_S):
                    data = os.read(key.fd, _READ_BYTES)
                    if data:
                        output.take(key.data, data)
                    else:
                        selector.unregister(key.fileobj)
            else:
                time.sleep(0.005)
            _may_go_on(output, argv, deadline, cancelled)


def _may_go_on(output: _Output, argv: Sequence[str], deadline: float, cancelled: Cancel | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancelled(f"{shlex.join(argv)} was cancelled")
    if time.monotonic() >= deadline:
        raise Unavailable(f"{shlex.join(argv)} took too long and was ended", next="Is the storage slow? Ask again")
    if len(output.stdout) > STDOUT_MAX_BYTES:
        raise HypervisorRefused(f"{shlex.join(argv)} wrote over {STDOUT_MAX_BYTES} bytes", next="Check its input")


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and its group; it is reaped in any case."""
    for number, patience_s in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
        if child.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        return
