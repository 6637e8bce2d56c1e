"""The base images of a backup repository: each version stored once, under its hash.

    <storage root>/backups/bases/<sha256>.qcow2

A full backup holds the VM's own layer only, so it is worthless without the image below it. Images are deleted and
storages lost; the repository therefore keeps what it stands on. Where it can, the copy is a hard link and takes
no space.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from hdcs_tasks.errors import BackupBroken, Conflict, HypervisorRefused
from hdcs_tasks.hypervisor import disks
from hdcs_tasks.hypervisor.jobs import IsCancelled, OnProgress
from hdcs_tasks.hypervisor.manifests import BaseImage

PARTIAL = ".partial"
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

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, base: BaseImage) -> Path:
        """Where the base image lies; it may be missing. Raises BackupBroken if it is linked elsewhere."""
        path = self.folder / f"{base.sha256}.{base.format}"
        if path.is_symlink() or self.folder.is_symlink():
            raise BackupBroken(f"{path} is a link", next="The storage holds plain files: remove the link")
        return path

    def keep(
        self,
        base: BaseImage,
        image: Path,
        *,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
    ) -> Path:
        """Have ``image`` in the repository as ``base``; returns the repository's file.

        Raises BackupBroken (``image`` is not what was added under that name), NotFound, Cancelled, HypervisorRefused.
        """
        kept = self.file(base)
        if kept.exists():
            return kept
        if disks.sha256(image, on_progress=on_progress, cancelled=cancelled) != base.sha256:
            raise BackupBroken(
                f"image {base.name}:{base.version} is not what was added: its hash differs",
                next="Its VMs are damaged as well; restore the image's file from elsewhere",
            )
        with storage_errors(f"keeping image {base.name}:{base.version} beside the backups"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _link_or_copy(image, kept, cancelled)
        return kept

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
            _link_or_copy(kept, image, cancelled)
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
        """Delete the base images whose hash is not in ``used``; returns their hashes. Call it ``locked``."""
        gone = [path for path in self.folder.glob("*.*") if path.suffix in (".qcow2", ".raw")]
        gone = [path for path in gone if path.stem not in used]
        for path in gone:
            path.unlink(missing_ok=True)
        return sorted(path.stem for path in gone)


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
