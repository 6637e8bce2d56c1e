"""Layers of a backup: a qcow2 file that holds what differs from its backing file, in clear or encrypted.

Every file of a chain may have another key (``keys.py``); qemu-img is told those of all it opens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdcs_tasks.hypervisor import keys as _keys
from hdcs_tasks.hypervisor import processes
from hdcs_tasks.hypervisor.jobs import IsCancelled, OnProgress
from hdcs_tasks.hypervisor.keys import Key, Keys

_QUICK_S = 60.0


@dataclass(frozen=True)
class Backing:
    """What a backup file stands on. ``path``: absolute, or relative to the backup file's folder; ``keys``: its own and
    those of the layers below it; ``depth``: how many layers below the source it is, where it is one of the source's."""

    path: str
    format: str = "qcow2"
    keys: Keys = ()
    depth: int | None = None


def create_layer(target: Path, backing: Backing | None, size_bytes: int, key: Key | None) -> None:
    """An empty layer; ``backing`` is not opened."""
    on = [] if backing is None else ["-u", "-F", backing.format, "-b", backing.path]
    _keys.run(
        ["qemu-img", "create"], "-q", "-f", "qcow2", *_keys.encryption(key), *on, target, str(size_bytes), keys=(key,),
        timeout_s=_keys.CREATE_S if key else _QUICK_S,
    )  # fmt: skip


def set_backing(target: Path, backing: Backing, key: Key | None) -> None:
    """Write into the header of ``target`` what it stands on, without looking at the content of either."""
    where = _keys.named(target, (key,))
    _keys.run(
        ["qemu-img", "rebase"], "-u", "-F", backing.format, "-b", backing.path, where, keys=(key,), timeout_s=_QUICK_S
    )  # fmt: skip


def extract_layer(
    source: Path,
    target: Path,
    backing: Backing,
    on_progress: OnProgress | None,
    cancelled: IsCancelled | None,
    timeout_s: float,
    *,
    keys: Keys = (),
    key: Key | None = None,
) -> None:
    """Write to ``target``, on ``backing``, exactly the clusters in which ``source`` (qcow2, any chain) differs from it.

    An empty overlay is rebased safely, which compares. (``qemu-img convert -B`` would not do: of a chain it
    copies the top layer only.) ``keys``: of ``source`` and what it stands on; ``key``: the one ``target`` gets. A
    ``target`` half written is deleted. Raises Cancelled, HypervisorRefused.
    """
    try:
        _extract(source, target, backing, _telling(on_progress, "compare"), cancelled, timeout_s, keys, key)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _extract(
    source: Path, target: Path, backing: Backing, on_percent: Callable[[float], None], cancelled: IsCancelled | None,
    timeout_s: float, of_source: Keys, key: Key | None,
) -> None:  # fmt: skip
    overlay = Backing(os.path.abspath(source), keys=of_source)
    if not any((key, *of_source, *backing.keys)):
        _keys.run(
            ["qemu-img", "create"], "-q", "-f", "qcow2", "-F", "qcow2", "-b", overlay.path, target, timeout_s=_QUICK_S
        )  # fmt: skip
        _keys.run(
            ["qemu-img", "rebase"], "-p", "-F", backing.format, "-b", backing.path, target, timeout_s=timeout_s,
            on_percent=on_percent, cancelled=cancelled,
        )  # fmt: skip
        return
    create_layer(target, overlay, virtual_bytes(source), key)
    where, below, fmt = _names(target, backing, (key, *of_source))
    _keys.run(
        ["qemu-img", "rebase"], "-p", "-F", fmt, "-b", below, where, keys=(key, *of_source, *backing.keys),
        timeout_s=timeout_s, on_percent=on_percent, cancelled=cancelled,
    )  # fmt: skip
    set_backing(target, backing, key)


def _names(target: Path, backing: Backing, keys: Keys) -> tuple[str, str, str]:
    """How QEMU is told of the file that is rebased, of its new backing file, and that one's format."""
    if backing.depth is not None:
        return *_keys.named_with(target, keys, backing.depth + 1), "raw"
    # QEMU resolves no relative name below a file it was told the keys of: the absolute one first, then as it is to be.
    below = Path(os.path.normpath(target.absolute().parent / backing.path))
    return _keys.named(target, keys), _keys.named(below, backing.keys), backing.format


def flatten(
    source: Path,
    target: Path,
    backing: Backing | None,
    on_progress: OnProgress | None,
    cancelled: IsCancelled | None,
    timeout_s: float,
    *,
    keys: Keys = (),
    key: Key | None = None,
) -> None:
    """Write what ``source`` (qcow2, any chain) shows to ``target``: one layer on ``backing``, or (None) on nothing.

    ``keys`` and ``key`` as in ``extract_layer``."""
    if backing is not None:
        extract_layer(source, target, backing, on_progress, cancelled, timeout_s, keys=keys, key=key)
        return
    _convert(source, target, _telling(on_progress, "copy"), cancelled, timeout_s, keys, key)


def _convert(
    source: Path, target: Path, on_percent: Callable[[float], None], cancelled: IsCancelled | None, timeout_s: float,
    of_source: Keys, key: Key | None,
) -> None:  # fmt: skip
    how: dict[str, Any] = {"timeout_s": timeout_s, "on_percent": on_percent, "cancelled": cancelled}
    if key is None:
        argv = [*_keys.opened(source, of_source), "-O", "qcow2", str(target)]
        _keys.run(["qemu-img", "convert"], "-p", *argv, keys=of_source, **how)
        return
    create_layer(target, None, virtual_bytes(source), key)  # by itself: making the header may have to be tried again
    into = ["-n", "--target-is-zero", "--target-image-opts"]
    argv = [*into, *_keys.opened(source, of_source), _keys.options(target, key)]
    _keys.run(["qemu-img", "convert"], "-p", *argv, keys=(key, *of_source), **how)


def same_content(
    one: Path, other: Path, of_one: Keys = (), of_other: Keys = (), *, cancelled: IsCancelled | None = None,
    timeout_s: float = 3600,
) -> bool:  # fmt: skip
    """Whether a guest would read the same from both qcow2 files; both of no running guest."""
    first, second = _keys.opened(one, of_one), _keys.opened(other, of_other)
    second = ["-F" if each == "-f" else each for each in second]
    options = [*first[:-1], *second[:-1]]
    done = _keys.run(
        ["qemu-img", "compare"], *options, first[-1], second[-1], keys=(*of_one, *of_other), timeout_s=timeout_s,
        cancelled=cancelled, ok=(0, 1),
    )  # fmt: skip
    return done.exit_code == 0


def header(file: Path) -> dict[str, Any]:
    """What the header of ``file`` says, alone: no backing file is opened, no key needed. Bounded: it may be hostile."""
    argv = ["qemu-img", "info", "--output=json", "-f", "qcow2", str(file)]
    found: dict[str, Any] = json.loads(processes.run(argv, timeout_s=_QUICK_S, memory_mib=2048, cpu_s=30).stdout)
    return found


def virtual_bytes(file: Path) -> int:
    """What a guest sees of it."""
    return int(header(file)["virtual-size"])


def _telling(on_progress: OnProgress | None, phase: str) -> Callable[[float], None]:
    def tell(percent: float) -> None:
        if on_progress is not None:
            on_progress(percent, phase, None)

    return tell
