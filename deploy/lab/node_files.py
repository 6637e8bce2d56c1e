"""Files of one server node of the lab: libvirt's configuration and its private folders."""

from __future__ import annotations

import contextlib
import shutil
import socket
import uuid
from pathlib import Path

LIBVIRTD_CONF = """\
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
listen_addr = "{ip}"
host_uuid = "{host_uuid}"
auth_unix_rw = "none"
max_clients = 500
max_workers = 40
"""
# No cgroups, users or security driver: namespaces share the machine's kernel and its cgroup tree.
# remember_owner writes extended attributes on images that two server nodes share.
QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
spice_listen = "0.0.0.0"
vnc_listen = "0.0.0.0"
migration_host = "{ip}"
migration_address = "0.0.0.0"
"""


def write_node_files(folder: Path, identity: str, ip: str) -> None:
    """Make a server node's folders and configuration. ``identity`` gives it a host UUID of its own."""
    host_uuid = uuid.uuid5(uuid.NAMESPACE_URL, f"hdcs-lab:{identity}")
    # Debian's own configuration, without the default network it would start by itself
    shutil.copytree("/etc/libvirt", folder / "etc", symlinks=True, ignore=lambda _, names: {"networks"} & set(names))
    (folder / "etc" / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(ip=ip, host_uuid=host_uuid))
    (folder / "etc" / "qemu.conf").write_text(QEMU_CONF.format(ip=ip))
    for name in ("qemu", "images", "dnsmasq", "network", "boot"):
        (folder / "varlib" / name).mkdir(parents=True)
    for name in ("varcache", "varlog", "local"):
        (folder / name).mkdir()
    (folder / "machine-id").write_text(f"{host_uuid.hex}\n")


def listening(pid: int) -> bool:
    """Whether the libvirtd of the space with this PID 1 takes connections, seen through its own /run."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as link:
        link.settimeout(1)
        link.connect(f"/proc/{pid}/root/run/libvirt/libvirt-sock")
        return True
    return False
