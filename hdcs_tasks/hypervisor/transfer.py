"""Bringing files from another domain node's storage into this one: sparse, resumable, checked by hash.

The server node that wants a file pulls it: it opens the libvirt of a server node whose storage has it, the same way
(and with the same certificates) a migration takes, and reads the file as a storage volume. No other port, daemon or
password is needed, and nothing is mounted.

    fetch([peer_uri("10.0.0.7")], RemoteFile("images/mini/1.qcow2", size_bytes, sha256), target)

What has arrived is kept under ``<target>.<hash>.transfer`` beside ``target``, so that the next attempt, on whichever
server node of the domain node, goes on there. The name ``target`` is given only to a file with the SHA-256 asked
for.

Source of the calls: libvirt's virStorageVolDownload with a sparse stream.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from xml.etree import ElementTree as ET

import libvirt

from hdcs_tasks.errors import Cancelled, Conflict, HypervisorRefused, Invalid, NotFound, Unavailable, Unreachable
from hdcs_tasks.hypervisor import disks, storage
from hdcs_tasks.hypervisor.bases import storage_errors
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors

Progress = Callable[[float, str, float | None], None]
Cancel = Callable[[], bool]

POOL_PREFIX = "hdcs-send-"
"""Storage pools of this name exist on a source while somebody reads from it; ``drop_send_pools`` removes left-overs."""

_BLOCK_BYTES = 1 << 20
_AT_HOLE = -3
_SILENCE_S = 7
_MIB = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file to bring. ``path``: below the storage's root, the same in every domain node: ``images/mini/1.qcow2``."""

    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or path.parts[0] not in storage.KINDS:
            raise Invalid(f"{self.path!r} is not a file of a storage", next="As in images/mini/1.qcow2")
        if self.size_bytes < 0 or len(self.sha256) != 64:
            raise Invalid(f"{self.path}: size {self.size_bytes}, hash {self.sha256!r}", next="Describe it first")


@dataclass(frozen=True)
class Received:
    """``bytes``: data that travelled, holes not counted; ``resumed_at``: where an earlier attempt had come to."""

    bytes: int
    resumed_at: int
    seconds: float


def describe(
    path: Path, relative: str, *, on_progress: Progress | None = None, cancelled: Cancel | None = None
) -> dict[str, Any]:
    """What ``fetch`` must know of a file that nobody writes to: ``{path, size_bytes, sha256, allocated_bytes}``.

    Raises NotFound, Cancelled.
    """
    digest = disks.sha256(path, on_progress=on_progress, cancelled=cancelled)
    seen = path.stat()
    return {
        "path": relative, "size_bytes": seen.st_size, "sha256": digest, "allocated_bytes": seen.st_blocks * 512
    }  # fmt: skip


def fetch(
    uris: Sequence[str],
    file: RemoteFile,
    target: Path,
    *,
    bandwidth_mib_s: int | None = None,
    on_progress: Progress | None = None,
    cancelled: Cancel | None = None,
) -> Received:
    """Bring ``file`` to ``target`` from the first of ``uris`` (libvirt of server nodes that have it) that answers.

    There already with that hash: a success. Raises Conflict (another file is there), Unreachable (none answers, or the
    network was cut: ask again, it goes on where it was), Unavailable (another attempt is at it), NotFound (no such file
    there), HypervisorRefused (it differs there from what was asked for; no space), Cancelled (what came is dropped).
    """
    begun = time.monotonic()
    partial = target.with_name(f"{target.name}.{file.sha256[:12]}.transfer")
    if target.exists():
        if target.stat().st_size != file.size_bytes or disks.sha256(target, cancelled=cancelled) != file.sha256:
            raise Conflict(f"{target} is another file than {file.path} of the source", next="Remove or rename it first")
        partial.unlink(missing_ok=True)  # an attempt may have died between giving the name and this
        return Received(0, file.size_bytes, time.monotonic() - begun)
    with storage_errors(f"receiving {file.path}"), _opened(partial) as out:
        pull = _Pull(file, out, bandwidth_mib_s, on_progress, cancelled)
        try:
            _whole(pull, uris, target)
        except Cancelled:
            partial.unlink(missing_ok=True)
            raise
        os.fsync(out.fileno())
        _give_name(partial, target)
    return Received(pull.received, pull.resumed_at, time.monotonic() - begun)


