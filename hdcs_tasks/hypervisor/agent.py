"""What can be asked of a guest through qemu-guest-agent, and of its network cable.

The agent is software inside the guest: it may be absent, slow or lying. Every call is bounded, and what it says
is data to show, never something to decide a reservation on.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import libvirt
import libvirt_qemu

from hdcs_tasks.errors import HdcsError, HypervisorRefused, Unavailable
from hdcs_tasks.hypervisor import xml
from hdcs_tasks.hypervisor.connection import Host, answered
from hdcs_tasks.hypervisor.errors import libvirt_errors

FILE_MAX_BYTES = 1 << 20
_CHUNK_BYTES = 48 * 1024
_PING_S = 2
_CALL_S = 10
_LINK_DOWN_S = 1.0


@dataclass(frozen=True)
class Executed:
    """How a program in the guest ended. ``exit_code`` is 128 + n when signal n ended it."""

    exit_code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class GuestUser:
    """Somebody logged in. ``login_at``: seconds since the epoch, by the guest's clock."""

    name: str
    login_at: float


def _call(guest: Any, command: str, arguments: dict[str, Any] | None = None, timeout_s: int = _CALL_S) -> Any:
    request: dict[str, Any] = {"execute": command}
    if arguments:
        request["arguments"] = arguments
    with libvirt_errors(f"ask the guest agent ({command})"):
        answer = libvirt_qemu.qemuAgentCommand(guest, json.dumps(request), timeout_s, 0)
    try:
        return json.loads(answer)["return"]
    except (ValueError, KeyError, TypeError):
        raise HypervisorRefused(f"guest agent: no answer to {command} in {str(answer)[:200]!r}") from None


def ping(host: Host, vm_id: str, timeout_s: int = _PING_S) -> bool:
    """Whether the guest's agent answers within ``timeout_s`` seconds. Raises NotFound, Unreachable."""
    guest = host.guest(vm_id)
    try:
        _call(guest, "guest-ping", timeout_s=timeout_s)
    except HdcsError as error:
        if error.code == "unreachable":
            raise
        return False
    return True


def wait_for_agent(host: Host, vm_id: str, timeout_s: float) -> float:
    """Wait until the agent answers; returns the seconds waited. Raises Unavailable after ``timeout_s``, NotFound."""
    begun = time.monotonic()
    while not ping(host, vm_id):
        waited = time.monotonic() - begun
        if waited >= timeout_s:
            raise Unavailable(
                f"the agent of guest {vm_id} did not answer within {timeout_s:g} s",
                next="The guest may still boot, or has no qemu-guest-agent: look at its console",
            )
        time.sleep(0.2)
    return time.monotonic() - begun


def lease_addresses(host: Host, network: str, mac: str) -> tuple[str, ...]:
    """IPs that ``network`` leased to ``mac`` by DHCP; empty when it has no such network."""
    if not network or not mac:
        return ()
    try:
        leases = host.conn.networkLookupByName(network).DHCPLeases(mac)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
            return ()
        raise
    return tuple(sorted({lease["ipaddr"] for lease in leases}))


def addresses(host: Host, vm_id: str) -> dict[str, tuple[str, ...]]:
    """IPs of the guest, by source: ``{"agent": (...), "lease": (...)}``, without loopback and link-local ones.

    A silent agent gives an empty tuple.
    """
    guest = host.guest(vm_id)
    found: dict[str, tuple[str, ...]] = {}
    sources = {
        "agent": libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT,
        "lease": libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE,
    }
    for name, source in sources.items():
        try:
            with libvirt_errors(f"ask for the addresses of guest {vm_id}"):
                answer = guest.interfaceAddresses(source, 0)
        except Unavailable as error:
            if error.code == "unreachable":
                raise
            answer = {}
        ips = (a["addr"] for nic in answer.values() for a in nic["addrs"] or ())
        found[name] = tuple(sorted({ip for ip in ips if not ip.startswith(("127.", "fe80:")) and ip != "::1"}))
    return found


