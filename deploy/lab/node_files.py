"""Files of one server node of the lab: libvirt's configuration and its private folders."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import uuid
from pathlib import Path

LIBVIRTD_CONF = """\
listen_tls = {tls}
listen_tcp = 1
ca_file = "/etc/libvirt/pki/cacert.pem"
cert_file = "/etc/libvirt/pki/servercert.pem"
key_file = "/etc/libvirt/pki/serverkey.pem"
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
QEMU_TLS = """\
migrate_tls_x509_cert_dir = "/etc/libvirt/pki/qemu"
nbd_tls_x509_cert_dir = "/etc/libvirt/pki/qemu"
"""
PKI = "/etc/libvirt/pki"
"""A server node's certificates, as its libvirtd, its QEMUs and its workers see them."""
_OF_LIBVIRT = {"ca": "cacert.pem", "cert": "{side}cert.pem", "key": "{side}key.pem"}
_OF_QEMU = {"ca": "ca-cert.pem", "cert": "{side}-cert.pem", "key": "{side}-key.pem"}


def make_authority(folder: Path) -> None:
    """A certificate authority for one lab: ``ca.pem`` and ``ca.key`` in ``folder``."""
    folder.mkdir()
    _openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=HDCS lab",
             "-keyout", folder / "ca.key", "-out", folder / "ca.pem")  # fmt: skip


def write_certificates(folder: Path, authority: Path, name: str, ip: str) -> None:
    """Key and certificate of the server node ``name`` at ``ip``, in the places where libvirt and QEMU look."""
    pki = folder / "etc" / "pki"
    (pki / "qemu").mkdir(parents=True)
    request, cert, key, names = pki / "node.csr", pki / "node.pem", pki / "node.key", pki / "names"
    names.write_text(f"subjectAltName=IP:{ip},DNS:{name}\nextendedKeyUsage=serverAuth,clientAuth\n")
    _openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", request)
    _openssl("x509", "-req", "-in", request, "-CA", authority / "ca.pem", "-CAkey", authority / "ca.key",
             "-CAcreateserial", "-days", "2", "-extfile", names, "-out", cert)  # fmt: skip
    found = {"ca": authority / "ca.pem", "cert": cert, "key": key}
    for place, called in ((pki, _OF_LIBVIRT), (pki / "qemu", _OF_QEMU)):
        for what, pattern in called.items():
            for side in ("server", "client"):
                shutil.copy(found[what], place / pattern.format(side=side))


def _openssl(*argv: object) -> None:
    subprocess.run(["openssl", *map(str, argv)], check=True, capture_output=True, timeout=60)


def write_node_files(folder: Path, identity: str, ip: str, *, tls: bool = False) -> None:
    """Make a server node's folders and configuration. ``identity`` gives it a host UUID of its own. ``tls``: libvirtd
    listens for that too (``write_certificates``)."""
    host_uuid = uuid.uuid5(uuid.NAMESPACE_URL, f"hdcs-lab:{identity}")
    # Debian's own configuration, without the default network it would start by itself
    shutil.copytree("/etc/libvirt", folder / "etc", symlinks=True, ignore=lambda _, names: {"networks"} & set(names))
    (folder / "etc" / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(ip=ip, host_uuid=host_uuid, tls=int(tls)))
    (folder / "etc" / "qemu.conf").write_text(QEMU_CONF.format(ip=ip) + QEMU_TLS * tls)
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
