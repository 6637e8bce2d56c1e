"""Publishes the node program to a domain node's shared storage, where any server that mounts it can start it.

    STORAGE/agent/hdcs-node              launcher: needs Debian's python3 and libvirt on the server, nothing else
    STORAGE/agent/node.env               HDCS_* settings the server nodes share (mode 0600)
    STORAGE/agent/current                -> releases/HASH, switched in one step
    STORAGE/agent/releases/HASH/app,lib  the code, and the libraries a server node uses

    deploy/agent STORAGE [--domain-node NAME] [--env-file FILE]

Running workers keep the release they started from; the two before the current one are kept for them.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hdcs_tasks.errors import HdcsError, Invalid, NotFound
from hdcs_tasks.hypervisor.storage import prepare

CHECKOUT = Path(__file__).resolve().parents[1]
LOCK = CHECKOUT / "deploy" / "requirements.lock"
LAUNCHER = CHECKOUT / "deploy" / "hdcs-node"
CODE = ("hdcs_tasks", "workers")
MODULES = ("beat_schedule.py",)  # the Celery app reads it wherever it is loaded
KEEP_RELEASES = 3
# the control plane's libraries: a server node has no database and no dashboard
NOT_ON_NODES = frozenset({
    "alembic", "flower", "greenlet", "humanize", "mako", "markupsafe", "prometheus-client", "psycopg", "psycopg-binary",
    "pytz", "sqlalchemy", "tornado",
})  # fmt: skip


@dataclass(frozen=True)
class Release:
    """A published release: its folder on the storage, seconds it took, and whether it was there already."""

    path: Path
    seconds: float
    reused: bool


def publish(
    storage: Path, env_file: Path | None = None, *, copy: Callable[[str, str], object] = shutil.copy2
) -> Release:
    """Put this checkout's node program on ``storage`` and make it the current one.

    ``copy`` puts one file of a library there, of its path to its new path.
    A reader never sees half a release: it is copied aside, renamed, and ``current`` is replaced in one step. Raises
    NotFound when ``storage`` is no folder and Invalid when a library of the lock is not in this environment.
    """
    started = time.monotonic()
    if not storage.is_dir():
        raise NotFound(f"{storage} is not a folder", next="Mount the domain node's shared storage there first")
    agent = storage / "agent"
    releases = agent / "releases"
    releases.mkdir(parents=True, exist_ok=True)
    target = releases / _digest()
    reused = target.is_dir()
    if not reused:
        _copy_release(target, copy)
    _replace_file(LAUNCHER, agent / "hdcs-node", 0o755)
    if env_file is not None:
        _replace_file(env_file, agent / "node.env", 0o600)
    link = agent / f".current-{os.getpid()}"
    link.symlink_to(Path("releases", target.name))
    link.replace(agent / "current")
    os.utime(target)
    _drop_old(releases, target)
    return Release(target, time.monotonic() - started, reused)


def _digest() -> str:
    """Names a release by what is in it: code, locked libraries, Python."""
    digest = hashlib.sha256(LOCK.read_bytes() + sys.version.encode())
    for folder in CODE:
        for file in sorted((CHECKOUT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(CHECKOUT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _copy_release(target: Path, copy: Callable[[str, str], object]) -> None:
    aside = target.with_name(f".{target.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        app, lib = aside / "app", aside / "lib"
        app.mkdir(parents=True)
        lib.mkdir()
        # compiled files come along, half-written ones do not; what is stale or missing is compiled below
        for folder in CODE:
            shutil.copytree(CHECKOUT / folder, app / folder, ignore=shutil.ignore_patterns("*.pyc.*"))
        for module in MODULES:
            shutil.copy2(CHECKOUT / module, app / module)
        compileall.compile_dir(app, quiet=2)
        for source in _library_files():
            if source.is_dir():
                shutil.copytree(source, lib / source.name, copy_function=copy)
            else:
                copy(str(source), str(lib / source.name))
        (aside / "python").write_text(f"{sys.version_info.major}.{sys.version_info.minor}\n")
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _library_files() -> Iterator[Path]:
    """Top-level files and folders, in this environment, of the libraries a server node uses."""
    seen: set[Path] = set()
    for name in re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(), re.M):
        if name in NOT_ON_NODES:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if _locked_for_others(name):
                continue
            raise Invalid(f"{name} is locked but not installed", next="Run deploy/bootstrap") from None
        for file in found.files or ():
            if file.parts[0] not in {"..", "__pycache__"}:
                top = Path(str(found.locate_file(file.parts[0])))
                if top not in seen and top.exists():
                    seen.add(top)
                    yield top


def _locked_for_others(name: str) -> bool:
    """Whether the lock asks for ``name`` only on another Python or platform (it has an environment marker)."""
    return re.search(rf"^{re.escape(name)}==\S+ ;", LOCK.read_text(), re.M) is not None


def _replace_file(source: Path, target: Path, mode: int) -> None:
    aside = target.with_name(f".{target.name}-{os.getpid()}")
    aside.touch(mode=mode)
    aside.write_bytes(source.read_bytes())
    aside.chmod(mode)
    aside.replace(target)


def _drop_old(releases: Path, current: Path) -> None:
    old = [p for p in releases.iterdir() if not p.name.startswith(".") and p != current]
    for path in sorted(old, key=lambda p: p.stat().st_mtime, reverse=True)[KEEP_RELEASES - 1 :]:
        shutil.rmtree(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/agent", description=__doc__.splitlines()[0])
    parser.add_argument("storage", type=Path, help="mount point of the domain node's shared storage")
    parser.add_argument(
        "--domain-node", metavar="NAME", help="make a new storage this domain node's: its folders and its marker file"
    )
    parser.add_argument("--env-file", type=Path, help="HDCS_* settings the server nodes share; becomes agent/node.env")
    args = parser.parse_args()
    try:
        if args.domain_node:
            prepare(args.storage, args.domain_node)
        release = publish(args.storage, args.env_file)
    except HdcsError as error:
        print(f"agent: {error}", file=sys.stderr)
        return error.exit_code
    how = "was there" if release.reused else "published"
    print(
        f"{release.path} {how} ({release.seconds:.1f} s); on a server: {args.storage}/agent/hdcs-node", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