def users(host: Host, vm_id: str) -> list[GuestUser]:
    """Who is logged in, as the agent says. Raises Unavailable (agent silent), NotFound."""
    answer = _call(host.guest(vm_id), "guest-get-users")
    return [GuestUser(str(u.get("user", "")), float(u.get("login-time", 0))) for u in answer if isinstance(u, dict)]


_USERS_PROCESSES = r"""
for status in /proc/[0-9]*/status; do
    while read -r key value _; do
        case $key in
        Name:) name=$value ;;
        Uid:) [ "$value" -ge 1000 ] && [ "$value" -lt 60000 ] && echo "$name"; break ;;
        esac
    done <"$status"
done 2>/dev/null | sort -u | head -n 20
"""


def user_processes(host: Host, vm_id: str, timeout_s: float = 5) -> list[str]:
    """Names of programs that people's accounts run (user ids from 1000 on, as Linux numbers people).

    Raises HypervisorRefused or Unavailable where the guest runs nothing for us: no guest-exec, or no /bin/sh.
    """
    done = exec_(host, vm_id, ["/bin/sh", "-c", _USERS_PROCESSES], timeout_s)
    return done.stdout.decode(errors="replace").split("\n")[:-1]


def tell_users(host: Host, vm_id: str, text: str, timeout_s: float = 5) -> bool:
    """Show ``text`` to everybody at the guest: ``wall`` on Linux, ``msg`` on Windows. False: the guest has neither."""
    for argv in (["wall"], ["msg", "*"]):
        try:
            if exec_(host, vm_id, argv, timeout_s, stdin=(text + "\n").encode()).exit_code == 0:
                return True
        except HypervisorRefused:
            continue
    return False


def exec_(host: Host, vm_id: str, argv: Sequence[str], timeout_s: float = 30, stdin: bytes = b"") -> Executed:
    """Run ``argv`` in the guest and wait for its end. Raises Unavailable when it takes over ``timeout_s`` seconds
    (it goes on running), HypervisorRefused when the guest cannot run it."""
    guest = host.guest(vm_id)
    asked: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
    if stdin:
        asked["input-data"] = base64.b64encode(stdin).decode()
    started = _call(guest, "guest-exec", asked)
    deadline = time.monotonic() + timeout_s
    pause = 0.02
    while True:
        status = _call(guest, "guest-exec-status", {"pid": started["pid"]})
        if status.get("exited"):
            code = status["exitcode"] if "exitcode" in status else 128 + int(status.get("signal", 0))
            return Executed(int(code), _decode(status.get("out-data")), _decode(status.get("err-data")))
        if time.monotonic() >= deadline:
            raise Unavailable(
                f"{argv[0]} in guest {vm_id} did not end within {timeout_s:g} s", next="It goes on; give it more time"
            )
        time.sleep(pause)
        pause = min(pause * 2, 0.5)


def _decode(text: str | None) -> bytes:
    try:
        return base64.b64decode(text or "")
    except binascii.Error:
        return b""


def read_file(host: Host, vm_id: str, path: str, max_bytes: int = FILE_MAX_BYTES) -> bytes:
    """The content of a file in the guest. Raises HypervisorRefused when absent or over ``max_bytes``."""
    guest = host.guest(vm_id)
    handle = _call(guest, "guest-file-open", {"path": path, "mode": "r"})
    content = b""
    try:
        while True:
            part = _call(guest, "guest-file-read", {"handle": handle, "count": _CHUNK_BYTES})
            content += _decode(part.get("buf-b64"))
            if len(content) > max_bytes:
                raise HypervisorRefused(f"{path} in guest {vm_id} is over {max_bytes} bytes", next="Read less")
            if part.get("eof"):
                return content
    finally:
        _call(guest, "guest-file-close", {"handle": handle})