def _whole(pull: _Pull, uris: Sequence[str], target: Path) -> None:
    """Until the partial file has the hash; one that was resumed and differs is read once more from its beginning."""
    for _ in range(2):
        pull.take_up()
        resumed = pull.position > 0
        if pull.position < pull.file.size_bytes:
            _from_any(pull, uris)
        if pull.position == pull.file.size_bytes and pull.digest.hexdigest() == pull.file.sha256:
            return
        pull.start_over()
        if not resumed:
            break
    raise HypervisorRefused(
        f"{pull.file.path} arrived with another hash than {pull.file.sha256[:12]}…: it changed at its source",
        next="Look at the file there; ask again to read it anew",
    )


def _give_name(partial: Path, target: Path) -> None:
    try:
        os.link(partial, target)
    except FileExistsError:
        raise Conflict(f"{target} appeared meanwhile", next="Look at what is there") from None
    disks.sync(target.parent)
    partial.unlink(missing_ok=True)  # another attempt that saw the name may have done it


@contextmanager
def _opened(partial: Path) -> Iterator[IO[bytes]]:
    """The partial file, held by this attempt alone. The kernel lets go of it when the process dies."""
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with os.fdopen(handle, "r+b", buffering=0) as out:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"{partial.name} is being received already", next="Wait for that to end") from None
        if not partial.exists() or partial.stat().st_ino != os.fstat(handle).st_ino:
            raise Unavailable(f"{partial.name} was received this moment", next="Look again")
        yield out


class _Pull:
    """One file on its way: where it has come to, its hash so far, and how fast it may be."""

    def __init__(
        self, file: RemoteFile, out: IO[bytes], bandwidth_mib_s: int | None, on_progress: Progress | None,
        cancelled: Cancel | None,
    ) -> None:  # fmt: skip
        self.file = file
        self.out = out
        self.limit_bytes_s = None if bandwidth_mib_s is None else bandwidth_mib_s * _MIB
        self.on_progress = on_progress
        self.cancelled = cancelled
        self.position = self.resumed_at = self.received = 0
        self.digest = hashlib.sha256()
        self.begun = time.monotonic()

    def take_up(self) -> None:
        """Read what an earlier attempt received."""
        self.out.seek(0)
        self.digest, self.position = hashlib.sha256(), 0
        if os.fstat(self.out.fileno()).st_size > self.file.size_bytes:
            self.out.truncate(0)
        while block := self.out.read(_BLOCK_BYTES):
            self._may_go_on()
            self.digest.update(block)
            self.position += len(block)
        self.resumed_at = self.position
        self.begun = time.monotonic()

    def start_over(self) -> None:
        self.out.truncate(0)

    def take(self, data: bytes) -> None:
        self._may_go_on()
        view = memoryview(data)
        while view:
            view = view[self.out.write(view):]  # fmt: skip
        self.digest.update(data)
        self.received += len(data)
        self._advance(len(data))

    def skip(self, length: int) -> None:
        """A hole: nothing travels, nothing is written."""
        length = min(length, self.file.size_bytes - self.position)
        for begin in range(0, length, _BLOCK_BYTES):
            self._may_go_on()
            self.digest.update(bytes(min(_BLOCK_BYTES, length - begin)))
        self.out.truncate(self.position + length)
        self.out.seek(self.position + length)
        self._advance(length)

    def _advance(self, length: int) -> None:
        self.position += length
        spent = time.monotonic() - self.begun
        if self.limit_bytes_s and (ahead_s := self.received / self.limit_bytes_s - spent) > 0:
            time.sleep(min(ahead_s, 1.0))
        if self.on_progress is not None:
            size, done = max(self.file.size_bytes, 1), self.position - self.resumed_at
            eta_s = spent * (size - self.position) / done if done else None
            self.on_progress(100.0 * self.position / size, f"copy {self.position // _MIB}/{size // _MIB} MiB", eta_s)

    def _may_go_on(self) -> None:
        if self.cancelled is not None and self.cancelled():
            raise Cancelled(f"receiving {self.file.path} was cancelled")


