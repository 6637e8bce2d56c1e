"""Backup chains as plain files, readable without HDCS:

    <storage root>/backups/bases/<sha256>.qcow2         base images, each version once (bases.py); .luks: encrypted
                           <vm_id>/<chain>/0001.qcow2   full: on the base image, by a relative backing path
                                           0001.json    manifest, written last: without it there is no point
                                           0002.qcow2   increment: on 0001.qcow2
                                           0002.json

The folder is enough: copied elsewhere as a whole, every point in it can be restored.

A file gets its name only when it is whole, on disk and hashed. Nothing read from here is trusted: manifests are
sealed, and a backing file that leads anywhere but the chain's previous file is refused before QEMU opens it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import BackupBroken, Conflict, NotFound
from hdcs_tasks.hypervisor import keys, leftovers, manifests
from hdcs_tasks.hypervisor.bases import PARTIAL, Bases, storage_errors, write_durably
from hdcs_tasks.hypervisor.bitmaps import ensure_seed
from hdcs_tasks.hypervisor.disks import sha256, sync
from hdcs_tasks.hypervisor.jobs import IsCancelled, OnProgress, share
from hdcs_tasks.hypervisor.keys import Key, KeyRing, Keys
from hdcs_tasks.hypervisor.layers import Backing, flatten, header, same_content
from hdcs_tasks.hypervisor.manifests import BaseImage, Point


class Repository:
    """The backups in one domain node's storage at ``root``. Holds nothing in memory; safe to make at any time.

    ``ring``: the keys this server node has; points in clear need none.
    """

    def __init__(self, root: Path, ring: KeyRing | None = None) -> None:
        self.root = root
        self.ring = ring or KeyRing()
        self.folder = root / "backups"
        self.bases = Bases(self.folder / "bases", self.ring)

    def chain_folder(self, vm_id: str, chain: str) -> Path:
        """Where a chain's files lie; raises Invalid for names that are none, or are linked out of the storage."""
        found = self.folder / manifests.check_vm_id(vm_id) / manifests.check_name("backup chain", chain)
        if found.resolve() != self.folder.resolve() / vm_id / chain:
            raise BackupBroken(f"{found} is linked elsewhere", next="The storage holds plain files: remove the link")
        return found

    def file(self, point: Point) -> Path:
        return self.chain_folder(point.vm_id, point.chain) / point.file_name

    def partial(self, vm_id: str, chain: str, seq: int, attempt: str) -> Path:
        """The name an ``attempt`` writes its file under before ``publish``; its folder is made."""
        folder = self.chain_folder(vm_id, chain)
        with storage_errors(f"making {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder / f".{seq:04d}.{manifests.check_name('attempt', attempt)}{PARTIAL}"

    def backing(self, below: Point | BaseImage, vm_id: str, chain: str) -> Backing:
        """What a new file of the chain must stand on: the previous ``Point``, or the ``BaseImage`` for a full one."""
        if isinstance(below, Point):
            return Backing(below.file_name)
        return Backing(os.path.relpath(self.bases.file(below), self.chain_folder(vm_id, chain)), below.format)

    def keys_of(self, below: Point | BaseImage | None) -> Keys:
        """The keys of a point's (or a base's) file and of all below it, for QEMU. Raises NotFound: one is not on this
        node."""
        if not isinstance(below, Point):
            return [self.bases.key_of(below)]
        links = self.links(below) if below.key or below.parent else [below]
        return [*(self.ring.find(link.key) for link in reversed(links)), self.bases.key_of(below.base)]

    def publish(
        self,
        partial: Path,
        draft: Point,
        *,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
    ) -> Point:
        """Make the whole file ``partial`` the point ``draft`` describes; returns it with sizes, hash and time.

        Raises BackupBroken (it does not stand on what the draft says, or another point has its place: nothing is
        published), Cancelled, HypervisorRefused (no space). On an error ``partial`` is left to the caller.
        """
        final = self.chain_folder(draft.vm_id, draft.chain) / draft.file_name
        self.check_free(draft.vm_id, draft.chain, draft.seq)
        point = self.complete(partial, draft, on_progress=on_progress, cancelled=cancelled)
        with self.bases.locked(), storage_errors(f"writing backup point {point.id}"):
            if draft.base is not None and not self.bases.file(draft.base).is_file():
                raise BackupBroken(f"base image {draft.base.name} of {draft.id} is missing", next="Back up once more")
            os.replace(partial, final)
            self._sync_folders(final)
            write_durably(final.with_name(point.manifest_name), manifests.dump(point))
        return point

    def check_free(self, vm_id: str, chain: str, seq: int) -> None:
        """BackupBroken if a point has that place in the chain, which then is not the one the record knows."""
        if (self.chain_folder(vm_id, chain) / f"{seq:04d}.json").exists():
            raise BackupBroken(f"backup point {seq:04d} of that chain exists", next="The next backup is a full one")

    def receive(self, point: Point) -> None:
        """Make a point of a file that was brought here under its own name, from another repository.

        Raises BackupBroken (it does not stand on what its manifest says), HypervisorRefused.
        """
        file = self.file(point)
        below = self.get(point.vm_id, point.parent) if point.parent else None
        self._check_backing(file, point, below, header(file))
        with self.bases.locked(), storage_errors(f"writing backup point {point.id}"):
            if point.base is not None and not self.bases.file(point.base).is_file():
                raise BackupBroken(f"base image {point.base.name} of {point.id} is missing", next="Copy it once more")
            if point.base is not None:
                self.bases.note(point.base)
            self._sync_folders(file)
            write_durably(file.with_name(point.manifest_name), manifests.dump(point))

    def drop_partials(self, point: Point) -> None:
        """Remove what dead attempts to rewrite this point left; a merge's intent is ended by ``merging.settle``."""
        for left in self.file(point).parent.glob(f".*{point.seq:04d}.*"):
            if PARTIAL in left.name and not left.name.endswith(f".merge{PARTIAL}"):
                left.unlink(missing_ok=True)

    def discard(self, point: Point) -> None:
        """Remove the point's file and manifest, whatever stands on it: it is about to be brought here anew."""
        file = self.file(point)
        file.with_name(point.manifest_name).unlink(missing_ok=True)
        file.unlink(missing_ok=True)

    def complete(
        self, partial: Path, draft: Point, *, on_progress: OnProgress | None, cancelled: IsCancelled | None
    ) -> Point:
        """``draft`` with the sizes and hash of the file ``partial``, made durable; BackupBroken if it stands wrong."""
        info = header(partial)
        below = self.get(draft.vm_id, draft.parent) if draft.parent else None
        self._check_backing(partial, draft, below, info)
        with storage_errors(f"writing {partial.name}"):
            sync(partial)
        digest = sha256(partial, on_progress=on_progress, cancelled=cancelled)
        return manifests.stamped(
            draft, disk_bytes=info["virtual-size"], file_bytes=partial.stat().st_size, sha256=digest
        )

    def points(self, vm_id: str | None = None, damaged: list[str] | None = None) -> list[Point]:
        """All points (of one VM), oldest chain first, in order. Unreadable manifests are named in ``damaged``."""
        pattern = "*/*/*.json" if vm_id is None else f"{manifests.check_vm_id(vm_id)}/*/*.json"
        found = []
        for path in sorted(self.folder.glob(pattern)):
            try:
                found.append(self._read(path))
            except BackupBroken as error:
                if damaged is not None:
                    damaged.append(str(error))
        started: dict[tuple[str, str], str] = {}
        for point in found:
            key = (point.vm_id, point.chain)
            started[key] = min(point.created_at, started.get(key, point.created_at))
        return sorted(found, key=lambda p: (p.vm_id, started[p.vm_id, p.chain], p.chain, p.seq))

    def vm_ids(self) -> list[str]:
        """Ids of the VMs that have a folder here, sorted."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir() and manifests.is_vm_id(path.name))

    def get(self, vm_id: str, point_id: str) -> Point:
        """The point with this id; raises NotFound (also when its manifest is damaged, and says so)."""
        damaged: list[str] = []
        for point in self.points(vm_id, damaged):
            if point.id == point_id:
                return point
        why = f" (damaged: {'; '.join(damaged)})" if damaged else ""
        raise NotFound(f"VM {vm_id} has no backup point {point_id}{why}", next="See: hdcs backup list")

    def links(self, point: Point) -> list[Point]:
        """The points ``point`` is made of, full one first; raises BackupBroken if one is missing or does not fit."""
        by_id = {p.id: p for p in self._chain(point)}
        if by_id.get(point.id) != point:
            raise BackupBroken(f"backup point {point.id} is missing or not what was read before", next="Read it anew")
        chain = [point]
        while (parent := chain[-1].parent) is not None:
            link = by_id.get(parent)
            if link is None or link.base != point.base or link.seq >= chain[-1].seq:
                raise BackupBroken(
                    f"backup point {point.id} stands on {parent}, which is missing or does not fit",
                    next="Restore an earlier point; the next backup is a full one",
                )
            chain.append(link)
        return chain[::-1]

    def verify(
        self,
        point: Point,
        *,
        base: bool = True,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
    ) -> None:
        """Read all that ``point`` is made of and compare with the manifests; raises BackupBroken saying what is wrong.

        Per link: seal, size, hash, backing file, ``qemu-img check``. ``base``: hash the base image as well, else it
        only must be there.
        """
        chain = self.links(point)
        image = None if point.base is None else self.bases.file(point.base)
        if image is not None and not image.is_file():
            raise BackupBroken(f"base image {image.name} of {point.id} is missing", next="Import that version again")
        steps = len(chain) + (1 if base and image else 0)
        below: Point | None = None
        for number, link in enumerate(chain):
            self._verify_file(link, below, share(on_progress, number, steps, "verify"), cancelled)
            below = link
        if base and image is not None and point.base is not None:
            tell = share(on_progress, len(chain), steps, "verify")
            if sha256(image, on_progress=tell, cancelled=cancelled) != point.base.file_sha256:
                raise BackupBroken(
                    f"base image {image.name} of {point.id} has changed", next="Import that version again"
                )

    def restore(
        self,
        point: Point,
        target: Path,
        *,
        image: Path | None,
        key: Key | None = None,
        bitmap: bool = True,
        attempt: str = "restore",
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
        deadline_s: float = 3600,
    ) -> None:
        """Make ``target`` a disk with the content of ``point``: one overlay on ``image``, ready to be cloned from.

        ``image``: the file of the point's base image (``bases.bring_back``), None where it has none. The disk holds
        just what differs from it, and a seed bitmap (unless ``bitmap`` is False), and is encrypted with ``key``.
        ``verify`` first. Written to a partial file of ``attempt`` beside ``target``. Raises Conflict (``target``
        exists), BackupBroken, Cancelled, HypervisorRefused.
        """
        if target.exists():
            raise Conflict(f"{target.name} exists", next="Restore under another name, or delete that VM first")
        self.check_headers(self.links(point))
        partial = target.with_name(f".{target.name}.{manifests.check_name('attempt', attempt)}{PARTIAL}")
        partial.unlink(missing_ok=True)
        backing = None if image is None or point.base is None else Backing(os.path.abspath(image), point.base.format)
        try:
            with storage_errors(f"restoring {point.id}"):
                flatten(
                    self.file(point), partial, backing, share(on_progress, 0, 1, "restore"), cancelled, deadline_s,
                    keys=self.keys_of(point), key=key,
                )  # fmt: skip
                if bitmap:
                    ensure_seed(partial, key=key)
                sync(partial)
                os.link(partial, target)  # fails, where a rename would overwrite, if somebody made it meanwhile
        except FileExistsError:
            raise Conflict(f"{target.name} exists", next="Restore under another name") from None
        finally:
            partial.unlink(missing_ok=True)
        sync(target.parent)

    def check_headers(self, chain: Sequence[Point]) -> None:
        """Raise BackupBroken unless each file of ``links`` names the one below it, and no other file."""
        below: Point | None = None
        for link in chain:
            self._check_backing(self.file(link), link, below, header(self.file(link)))
            below = link

    def compare(
        self, point: Point, disk: Path, *, key: Key | None = None, cancelled: IsCancelled | None = None,
        timeout_s: float = 3600,
    ) -> bool:  # fmt: skip
        """Whether ``disk`` (of no running guest; encrypted with ``key``) has exactly the content of ``point``."""
        return same_content(
            self.file(point), disk, self.keys_of(point), (key,), cancelled=cancelled, timeout_s=timeout_s
        )  # fmt: skip

    def delete(self, vm_id: str, chain: str, seq: int, point_id: str) -> bool:
        """Delete a point, also one whose manifest is damaged; False if it was gone.

        Raises Conflict while others stand on it.
        """
        carried = [p.id for p in self.points(vm_id) if p.chain == chain and p.parent == point_id]
        if carried:
            raise Conflict(
                f"backup point {point_id} carries {', '.join(carried)}",
                next="Delete the later points of its chain first",
            )
        file = self.chain_folder(vm_id, chain) / f"{seq:04d}.qcow2"
        manifest = file.with_suffix(".json")
        was = manifest.exists() or file.exists()
        manifest.unlink(missing_ok=True)  # first: a file without manifest is no point, the other way is a broken one
        if file.parent.is_dir():
            sync(file.parent)
        file.unlink(missing_ok=True)
        self._remove_empty(file.parent)
        return was

    def drop_unused_bases(self) -> list[str]:
        """Delete base images no manifest names; returns their hashes. Does nothing while a manifest is unreadable."""
        with self.bases.locked():
            damaged: list[str] = []
            used = {p.base.file_sha256 for p in self.points(None, damaged) if p.base is not None}
            # A backup under way may stand on one; an attempt nobody took up again for so long is none.
            busy = [left for left in self.leftovers() if not leftovers.drop_if_old(left)]
            return [] if damaged or busy else self.bases.drop_all_but(used)

    def delete_chain(self, vm_id: str, chain: str) -> int:
        """Delete all points of a chain, last first, and its leftovers; returns how many points there were."""
        folder = self.chain_folder(vm_id, chain)
        points = [p for p in self.points(vm_id) if p.chain == chain]
        for point in sorted(points, key=lambda p: -p.seq):
            self.delete(point.vm_id, point.chain, point.seq, point.id)
        for left in [*folder.glob("*.json"), *folder.glob("*.qcow2"), *folder.glob(f".*{PARTIAL}*")]:
            left.unlink(missing_ok=True)
        self._remove_empty(folder)
        return len(points)

    def leftovers(self, vm_id: str | None = None) -> Iterator[Path]:
        """Files that are no point (partial, or without manifest): of dead attempts, or just being made."""
        return leftovers.find(self.folder, "*" if vm_id is None else manifests.check_vm_id(vm_id))

    def forget_empty(self, vm_id: str, chain: str) -> None:
        """Remove a chain's folder, and the VM's, if nothing is in them."""
        self._remove_empty(self.chain_folder(vm_id, chain))

    def _chain(self, point: Point) -> list[Point]:
        return [p for p in self.points(point.vm_id) if p.chain == point.chain]

    def _read(self, path: Path) -> Point:
        where = str(path.relative_to(self.folder))
        if path.is_symlink() or not path.is_file() or path.stat().st_size > manifests.MANIFEST_MAX_BYTES:
            raise BackupBroken(f"{where} is not a plain manifest file", next="Remove it")
        point = manifests.load(path.read_bytes(), where)
        if self.file(point).with_name(point.manifest_name) != path:
            raise BackupBroken(f"{where} describes another point ({point.id})", next="Put it back where it was")
        return point

    def _verify_file(
        self, link: Point, below: Point | None, tell: OnProgress | None, cancelled: IsCancelled | None
    ) -> None:
        file = self.file(link)
        if file.is_symlink() or not file.is_file():
            raise BackupBroken(f"{link.file_name} of chain {link.chain} is missing", next="Restore an earlier point")
        digest = sha256(file, on_progress=tell, cancelled=cancelled)
        if file.stat().st_size != link.file_bytes or digest != link.sha256:
            raise BackupBroken(
                f"{link.file_name} of chain {link.chain} is not the file that was written",
                next="Check the storage; restore an earlier point",
            )
        self._check_backing(file, link, below, header(file))
        if not self._is_sound(file, link):
            raise BackupBroken(f"qemu-img check fails on {link.file_name}", next="Restore an earlier point")

    def _is_sound(self, file: Path, link: Point) -> bool:
        """QEMU's own check. What is encrypted with a key this node lacks has the hash of the file that was written,
        and that must do."""
        try:
            chain = self.keys_of(link)
        except NotFound:
            return True
        argv = ["-q", *keys.opened(file, chain)]
        return keys.run(["qemu-img", "check"], *argv, keys=chain, timeout_s=3600, ok=(0, 1, 2, 3)).exit_code == 0

    def _check_backing(self, file: Path, point: Point, below: Point | None, info: dict[str, Any]) -> None:
        """Refuse ``file`` unless its header names exactly what ``point`` stands on, and no file outside of it."""
        stands_on = below or point.base
        want = self.backing(stands_on, point.vm_id, point.chain) if stands_on is not None else None
        data = info.get("format-specific", {}).get("data", {})
        seen = (info.get("backing-filename"), info.get("backing-filename-format"), data.get("data-file"))
        if seen != (want.path if want else None, want.format if want else None, None):
            raise BackupBroken(
                f"{file.name} stands on {seen[0]!r} ({seen[1]}), not on {want.path if want else 'nothing'!r}",
                next="It was not written by HDCS or was changed: restore an earlier point",
            )

    def _sync_folders(self, file: Path) -> None:
        """The names of a chain's files and, as the chain may be new, of its folder and the VM's."""
        for folder in (file.parent, file.parent.parent, self.folder):
            sync(folder)

    def _remove_empty(self, folder: Path) -> None:
        for each in (folder, folder.parent):
            try:
                each.rmdir()
            except OSError:
                return  # not empty, or gone