def write_file(host: Host, vm_id: str, path: str, content: bytes) -> None:
    """Write a file in the guest (not atomically), flushed. Raises HypervisorRefused."""
    if len(content) > FILE_MAX_BYTES:
        raise HypervisorRefused(f"{len(content)} bytes are too much for the guest agent", next="Use a disk or network")
    guest = host.guest(vm_id)
    handle = _call(guest, "guest-file-open", {"path": path, "mode": "w"})
    try:
        for at in range(0, len(content), _CHUNK_BYTES):
            _write_all(guest, handle, content[at : at + _CHUNK_BYTES])
        _call(guest, "guest-file-flush", {"handle": handle})
    finally:
        _call(guest, "guest-file-close", {"handle": handle})


def _write_all(guest: Any, handle: int, part: bytes) -> None:
    while part:
        text = base64.b64encode(part).decode()
        written = int(_call(guest, "guest-file-write", {"handle": handle, "buf-b64": text})["count"])
        if written <= 0:
            raise HypervisorRefused("guest agent wrote nothing", next="Is the guest's disk full?")
        part = part[written:]


def freeze(host: Host, vm_id: str) -> int:
    """Freeze the guest's file systems; returns how many. Raises Unavailable (agent silent), HypervisorRefused."""
    with libvirt_errors(f"freeze the file systems of guest {vm_id}"):
        return int(host.guest(vm_id).fsFreeze(None, 0))


def thaw(host: Host, vm_id: str) -> int:
    """Thaw the guest's file systems; returns how many. Thawing what is not frozen does nothing."""
    with libvirt_errors(f"thaw the file systems of guest {vm_id}"):
        return int(host.guest(vm_id).fsThaw(None, 0))


@contextmanager
def frozen(host: Host, vm_id: str, tries: int = 5) -> Iterator[bool]:
    """File systems frozen inside the block, as far as the agent goes along; yields whether they are.

    They are thawed at the end whatever happens, also when the freeze only seemed to fail: a guest left frozen
    hangs. Raises Unavailable when the thaw fails ``tries`` times, unless the block itself raised.
    """
    try:
        if ping(host, vm_id):
            freeze(host, vm_id)
            held = True
        else:
            held = False
    except HdcsError:
        held = False
        _thaw_surely(host, vm_id, 1)
    if not held:
        yield False
        return
    try:
        yield True
    except BaseException:
        _thaw_surely(host, vm_id, tries)
        raise
    last = _thaw_surely(host, vm_id, tries)
    if last is not None:
        raise Unavailable(
            f"guest {vm_id} could not be thawed: {last.message}", next="Thaw it by hand or reset the guest"
        ) from last


def _thaw_surely(host: Host, vm_id: str, tries: int) -> HdcsError | None:
    for number in range(tries):
        try:
            thaw(host, vm_id)
        except HdcsError as error:
            last = error
            if number + 1 < tries:
                time.sleep(0.5)
        else:
            return None
    return last


def renew_network(host: Host, vm_id: str, mac: str = "") -> None:
    """Pull the guest's network cable for a second: its DHCP client then asks anew.

    ``mac`` chooses the interface; empty means the first. Raises NotFound, HypervisorRefused (no such interface, or its
    QEMU hangs).
    """
    answered(
        lambda: _pull_cable(host, vm_id, mac), _LINK_DOWN_S + _CALL_S, f"renew the network of guest {vm_id}"
    )  # fmt: skip


def _pull_cable(host: Host, vm_id: str, mac: str) -> None:
    guest = host.guest(vm_id)
    with libvirt_errors(f"renew the network of guest {vm_id}"):
        text = guest.XMLDesc(0)
        down, up = xml.with_link(text, mac, up=False), xml.with_link(text, mac, up=True)
        if down is None or up is None:
            raise HypervisorRefused(f"guest {vm_id} has no network interface {mac}", next="Look at its definition")
        try:
            guest.updateDeviceFlags(down, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            time.sleep(_LINK_DOWN_S)
        finally:
            guest.updateDeviceFlags(up, libvirt.VIR_DOMAIN_AFFECT_LIVE)
