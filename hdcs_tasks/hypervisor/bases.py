"""The base images of a backup repository: each version stored once, under its hash.

    <storage root>/backups/bases/<sha256>.qcow2       in clear
                                <sha256>.luks         in a container (``containers.py``); the hash is the container's
                                <image>.<key>.json    note: the container of the image of this hash, by this key

A full backup holds the VM's own layer only, so it is worthless without the image below it. Images are deleted and
storages lost; the repository therefore keeps what it stands on. Where it can, the copy is a hard link and takes
no space.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hdcs_tasks.errors import BackupBroken, Cancelled, Conflict, HypervisorRefused, Invalid
from hdcs_tasks.hypervisor import containers, disks
from hdcs_tasks.hypervisor.jobs import IsCancelled, OnProgress
from hdcs_tasks.hypervisor.keys import Key, KeyRing
from hdcs_tasks.hypervisor.manifests import BaseImage, check_base

PARTIAL = ".partial"
_POLL_S = 0.2
_FILES = (".qcow2", ".raw", ".luks")
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """An OSError of the block (no space, no permission, I/O error) as HypervisorRefused naming ``what``."""
    try:
        yield
    except FileExistsError:
        raise  # somebody else was first: not the storage's fault
    except OSError as error:
        raise HypervisorRefused(
            f"{what} failed: {error.strerror or error}", next="Check the free space and health of the storage"
        ) from error


class Bases:
    """The folder of base images. Several server nodes may use it at once."""

    def __init__(self, folder: Path, ring: KeyRing | None = None) -> None:
        self.folder = folder
        self.ring = ring or KeyRing()

    def file(self, base: BaseImage) -> Path:
        """Where the base image lies; it may be missing. Raises BackupBroken if it is linked elsewhere."""
        path = self.folder / base.file_name
        if path.is_symlink() or self.folder.is_symlink():
            raise BackupBroken(f"{path} is a link", next="The storage holds plain files: remove the link")
        return path

    def key_of(self, base: BaseImage | None) -> Key | None:
        """What QEMU needs to read it. Raises NotFound (the key is not on this node)."""
        return None if base is None else containers.around(self.ring.find(base.key))

    def keep(
        self,
        base: BaseImage,
        image: Path,
        *,
        key: Key | None = None,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
    ) -> BaseImage:
        """Have ``image`` in the repository as ``base``, with ``key`` in a container; returns it as it lies there.

        Raises BackupBroken (``image`` is not what was added under that name), NotFound, Cancelled, HypervisorRefused.
        """
        with storage_errors(f"keeping image {base.name}:{base.version} beside the backups"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (known := self._known(base, key)) is not None:
                return known
            with self._one_at_a_time(cancelled):
                if (known := self._known(base, key)) is not None:
                    return known
                if disks.sha256(image, on_progress=on_progress, cancelled=cancelled) != base.sha256:
                    raise BackupBroken(
                        f"image {base.name}:{base.version} is not what was added: its hash differs",
                        next="Its VMs are damaged as well; restore the image's file from elsewhere",
                    )
                if key is not None:
                    return self._put_in_container(base, image, key, cancelled)
                _link_or_copy(image, self.file(base), cancelled)
        return base

    def _known(self, base: BaseImage, key: Key | None) -> BaseImage | None:
        with self.locked():  # nobody drops it now
            if key is None:
                return base if self.file(base).exists() else None
            known = self._noted(base, key.name)
            return known if known is not None and containers.opens(self.file(known), key) else None

    def _put_in_container(self, base: BaseImage, image: Path, key: Key, cancelled: IsCancelled | None) -> BaseImage:
        partial = self.folder / f".{base.sha256}.{key.name}{PARTIAL}"
        partial.unlink(missing_ok=True)
        try:
            containers.write(image, partial, key, cancelled=cancelled)
            disks.sync(partial)
            kept = replace(
                base, file_bytes=image.stat().st_size, key=key.name, stored_bytes=partial.stat().st_size,
                stored_sha256=disks.sha256(partial, cancelled=cancelled),
            )  # fmt: skip
            with self.locked():
                os.replace(partial, self.file(kept))
                self._note(base.sha256, key.name).unlink(missing_ok=True)  # of one with an older key of this name
                self.note(kept)
        finally:
            partial.unlink(missing_ok=True)
        return kept

    def note(self, base: BaseImage) -> None:
        """Have the next full backup with its key stand on this container."""
        if base.key is not None and self._noted(base, base.key) is None:
            body = {"stored_sha256": base.stored_sha256, "stored_bytes": base.stored_bytes, "bytes": base.file_bytes}
            write_durably(self._note(base.sha256, base.key), json.dumps(body).encode())

    def _note(self, sha256: str, key: str) -> Path:
        return self.folder / f"{sha256}.{key}.json"

    def _noted(self, base: BaseImage, key: str) -> BaseImage | None:
        """``base`` in its container, if there is one that is what its note says."""
        try:
            body = json.loads(self._note(base.sha256, key).read_bytes())
            found = replace(
                base, key=key, stored_sha256=str(body["stored_sha256"]), stored_bytes=int(body["stored_bytes"]),
                file_bytes=int(body["bytes"]),
            )  # fmt: skip
            check_base(found)
            return found if self.file(found).stat().st_size == found.stored_bytes else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, Invalid):
            return None  # it is made anew

    @contextmanager
    def _one_at_a_time(self, cancelled: IsCancelled | None) -> Iterator[None]:
        """Held while a base image is put here: who wants the same one waits, and finds it."""
        handle = os.open(self.folder / ".making.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _lock_now(handle):
                if cancelled is not None and cancelled():
                    raise Cancelled("waiting for another backup's base image was cancelled")
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(handle)

    def bring_back(self, base: BaseImage, image: Path, *, cancelled: IsCancelled | None = None) -> bool:
        """Have the base image at ``image``, to clone from; False if it was there.

        Raises Conflict (another file is there), BackupBroken (the repository has none), Cancelled, HypervisorRefused.
        """
        kept = self.file(base)
        if image.exists():
            same = kept.exists() and kept.samefile(image)
            if not same and disks.sha256(image, cancelled=cancelled) != base.sha256:
                raise Conflict(
                    f"the file of image {base.name}:{base.version} is another than the backup stands on",
                    next="Add that file as a new version, then delete this one",
                )
            return False
        if not kept.is_file():
            raise BackupBroken(
                f"base image {base.name}:{base.version} ({base.sha256[:12]}) is missing", next="Import it again"
            )
        with storage_errors(f"bringing back image {base.name}:{base.version}"):
            image.parent.mkdir(mode=0o711, exist_ok=True)
            if base.key is None:
                _link_or_copy(kept, image, cancelled)
            else:
                containers.read(
                    kept, base, image, self.ring.get(base.key), cancelled=cancelled, attempt=f"{os.getpid()}"
                )
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held while a full point becomes one, and while bases without a point are dropped."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def drop_all_but(self, used: Collection[str]) -> list[str]:
        """Delete the base images whose file's hash is not in ``used``; returns those. Call it ``locked``."""
        gone = [path for path in self.folder.glob("*.*") if path.suffix in _FILES and path.stem not in used]
        for path in gone:
            path.unlink(missing_ok=True)
        for note in self.folder.glob("*.*.json"):
            sha256, key = note.stem.split(".", 1)
            if self._noted(BaseImage("any", 1, sha256), key) is None:
                note.unlink(missing_ok=True)
        self._drop_partials()
        return sorted(path.stem for path in gone)

    def _drop_partials(self) -> None:
        """What workers left that died while they put an image here."""
        handle = os.open(self.folder / ".making.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _lock_now(handle):  # else somebody is at it
                for left in self.folder.glob(f"*{PARTIAL}"):
                    left.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _lock_now(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _link_or_copy(source: Path, target: Path, cancelled: IsCancelled | None) -> None:
    """Somebody else may do the same at once: whoever is second finds it done."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        try:
            disks.copy_image(source, target, cancelled=cancelled, attempt=str(os.getpid()))
        except Conflict:
            return
    disks.sync(target.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file of ``content``: whole and on disk, or not at all."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    disks.sync(path.parent)
