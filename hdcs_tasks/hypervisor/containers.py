"""A base image in an encrypted repository: a LUKS container with the image's own file in it, byte for byte.

qcow2 with LUKS inside, as points are, would not do: an image that comes back must have the hash it was added with.
QEMU reads the image through the container (qcow2 on LUKS on a file); any other LUKS tool opens it as well.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import BackupBroken, HypervisorRefused
from hdcs_tasks.hypervisor import keys
from hdcs_tasks.hypervisor.disks import partial_file, sha256
from hdcs_tasks.hypervisor.jobs import IsCancelled
from hdcs_tasks.hypervisor.keys import Key
from hdcs_tasks.hypervisor.manifests import BaseImage

_SECTOR = 512
_LONG_S = 6 * 3600.0


def around(key: Key | None) -> Key | None:
    """The key as QEMU is to use it: of a container around a qcow2 file, not of a qcow2 with LUKS inside."""
    return key and replace(key, container=True)


def write(image: Path, container: Path, key: Key, *, cancelled: IsCancelled | None = None) -> None:
    """Make ``container`` of the file ``image``, and read it back to see that it holds the same.

    Raises BackupBroken (it does not), Cancelled, HypervisorRefused. A half written one is left to the caller.
    """
    sectors = -(-image.stat().st_size // _SECTOR)
    options = f"key-secret={key.id},iter-time=10,hash-alg=sha512"
    keys.run(
        ["qemu-img", "create"], "-q", "-f", "luks", "-o", options, container, str(sectors * _SECTOR), keys=(key,),
        timeout_s=keys.CREATE_S,
    )  # fmt: skip
    inside = _inside(container, key)
    how: dict[str, Any] = {"keys": (key,), "timeout_s": _LONG_S, "cancelled": cancelled}
    # What is empty in the image must be written, too: in a container nothing is empty.
    keys.run(["qemu-img", "convert"], "-n", "-f", "raw", "--target-image-opts", image.absolute(), inside, **how)
    same = keys.run(
        ["qemu-img", "compare"], "--image-opts", f"driver=raw,file.filename={_escaped(image)}", inside, ok=(0, 1), **how
    )
    if same.exit_code != 0:
        raise BackupBroken(f"{image.name} is not the same in its container", next="Check the storage, then try again")


def opens(container: Path, key: Key) -> bool:
    """Whether it was made with this key, and not with one that had the name before."""
    try:
        keys.run(
            ["qemu-io"], "-r", "--image-opts", "-c", "read -q 0 512", _inside(container, key), keys=(key,),
            timeout_s=keys.CREATE_S,
        )  # fmt: skip
    except HypervisorRefused as error:
        if "Invalid password" in error.message:
            return False
        raise
    return True


def read(
    container: Path, base: BaseImage, target: Path, key: Key, *, cancelled: IsCancelled | None = None,
    attempt: str = "0",
) -> None:  # fmt: skip
    """Make ``target`` the file ``container`` was made of. Raises BackupBroken (it is not what ``base`` says), Conflict
    (``target`` exists), Cancelled, HypervisorRefused."""
    with partial_file(target, attempt) as partial:
        keys.run(
            ["qemu-img", "convert"], "--image-opts", "-O", "raw", _inside(container, key), partial.absolute(),
            keys=(key,), timeout_s=_LONG_S, cancelled=cancelled,
        )  # fmt: skip
        os.truncate(partial, base.file_bytes)  # the container counts in sectors
        if sha256(partial, cancelled=cancelled) != base.sha256:
            raise BackupBroken(
                f"container {container.name} does not hold image {base.name}:{base.version}",
                next="Import that version again",
            )


def _inside(container: Path, key: Key) -> str:
    return f"driver=luks,key-secret={key.id},file.driver=file,file.filename={_escaped(container)}"


def _escaped(path: Path) -> str:
    return str(path.absolute()).replace(",", ",,")
