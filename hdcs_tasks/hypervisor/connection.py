"""Connections to libvirtd that notice when it is gone, and heal when it is back.

Not fork-safe: libvirt's event loop and sockets do not survive ``fork``. Open a Host in the process that uses it
(``worker_process_init``), never at import. One Host may be shared by any number of threads.

A call that lasts (save, migration, statistics of a hung QEMU) belongs on a connection of its own, ``Host.another()``:
while one thread waits in it, answers to the other threads of the same connection can lie unread until the next
keepalive message (measured with libvirt 9.0: every second XMLDesc took exactly the keepalive interval).
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast
from urllib.parse import quote, urlsplit
from uuid import UUID

import libvirt

from hdcs_tasks.config import Settings
from hdcs_tasks.errors import HdcsError, HypervisorRefused, Invalid, NotFound, Unreachable
from hdcs_tasks.hypervisor.errors import libvirt_errors, translate

T = TypeVar("T")

KEEPALIVE_INTERVAL_S = 1  # also the longest an answer lies unread, see above
KEEPALIVE_COUNT = 19  # a cut link is noticed after about 20 s; sooner would take a busy host for a lost one
_DEFAULT_PORTS = {"tcp": 16509, "tls": 16514, "ssh": 22}
_REOPEN_PAUSE_S = 0.2

_loop_lock = threading.Lock()
_loop_pid: int | None = None
# Connections inherited by fork: kept for ever, as dropping them would close the parent's connection.
_inherited: list[Any] = []


def peer_uri(address: str, *, tls: bool = False, pki: str = "") -> str:
    """How a server node's libvirtd, or a process beside it, reaches that of the server node at ``address``. ``pki``:
    the folder of its certificates, where that is not libvirt's own."""
    shown = f"[{address}]" if ":" in address else address
    where = f"?pkipath={quote(pki)}" if tls and pki else ""
    return f"qemu+{'tls' if tls else 'tcp'}://{shown}/system{where}"


def peer_of(settings: Settings, address: str) -> str:
    """``peer_uri`` as this server node's settings want it."""
    return peer_uri(address, tls=settings.migrate_tls, pki=settings.migrate_tls_pki)


def _run_event_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def _ensure_event_loop() -> None:
    """Start libvirt's event loop, once per process: keepalive and events work only while it runs."""
    global _loop_pid
    with _loop_lock:
        if _loop_pid == os.getpid():
            return
        if _loop_pid is not None:
            raise HypervisorRefused(
                "this process was forked from one that already used libvirt",
                next="Open the Host after the fork (worker_process_init), not before",
            )
        libvirt.registerErrorHandler(lambda *_: None, None)  # libvirt else prints each error to stderr
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()
        _loop_pid = os.getpid()


def probe(uri: str, timeout_s: float) -> None:
    """Connect to the TCP port of a remote ``uri``: libvirt itself waits 38 s for a dead host."""
    parts = urlsplit(uri)
    transport = parts.scheme.partition("+")[2]
    if not parts.hostname or transport == "unix":
        return
    port = parts.port or _DEFAULT_PORTS.get(transport or "tls", 16514)
    try:
        socket.create_connection((parts.hostname, port), timeout=timeout_s).close()
    except OSError as error:
        raise Unreachable(
            f"cannot reach libvirtd at {parts.hostname}:{port}: {error}",
            next="Check that the server node is up and its libvirtd listens",
        ) from error


