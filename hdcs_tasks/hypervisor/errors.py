"""libvirt's errors in HDCS's words: the one place that reads libvirt error codes.

Use it as a context manager around any libvirt call::

    with libvirt_errors("start guest desk-01"):
        guest.create()

Source of the codes: libvirt's ``virterror.h``; which of them occur in practice was measured on libvirt 9.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import libvirt

from hdcs_tasks.errors import (
    BackupBroken,
    Cancelled,
    Conflict,
    HdcsError,
    HypervisorRefused,
    NoCapacity,
    NotFound,
    OutcomeUnknown,
    Unavailable,
    Unreachable,
    WrongState,
)

_BY_CODE: dict[int, tuple[type[HdcsError], str]] = {
    libvirt.VIR_ERR_NO_DOMAIN: (NotFound, "It does not run on this server node. See: hdcs vm list"),
    libvirt.VIR_ERR_NO_NETWORK: (NotFound, "The server node makes its network when it joins: restart its worker"),
    libvirt.VIR_ERR_NO_STORAGE_POOL: (NotFound, "The server node makes its pools when it joins: restart its worker"),
    libvirt.VIR_ERR_NO_STORAGE_VOL: (NotFound, "See what the storage holds: hdcs image list"),
    libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT: (NotFound, "Redefine the checkpoint or make the next backup a full one"),
    libvirt.VIR_ERR_NO_DOMAIN_METADATA: (NotFound, "The guest was not started by HDCS"),
    libvirt.VIR_ERR_OPERATION_INVALID: (WrongState, "Look at the guest's state: hdcs vm list"),
    libvirt.VIR_ERR_DOM_EXIST: (Conflict, "Stop what runs under this name first"),
    libvirt.VIR_ERR_NETWORK_EXIST: (Conflict, "Another network holds this name"),
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: (Unavailable, "The guest agent does not answer; wait for the guest to boot"),
    libvirt.VIR_ERR_AGENT_UNSYNCED: (Unavailable, "The guest agent is busy; ask again"),
    libvirt.VIR_ERR_OPERATION_TIMEOUT: (Unavailable, "Another job holds the guest or its QEMU hangs; ask again"),
    libvirt.VIR_ERR_OPERATION_ABORTED: (Cancelled, ""),
    libvirt.VIR_ERR_MIGRATE_FINISH_OK: (OutcomeUnknown, "Observe the guest on source and target before deciding"),
    libvirt.VIR_ERR_MIGRATE_UNSAFE: (
        HypervisorRefused,
        "libvirt takes the storage for local; set HDCS_MIGRATE_UNSAFE=true if it is one file system on both nodes",
    ),
    libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT: (BackupBroken, "The next backup of this VM is a full one"),
    libvirt.VIR_ERR_RPC: (Unreachable, "Check libvirtd on the server node: systemctl status libvirtd"),
    libvirt.VIR_ERR_NO_CONNECT: (Unreachable, "Check libvirtd on the server node: systemctl status libvirtd"),
    libvirt.VIR_ERR_INVALID_CONN: (Unreachable, "Check libvirtd on the server node: systemctl status libvirtd"),
    libvirt.VIR_ERR_AUTH_FAILED: (HypervisorRefused, "Let the worker's user open libvirt (group libvirt)"),
}

# The same code can mean several things; then only libvirt's or QEMU's own words tell them apart.
_FULL = "No space left on device"
_BY_WORDS: tuple[tuple[str, type[HdcsError], str], ...] = (
    ('Failed to get "write" lock', Conflict, "Another guest or process holds the disk; stop it first"),
    ("Failed to get shared", Conflict, "Another guest or process holds the disk; stop it first"),
    ("already exists", Conflict, "Something with this name or id is there already; look before asking again"),
    ("already defined", Conflict, "Something with this name or id is there already; look before asking again"),
    ("already in use", Conflict, "Something else holds it; look before asking again"),
    ("Failed to reserve port", Conflict, "Another guest of this server node has the console port"),
    ("binding socket to", Conflict, "Another process listens on the console port"),
    ("failed to initialize spice server", Conflict, "Most likely another process listens on the console port"),
    ("Cannot allocate memory", NoCapacity, "The server node is out of memory; see: hdcs pool capacity"),
    (_FULL, HypervisorRefused, "A storage is full: make room there. See: hdcs domain list"),
)

_CONNECTION_CODES = frozenset({libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_SYSTEM_ERROR})


def connection_lost(error: libvirt.libvirtError) -> bool:
    """Whether ``error`` means that libvirtd could not be asked (any more), rather than that it said no."""
    code, source = error.get_error_code(), error.get_error_domain()
    if source in (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE) and code in _CONNECTION_CODES:
        return True
    return _BY_CODE.get(code, (HdcsError, ""))[0] is Unreachable


def translate(error: libvirt.libvirtError, action: str, *, unsure: bool = False) -> HdcsError:
    """The HDCS error that ``error`` means; ``action`` says what was tried ("start guest desk-01").

    ``unsure``: the call changes the world, so a connection lost on the way leaves its outcome unknown.
    ``details`` of the result: ``{"libvirt_code": int, "libvirt_source": int}``.
    """
    code = error.get_error_code()
    words = " ".join(str(error.get_error_message() or error).split())
    details = {"libvirt_code": code, "libvirt_source": error.get_error_domain()}
    message = f"cannot {action}: {words}"
    if connection_lost(error):
        if unsure:
            return OutcomeUnknown(message, next="Observe the guest before deciding", details=details)
        return Unreachable(message, next=_BY_CODE[libvirt.VIR_ERR_RPC][1], details=details)
    if code in _BY_CODE:
        kind, advice = _BY_CODE[code]
        return kind(message, next=advice, details=details)
    for needle, kind, advice in _BY_WORDS:
        if needle.lower() in words.lower():
            return kind(message, next=advice, details=details)
    return HypervisorRefused(message, next="Look at libvirt's log on the server node", details=details)


def is_storage_full(error: HdcsError) -> bool:
    """Whether libvirt or QEMU said that a disk could not be written for want of space."""
    return _FULL.lower() in error.message.lower()


@contextmanager
def libvirt_errors(action: str, *, unsure: bool = False) -> Iterator[None]:
    """Run libvirt calls; a libvirtError leaves as the HDCS error ``translate`` makes of it."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translate(error, action, unsure=unsure) from error
