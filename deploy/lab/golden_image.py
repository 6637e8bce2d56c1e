"""Builds ``mini.qcow2``, the lab's golden image: a tiny Linux with qemu-guest-agent that boots from its own disk.

Everything in it comes from Debian's packages (kernel, busybox, agent, its libraries, GRUB), fetched with apt and
unpacked into a cache; nothing is installed. The root file system is a real, writable ext4: what a guest writes is still
there after a reboot and in a backup. 96 MiB of memory are enough.

    python -m deploy.lab.golden_image [--cache DIR] [--out FILE]

In the guest: agent with guest-exec, freeze and shutdown; DHCP asked anew after each bounce of the link; ACPI power
button; ``/run/tick`` (counter, uptime, longest gap: see guest/tick.c); ``burn SECONDS``; ``sit NAME`` (a login at the
console; anna has an account); ``wall``.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.lab.guest_disk import cpio_newc, modules_in_order, write_disk
from hdcs_tasks.errors import HdcsError, Invalid

GUEST = Path(__file__).parent / "guest"
SIZE_MIB = 192
LABEL = "hdcs-mini"
KERNEL_META = "linux-image-cloud-amd64"
PACKAGES = (
    "busybox-static", "qemu-guest-agent", "grub-pc-bin", "grub-common",
    # libraries of the agent and of grub-mkimage
    "libc6", "libglib2.0-0", "libpcre2-8-0", "libudev1", "liburing2", "libnuma1", "liblzma5", "libdevmapper1.02.1",
    "libselinux1",
)  # fmt: skip
ROOT_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
GUEST_MODULES = ("virtio_console", "virtio_net", "virtio_balloon", "virtio_rng", "button", "evdev", "af_packet")
GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux16", "boot")
ROOT_FILES = {  # where each file of guest/ goes; all executable, which hurts none of them
    "inittab": "etc/inittab", "rcS": "etc/rcS", "udhcpc.script": "etc/udhcpc.script",
    "guest-agent": "bin/guest-agent", "netd": "bin/netd", "burn": "bin/burn", "sit": "bin/sit",
    "wall": "bin/wall", "shutdown": "sbin/shutdown",
    "power-button": "etc/acpi/PWRF/00000080",
}  # fmt: skip
LIBRARY_DIRS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")


@dataclass(frozen=True)
class GoldenImage:
    """A built image: ``path`` of the qcow2 file, seconds it took, and whether the cache had it."""

    path: Path
    seconds: float
    cached: bool


def default_cache() -> Path:
    """``HDCS_LAB_CACHE``, else ``.lab/cache`` in the checkout."""
    return Path(os.environ.get("HDCS_LAB_CACHE") or Path(__file__).parents[2] / ".lab" / "cache")


def build(cache: Path | None = None) -> GoldenImage:
    """Build the image, or take the one built before from the same scripts and package versions.

    Two callers at once are safe: the second waits and finds the first one's image. Raises HdcsError when apt has no
    package lists or a tool fails.
    """
    started = time.monotonic()
    cache = cache or default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    debs = _known_debs(cache)
    target = cache / f"mini-{_key(debs)}.qcow2"
    with _locked(cache / "golden.lock"):
        cached = target.exists()
        if not cached:
            with tempfile.TemporaryDirectory(prefix="golden-", dir=cache) as work:
                unpacked = Path(work, "x")
                _unpack(_download(debs, cache / "debs"), unpacked)
                made = _make(unpacked, Path(work))
                made.replace(target)
    return GoldenImage(target, time.monotonic() - started, cached)


def _key(debs: list[str]) -> str:
    digest = hashlib.sha256(repr(sorted(debs)).encode())
    here = Path(__file__).parent
    for file in (here / "golden_image.py", here / "guest_disk.py", *sorted(GUEST.iterdir())):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*argv: str | Path, cwd: Path | None = None) -> str:
    """Run a tool and return its stdout; HdcsError with its last words if it fails."""
    try:
        done = subprocess.run([str(a) for a in argv], cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Invalid(f"the golden image needs {argv[0]}, which is not here", next="Run ./deploy/run true") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise HdcsError(f"{argv[0]} failed with {done.returncode}: {' / '.join(words[-3:])}")
    return done.stdout


def _known_debs(cache: Path) -> list[str]:
    """``_wanted_debs``, remembered until apt's package lists change (apt takes a second to read them)."""
    lists = sorted((p.name, p.stat().st_mtime_ns) for p in Path("/var/lib/apt/lists").glob("*_Packages*"))
    memo = cache / f"debs-{hashlib.sha256(repr((PACKAGES, lists)).encode()).hexdigest()[:16]}.list"
    if not lists or not memo.exists():
        debs = _wanted_debs()
        aside = memo.with_suffix(f".{os.getpid()}")
        aside.write_text("\n".join(debs))
        aside.replace(memo)
    return memo.read_text().splitlines()