def _open_bounded(uri: str, timeout_s: float) -> Any:
    """``libvirt.open`` given up on after ``timeout_s``: it hangs for ever on a stopped libvirtd."""
    answers: queue.Queue[Any] = queue.Queue()
    lock = threading.Lock()
    given_up = False

    def attempt() -> None:
        try:
            answer = libvirt.open(uri)
        except libvirt.libvirtError as error:
            answer = error
        with lock:
            if not given_up:
                answers.put(answer)
                return
        if not isinstance(answer, libvirt.libvirtError):
            answer.close()

    threading.Thread(target=attempt, name="libvirt-open", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        with lock:
            given_up = True
        try:
            answer = answers.get_nowait()
        except queue.Empty:
            raise Unreachable(
                f"libvirtd at {uri} did not answer within {timeout_s:.1f} s",
                next="Check libvirtd on the server node: systemctl status libvirtd",
            ) from None
    if isinstance(answer, libvirt.libvirtError):
        raise translate(answer, f"open {uri}") from answer
    return answer


def answered(call: Callable[[], T], timeout_s: float, action: str) -> T:
    """What ``call`` answers; HypervisorRefused where it has not after ``timeout_s``.

    For what is asked of a guest on a server node that lives: libvirt waits without end for a QEMU that hangs (on a disk
    whose network was cut, say), and no keepalive tells of that.
    """
    answers: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def ask() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # noqa: BLE001 handed to the thread that waits
            answers.put((None, error))

    threading.Thread(target=ask, name="libvirt-ask", daemon=True).start()
    try:
        answer, error = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise HypervisorRefused(
            f"cannot {action}: no answer within {timeout_s:.0f} s; libvirt is there, the guest's QEMU does not answer",
            next="Look at the guest there (virsh domstate --reason) and at its storage; it may need a forced stop",
        ) from None
    if error is not None:
        raise error
    return cast(T, answer)


class Host:
    """One connection to one libvirtd.

    ``conn`` is the ``libvirt.virConnect``, ``uri`` what it was opened with.
    """

    def __init__(self, uri: str, conn: Any) -> None:
        self.uri = uri
        self.conn = conn
        self._lost = False

    @classmethod
    def open(cls, uri: str = "qemu:///system", timeout_s: float = 10) -> Host:
        """Connect to ``uri``; raises Unreachable when nothing answers within ``timeout_s`` seconds."""
        deadline = time.monotonic() + timeout_s
        _ensure_event_loop()
        probe(uri, timeout_s)
        host = cls(uri, _open_bounded(uri, max(deadline - time.monotonic(), 0.1)))
        host._watch()
        return host

    def another(self, timeout_s: float = 10) -> Host:
        """A second connection to the same libvirtd, for a call that lasts; the caller closes it (``with``)."""
        return Host.open(self.uri, timeout_s)

    def _watch(self) -> None:
        with libvirt_errors(f"watch the connection to {self.uri}"):
            self.conn.registerCloseCallback(self._on_close, None)
            try:
                self.conn.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:  # drivers inside this process
                    raise

    def _on_close(self, _conn: Any, _reason: int, _opaque: Any) -> None:
        self._lost = True

    def alive(self) -> bool:
        """Whether the connection still stands, by what is known locally (no round trip)."""
        if self._lost:
            return False
        try:
            return bool(self.conn.isAlive())
        except libvirt.libvirtError:
            return False

    def close(self) -> None:
        """Close the connection; closing twice, or one that is lost, does nothing."""
        self._lost = True
        conn, self.conn = self.conn, None
        if conn is None:
            return
        try:
            conn.unregisterCloseCallback()
            conn.close()
        except libvirt.libvirtError:
            pass  # libvirtd is gone: there is nothing left to close

    def lookup(self, vm_id: str) -> Any | None:
        """The ``libvirt.virDomain`` with UUID ``vm_id``, or None when this host has none."""
        try:
            UUID(vm_id)
        except (ValueError, AttributeError, TypeError):
            raise Invalid(f"{vm_id!r} is not a VM id", next="A VM id is a UUID; see: hdcs vm list") from None
        try:
            return self.conn.lookupByUUIDString(vm_id)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise translate(error, f"look up guest {vm_id}") from error

    def guest(self, vm_id: str) -> Any:
        """The ``libvirt.virDomain`` with UUID ``vm_id``; raises NotFound when this host has none."""
        found = self.lookup(vm_id)
        if found is None:
            raise NotFound(
                f"no guest {vm_id} on {self.uri}", next="It does not run on this server node. See: hdcs vm list"
            )
        return found

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HostPool:
    """The one Host of a process for one URI: opened at first use, reopened when its connection was lost."""

    def __init__(self, uri: str = "qemu:///system", timeout_s: float = 10) -> None:
        self.uri = uri
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._host: Host | None = None

    def get(self) -> Host:
        """A living Host. A restarting libvirtd is waited for up to ``timeout_s``; then Unreachable."""
        with self._lock:
            host = self._host
            if host is not None and host.alive():
                return host
            self._host = None
            # The dead one is not closed here: another thread may still be inside a call on it, which will
            # end with Unreachable by itself; garbage collection closes it after the last user.
            self._host = self._reopen()
            return self._host

    def _reopen(self) -> Host:
        deadline = time.monotonic() + self.timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                return Host.open(self.uri, max(left, 0.1))
            except HdcsError as error:
                if not error.retryable or left <= _REOPEN_PAUSE_S:
                    raise
            time.sleep(_REOPEN_PAUSE_S)

    def close(self) -> None:
        with self._lock:
            host, self._host = self._host, None
        if host is not None:
            host.close()


_pools: dict[str, HostPool] = {}
_pools_lock = threading.Lock()


def current_host(settings: Settings) -> Host:
    """This process's Host for ``settings.libvirt_uri``, reopened when libvirtd was restarted."""
    with _pools_lock:
        pool = _pools.setdefault(settings.libvirt_uri, HostPool(settings.libvirt_uri))
    return pool.get()


def _forget_inherited() -> None:
    global _pools_lock, _loop_lock
    _pools_lock, _loop_lock = threading.Lock(), threading.Lock()  # the parent's threads may have held them
    _inherited.append(dict(_pools))
    _pools.clear()


os.register_at_fork(after_in_child=_forget_inherited)