def _from_any(pull: _Pull, uris: Sequence[str]) -> None:
    """Read what is missing from the first source that answers."""
    refused: list[str] = []
    for uri in uris:
        try:
            host = Host.open(uri)
        except Unreachable as error:
            refused.append(error.message)
            continue
        with host:
            _notice_soon(host)
            _read(host, pull)
        return
    raise Unreachable(
        f"no source of {pull.file.path} answers: {'; '.join(refused) or 'none was named'}",
        next="Bring a server node of that domain node back: hdcs node list",
    )


def _notice_soon(host: Host) -> None:
    """A cut link is told after seconds: to take a busy source for a lost one costs only another attempt."""
    with libvirt_errors(f"watch the connection to {host.uri}"):
        host.conn.setKeepAlive(1, _SILENCE_S)


def _read(host: Host, pull: _Pull) -> None:
    with libvirt_errors(f"read {pull.file.path} from {host.uri}"), _volume(host, pull.file) as volume:
        if volume.info()[2] == 0 and pull.file.size_bytes:
            pull.skip(pull.file.size_bytes - pull.position)  # nothing but a hole
            return
        stream = host.conn.newStream(0)
        try:
            volume.download(stream, pull.position, 0, libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
            _drain(stream, pull)
            stream.finish()
        except BaseException:
            with suppress(libvirt.libvirtError):
                stream.abort()
            raise


def _drain(stream: Any, pull: _Pull) -> None:
    while pull.position < pull.file.size_bytes:
        data = stream.recvFlags(_BLOCK_BYTES, libvirt.VIR_STREAM_RECV_STOP_AT_HOLE)
        if data == _AT_HOLE:
            pull.skip(stream.recvHole())
        elif data:
            pull.take(data)
        else:
            return  # it is shorter than it was: the hash will tell
    while stream.recvFlags(_BLOCK_BYTES):
        continue  # a stream is finished when it is read to its end


@contextmanager
def _volume(host: Host, file: RemoteFile) -> Iterator[Any]:
    """The file as a volume of a storage pool that exists for as long as somebody reads from its folder."""
    folder, _, name = f"{_root(host)}/{file.path}".rpartition("/")
    pool_name = f"{POOL_PREFIX}{uuid.uuid5(uuid.NAMESPACE_URL, folder).hex[:16]}"
    pool = _send_pool(host, pool_name, folder)
    try:
        yield _look_up(pool, name, file)
    finally:
        with suppress(libvirt.libvirtError):  # refused while another reads from it: the last one removes it
            pool.destroy()


def _root(host: Host) -> str:
    """The source's own storage root, as its node program told its libvirt."""
    path = host.conn.storagePoolLookupByName(storage.POOLS["images"]).XMLDesc(0)
    return str(PurePosixPath(ET.fromstring(path).findtext("target/path") or "").parent)


def _send_pool(host: Host, name: str, folder: str) -> Any:
    try:
        return host.conn.storagePoolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
    try:
        return host.conn.storagePoolCreateXML(storage.pool_xml(name, Path(folder)), 0)
    except libvirt.libvirtError:
        return host.conn.storagePoolLookupByName(name)  # another reader was first; else the first error's like


def _look_up(pool: Any, name: str, file: RemoteFile) -> Any:
    with suppress(libvirt.libvirtError):  # refused while another reads; then what it knows must do
        pool.refresh(0)
    try:
        return pool.storageVolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
            raise
        raise NotFound(f"the source has no file {file.path}", next="See what its storage holds") from error


def drop_send_pools(host: Host) -> None:
    """Remove the pools of readers that died; those being read from refuse and stay."""
    with libvirt_errors("remove left-over storage pools"):
        for pool in host.conn.listAllStoragePools(0):
            if pool.name().startswith(POOL_PREFIX):
                with suppress(libvirt.libvirtError):
                    pool.destroy()


def drop_partials(folder: Path) -> None:
    """Remove what unfinished transfers left in ``folder``; what is being received right now stays."""
    for left in folder.glob("*.transfer"):
        with suppress(Unavailable, FileNotFoundError), _opened(left):
            left.unlink()