def _wanted_debs() -> list[str]:
    """Package files apt would fetch, newest of the configured Debian release (no network used)."""
    try:
        depends = _run("apt-cache", "depends", KERNEL_META)
        kernel = re.search(r"Depends: (linux-image-\S+)", depends)
        if not kernel:
            raise HdcsError(f"{KERNEL_META} depends on no kernel")
        uris = _run("apt-get", "download", "--print-uris", kernel[1], *PACKAGES)
    except HdcsError as error:
        raise HdcsError(
            f"apt does not know the packages of the golden image ({error.message})",
            next="Run: apt-get update; a Debian 12 amd64 machine has them all",
        ) from error
    return [f"{m[1]} {m[2]}" for m in re.finditer(r"^'[^']+' (\S+)_[^_\s]+\.deb \d+ (\S+)", uris, re.M)]


def _download(debs: list[str], folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    names = [d.split()[0] for d in debs]
    have = {p.name.rsplit("_", 1)[0]: p for p in folder.glob("*.deb")}
    missing = [n for n in names if n not in have]
    if missing:
        specs = [re.sub(r"^([^_]+)_(.+)$", r"\1=\2", n).replace("%3a", ":") for n in missing]
        # as root apt would change to a user who may not write here, and warn about it
        sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        _run("apt-get", "download", "-q", *sandbox, *specs, cwd=folder)
        have = {p.name.rsplit("_", 1)[0]: p for p in folder.glob("*.deb")}
    return [have[n] for n in names]


def _unpack(debs: list[Path], target: Path) -> None:
    target.mkdir()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda deb: _run("dpkg-deb", "-x", deb, target), debs))


def _make(unpacked: Path, work: Path) -> Path:
    root = work / "root"
    modules = _kernel_dir(unpacked)
    _fill_root(root, unpacked, modules)
    (root / "boot" / "initrd.gz").write_bytes(_initramfs(work / "initramfs", unpacked, modules))
    shutil.copyfile(next((unpacked / "boot").glob("vmlinuz-*")), root / "boot" / "vmlinuz")
    raw, out = work / "mini.raw", work / "mini.qcow2"
    write_disk(raw, root, SIZE_MIB, unpacked / "usr/lib/grub/i386-pc/boot.img", _grub_core(unpacked, work), LABEL)
    _run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, out)
    return out


def _kernel_dir(unpacked: Path) -> Path:
    return next((unpacked / "lib" / "modules").iterdir())


def _with_libraries(unpacked: Path, program: Path) -> list[Path | str]:
    """Command line that runs ``program`` with the unpacked loader and libraries, never with this machine's."""
    dirs = ":".join(str(unpacked / d) for d in LIBRARY_DIRS)
    return [unpacked / "lib64/ld-linux-x86-64.so.2", "--library-path", dirs, program]


def _grub_core(unpacked: Path, work: Path) -> bytes:
    core = work / "core.img"
    mkimage = _with_libraries(unpacked, unpacked / "usr/bin/grub-mkimage")
    grub = unpacked / "usr/lib/grub/i386-pc"
    options: list[str | Path] = [
        "-O",
        "i386-pc",
        "-d",
        grub,
        "-p",
        "(hd0,msdos1)/boot",
        "-c",
        GUEST / "grub.cfg",
        "-o",
        core,
    ]
    _run(*mkimage, *options, *GRUB_MODULES)
    return core.read_bytes()


