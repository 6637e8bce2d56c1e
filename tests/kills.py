"""A worker killed at every point where it changes the disk: the nth run of the work dies at its nth such point.

Python's audit events name those points by themselves (a file opened to write, renamed, linked, removed, a folder made
or removed, a program started), so a step that is changed gets its new points tested without a word here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_CHANGES = frozenset({"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "subprocess.Popen"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def killed_at(number: int, work: Callable[[], object]) -> str | None:
    """Run ``work`` in a child that gets SIGKILL right before its ``number``-th change of the disk.

    The name of the event it died at, or None when it ended before; AssertionError when it failed by itself.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _die_at(number, write)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(write, repr(error).encode())
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return told
    assert status == 0, told
    return None


def _die_at(number: int, pipe: int) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES)
        if not changes or (event == "open" and str(arguments[0]).startswith("/dev/")):
            return
        seen += 1
        if seen == number:
            os.write(pipe, event.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_in(function: Any, event: str, work: Callable[[], object]) -> bool:
    """Run ``work`` in a child that gets SIGKILL when ``function`` is entered (event "call") or left ("return"): for
    moments that change no file here. False when it ended before; AssertionError when it failed by itself."""
    pid = os.fork()
    if pid == 0:

        def hook(frame: Any, what: str, _argument: Any) -> None:
            if what == event and frame.f_code is function.__code__:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(hook)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert status == 0, status
    return False
