"""Where images may come from and go to on a server node: the storage's own folders, allowed ones, devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hdcs_tasks.errors import Invalid, Rejected
from hdcs_tasks.hypervisor import storage
from hdcs_tasks.hypervisor.conversion import Watch
from hdcs_tasks.image import rules
from hdcs_tasks.operations.node import Run


def layout(run: Run) -> storage.StorageLayout:
    return storage.check(run.ctx.settings.storage_root, run.ctx.domain_node)


def watch(run: Run, place: storage.StorageLayout | None) -> Watch:
    """What goes with a conversion of this step; ``place``: the storage it writes to."""
    return Watch(
        on_progress=run.progress, cancelled=run.cancelled, storage=place.root if place else None,
        timeout_s=run.ctx.settings.step_deadline_s,
    )  # fmt: skip


@contextmanager
def named_here(run: Run) -> Iterator[None]:
    """A refusal of what lies on this server node names it: which one looks, the caller did not choose."""
    try:
        yield
    except Rejected as error:
        words = f"on server node {run.ctx.server_node}: {error.message}"
        raise type(error)(words, next=error.next, details=error.details) from error


def source_of(run: Run, place: storage.StorageLayout, path: str) -> tuple[Path, Path]:
    """The file or device to import, and the folder it must not lead out of. Raises Invalid."""
    return _resolve(place, path, "import", run.ctx.settings.import_paths, "HDCS_IMPORT_PATHS")


def target_of(run: Run, place: storage.StorageLayout, path: str) -> Path:
    """The file or device to export to. Raises Invalid."""
    found, root = _resolve(place, path, "export", run.ctx.settings.export_paths, "HDCS_EXPORT_PATHS")
    if not found.parent.resolve().is_relative_to(root.resolve()):
        raise Invalid(f"{path} is linked out of {root}", next="Choose a plain folder")
    return found


def _resolve(
    place: storage.StorageLayout, path: str, folder: str, setting: str, setting_name: str
) -> tuple[Path, Path]:
    own = place.root / folder
    kind = rules.place_of(path)
    if kind is rules.Place.DEVICE:
        return Path(path), Path("/dev")
    if kind is rules.Place.STORAGE:
        return place.path(folder, *path.split("/")), own
    root = rules.below(path, [str(own), *rules.folders_of(setting)])
    if root is None:
        raise Invalid(
            f"{path} lies in no folder that images may be {folder}ed {'from' if folder == 'import' else 'to'}",
            next=f"Use the storage's {folder}/ folder (name the file alone), or allow its folder in {setting_name}",
        )
    return Path(path), Path(root)