def _install_modules(target: Path, kernel_dir: Path, wanted: tuple[str, ...], without: tuple[str, ...] = ()) -> None:
    target.mkdir(parents=True)
    earlier = modules_in_order(kernel_dir, without)
    files = [f for f in modules_in_order(kernel_dir, wanted) if f not in earlier]
    for file in files:
        shutil.copyfile(file, target / file.name)
    (target / "order").write_text("".join(f"{f.name}\n" for f in files))


def _install_busybox(root: Path, unpacked: Path) -> None:
    (root / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(unpacked / "bin/busybox", root / "bin/busybox")
    for applet in _run(unpacked / "bin/busybox", "--list").split():
        if applet not in {"busybox", "shutdown"}:
            (root / "bin" / applet).symlink_to("busybox")


def _initramfs(root: Path, unpacked: Path, kernel_dir: Path) -> bytes:
    _install_busybox(root, unpacked)
    _install_modules(root / "modules", kernel_dir, ROOT_MODULES)
    for folder in ("proc", "sys", "dev", "new"):
        (root / folder).mkdir()
    shutil.copyfile(GUEST / "initramfs-init", root / "init")
    (root / "init").chmod(0o755)
    return gzip.compress(cpio_newc(root), compresslevel=6, mtime=0)


def _fill_root(root: Path, unpacked: Path, kernel_dir: Path) -> None:
    for folder in ("boot", "dev", "etc/acpi/PWRF", "home", "lib64", "proc", "root", "run", "sbin", "srv", "sys", "tmp"):
        (root / folder).mkdir(parents=True)
    (root / "var").mkdir()
    (root / "var/run").symlink_to("../run")
    _install_busybox(root, unpacked)
    (root / "sbin/init").symlink_to("../bin/busybox")
    _install_modules(root / "lib/modules", kernel_dir, GUEST_MODULES, without=ROOT_MODULES)
    for name, place in ROOT_FILES.items():
        shutil.copyfile(GUEST / name, root / place)
        (root / place).chmod(0o755)
    (root / "etc/passwd").write_text("root::0:0:root:/root:/bin/sh\nanna::1000:1000:Anna:/home:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nanna:x:1000:\n")
    _run("gcc", "-Os", "-s", "-o", root / "bin/tick", GUEST / "tick.c")  # the libraries it needs come with the agent
    _install_agent(root, unpacked)


def _install_agent(root: Path, unpacked: Path) -> None:
    """qemu-ga with exactly the libraries its loader asks for, all in /lib."""
    program = unpacked / "usr/sbin/qemu-ga"
    loader, *rest = _with_libraries(unpacked, program)
    listing = _run(loader, *rest[:-1], "--list", program)
    if "not found" in listing:
        raise HdcsError(f"qemu-ga needs a library of no known package: {listing}", next="Add its package to PACKAGES")
    target = root / "lib/x86_64-linux-gnu"
    target.mkdir(parents=True)
    for name in re.findall(r"^\s*(\S+) => /", listing, re.M):
        source = next(p for d in LIBRARY_DIRS if (p := unpacked / d / Path(name).name).exists())
        shutil.copy(source, target / Path(name).name)
    shutil.copy(unpacked / "lib64/ld-linux-x86-64.so.2", root / "lib64/ld-linux-x86-64.so.2")
    shutil.copy(program, root / "bin/qemu-ga")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.lab.golden_image", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=None, help="folder for packages and images (HDCS_LAB_CACHE)")
    parser.add_argument("--out", type=Path, default=None, help="also copy the image to this file")
    args = parser.parse_args()
    try:
        image = build(args.cache)
    except HdcsError as error:
        print(f"golden image: {error}", file=sys.stderr)
        return error.exit_code
    if args.out:
        shutil.copyfile(image.path, args.out)
    size_mib = image.path.stat().st_size / (1 << 20)
    how = "from the cache" if image.cached else "built"
    print(f"{image.path} ({size_mib:.1f} MiB) {how} in {image.seconds:.1f} s", file=sys.stderr)
    print(args.out or image.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
