"""The life of a guest: start, stop, suspend, save, and what is seen of it.

A definition exists only where the guest runs: it is made at the start and removed at the stop, with everything
libvirt keeps beside it (checkpoint metadata, NVRAM, managed save); what must last lives in the storage.
All functions may raise Unreachable (libvirtd gone) and, where they change something, OutcomeUnknown.
"""

from __future__ import annotations

import secrets
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import libvirt

from hdcs_tasks.errors import Conflict, HdcsError, Invalid, NotFound, Unavailable, WrongState
from hdcs_tasks.hypervisor import agent, validation, xml
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors, translate
from hdcs_tasks.hypervisor.spec import GuestInfo, GuestSpec

__all__ = [
    "GuestInfo", "GuestSpec", "info", "list_guests", "reboot", "resume", "save", "set_console_password", "start",
    "stop", "suspend",
]  # fmt: skip

_STATES = {
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "paused",
    libvirt.VIR_DOMAIN_SHUTOFF: "shutoff",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
}
_KEEP_NOTHING = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)
_POLL_S = 0.2
_PRESS_AGAIN_S = 10.0  # a guest that still boots misses the first press of its power button
_PASSWORD_MAX = 60  # SPICE's own limit


def _password() -> str:
    return secrets.token_urlsafe(24)


def _look(guest: Any) -> GuestInfo:
    state = _STATES.get(guest.state()[0], "running")
    return xml.read_guest(guest.XMLDesc(0), state)


def _gone(error: libvirt.libvirtError) -> bool:
    return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)


def _undefine(guest: Any, label: str) -> None:
    with libvirt_errors(f"remove the definition of guest {label}", unsure=True):
        try:
            guest.undefineFlags(_KEEP_NOTHING)
        except libvirt.libvirtError as error:
            if not _gone(error):
                raise


def info(host: Host, vm_id: str) -> GuestInfo | None:
    """The guest as it is now, with the IPs of its DHCP leases; None when this host has none."""
    guest = host.lookup(vm_id)
    if guest is None:
        return None
    try:
        seen = _look(guest)
        addresses = agent.lease_addresses(host, seen.network, seen.mac) if seen.active else ()
    except libvirt.libvirtError as error:
        if _gone(error):
            return None
        raise translate(error, f"look at guest {vm_id}") from error
    return GuestInfo(**{**vars(seen), "addresses": addresses})


def list_guests(host: Host, *, inactive: bool = False) -> list[GuestInfo]:
    """Every guest HDCS started on this host, leftover inactive definitions too (``inactive``: these alone); without
    addresses.

    Asks no QEMU, so a hung one does not block it.
    """
    with libvirt_errors("list guests"):
        guests = host.conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE if inactive else 0)
    found = []
    for guest in guests:
        try:
            text = guest.XMLDesc(0)
            if xml.is_hdcs(text):
                found.append(xml.read_guest(text, _STATES.get(guest.state()[0], "running")))
        except libvirt.libvirtError as error:
            if not _gone(error):  # it ended while we looked
                raise translate(error, "list guests") from error
    return found


def console_port(host: Host, vm_id: str) -> int | None:
    """The console port of a guest HDCS started, 0 where it has none; None for any other guest, or one that ended."""
    with libvirt_errors("look at a guest"):
        guest = host.lookup(vm_id)
        try:
            text = guest.XMLDesc(0) if guest is not None else ""
        except libvirt.libvirtError as error:
            if not _gone(error):
                raise
            return None
    return xml.read_guest(text, "running").console_port if text and xml.is_hdcs(text) else None


def start(host: Host, spec: GuestSpec, *, saved: Path | None = None, paused: bool = False) -> GuestInfo:
    """Define and start ``spec``'s guest, from the memory file ``saved`` if given; returns it as observed.

    Running already under the same step: success. Under another: Conflict. A start that fails leaves no definition.
    ``saved`` is used up: it is deleted once the guest runs, as its memory does not fit a disk that has moved on.
    ``paused``: leave the vCPUs stopped. Raises Conflict (disk or port held by another), NoCapacity (no memory),
    NotFound (no such network or file), HypervisorRefused.
    """
    existing = host.lookup(spec.vm_id)
    if existing is not None:
        with libvirt_errors(f"look at guest {spec.name}"):
            seen = _look(existing)
        if seen.active:
            _same_step_or_conflict(seen, spec)
            _use_up(saved)
            return seen
        _undefine(existing, spec.name)
    if saved is not None:
        _restore(host, spec, saved, paused)
    else:
        _create(host, spec, paused)
    _use_up(saved)
    found = info(host, spec.vm_id)
    if found is None or not found.active:
        stop(host, spec.vm_id, force=True)
        raise Unavailable(f"guest {spec.name} ended right after its start", next="Look at its console log")
    return found


def _same_step_or_conflict(seen: GuestInfo, spec: GuestSpec) -> None:
    if spec.step and seen.step == spec.step:
        return
    raise Conflict(
        f"guest {seen.name} runs already, started by step {seen.step or 'unknown'} attempt {seen.attempt} "
        f"(operation {seen.operation or 'unknown'})",
        next="Re-read the VM; stop it first if it is to start anew",
        details={"operation": seen.operation, "step": seen.step, "attempt": seen.attempt},
    )


def _use_up(saved: Path | None) -> None:
    if saved is not None:
        saved.unlink(missing_ok=True)


def _create(host: Host, spec: GuestSpec, paused: bool) -> None:
    _check_files(spec)
    definition = xml.guest_xml(spec, _password())
    with libvirt_errors(f"define guest {spec.name}", unsure=True):
        guest = host.conn.defineXMLFlags(definition, validation.define_flags(definition))
    validation.was_defined(definition)
    try:
        with libvirt_errors(f"start guest {spec.name}", unsure=True):
            guest.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
    except Exception:
        _undo(guest, spec.name)
        raise


def _check_files(spec: GuestSpec) -> None:
    """A missing disk is our mistake (NotFound), not a refusal of QEMU."""
    for path in (*spec.disks, *filter(None, (spec.kernel, spec.initrd))):
        if not Path(path).is_file():
            raise NotFound(
                f"guest {spec.name}: {path} does not exist on this server node",
                next="Check that the domain node's storage is mounted and the disk was cloned",
            )


def _undo(guest: Any, label: str) -> None:
    try:
        if not guest.isActive():
            _undefine(guest, label)
    except (libvirt.libvirtError, HdcsError):
        pass  # the first error is the one to tell; the definition is redefined at the next start


def _restore(host: Host, spec: GuestSpec, saved: Path, paused: bool) -> None:
    if not saved.is_file():
        raise NotFound(f"guest {spec.name}: no saved memory at {saved}", next="Start it without its saved state")
    with libvirt_errors(f"read the saved memory of guest {spec.name}"):
        old = host.conn.saveImageGetXMLDesc(str(saved), libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE)
    new = xml.readdress(old, spec, _password())
    with libvirt_errors(f"define guest {spec.name}", unsure=True):
        guest = host.conn.defineXML(new)
    how = libvirt.VIR_DOMAIN_SAVE_PAUSED if paused else libvirt.VIR_DOMAIN_SAVE_RUNNING
    try:
        with host.another() as own, libvirt_errors(f"restore guest {spec.name}", unsure=True):
            own.conn.restoreFlags(str(saved), new, how)
    except Exception:
        _undo(guest, spec.name)
        raise


def stop(host: Host, vm_id: str, *, force: bool = False, timeout_s: float = 60) -> bool:
    """Stop the guest and remove its definition; True if it ran. An absent guest is a success (False).

    ``force`` pulls the plug. Otherwise the guest is asked, by its agent or else by the power button, and
    Unavailable is raised when it still runs after ``timeout_s`` seconds. A suspended guest cannot be asked:
    WrongState.
    """
    guest = host.lookup(vm_id)
    if guest is None:
        return False
    with libvirt_errors(f"look at guest {vm_id}"):
        seen = _look(guest)
    if seen.active:
        if force:
            _destroy(guest, seen.name)
        else:
            _ask_to_stop(host, guest, seen, timeout_s)
    _undefine(guest, seen.name)
    return seen.active


def _destroy(guest: Any, label: str) -> None:
    with libvirt_errors(f"destroy guest {label}", unsure=True):
        try:
            guest.destroyFlags(0)
        except libvirt.libvirtError as error:
            if not _gone(error) and error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                raise


def active(guest: Any, label: str) -> bool:
    """Whether the guest runs; one that went away since it was looked up does not."""
    with libvirt_errors(f"look at guest {label}"):
        try:
            return bool(guest.isActive())
        except libvirt.libvirtError as error:
            if _gone(error):
                return False
            raise


def _ask_to_stop(host: Host, guest: Any, seen: GuestInfo, timeout_s: float) -> None:
    if seen.state != "running":
        raise WrongState(f"guest {seen.name} is suspended and cannot shut itself down", next="Resume it, or use force")
    deadline = time.monotonic() + timeout_s
    press_at = 0.0
    by_agent = agent.ping(host, seen.vm_id)
    while active(guest, seen.name):
        now = time.monotonic()
        if now >= deadline:
            raise Unavailable(
                f"guest {seen.name} did not shut down within {timeout_s:g} s", next="Ask again later, or use force"
            )
        if now >= press_at:
            press_at = now + _PRESS_AGAIN_S
            _press(guest, by_agent)
            by_agent = False  # an agent that answered and did not stop the guest gives way to the button
        time.sleep(_POLL_S)


def _press(guest: Any, by_agent: bool) -> None:
    """Ask for a shutdown; a refusal is not fatal, as only the guest's end counts."""
    way = libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT if by_agent else libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN
    try:
        guest.shutdownFlags(way)
    except libvirt.libvirtError as error:
        asked = translate(error, "ask the guest to shut down")
        if not isinstance(asked, WrongState | NotFound) and not by_agent:
            raise asked from error


def suspend(host: Host, vm_id: str) -> None:
    """Stop the guest's vCPUs; its memory stays. Suspended already: success. Raises NotFound, WrongState."""
    guest = host.guest(vm_id)
    with libvirt_errors(f"suspend guest {vm_id}", unsure=True):
        if guest.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
            guest.suspend()


def resume(host: Host, vm_id: str) -> None:
    """Let a suspended guest go on. Running already: success. Raises NotFound, WrongState."""
    guest = host.guest(vm_id)
    with libvirt_errors(f"resume guest {vm_id}", unsure=True):
        state = guest.state()[0]
        if state == libvirt.VIR_DOMAIN_PMSUSPENDED:
            guest.pMWakeup(0)
        elif state not in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED):
            guest.resume()


def reboot(host: Host, vm_id: str, *, force: bool = False, timeout_s: float = 120) -> None:
    """Reboot the guest and wait until QEMU saw it reset; console and IP stay.

    ``force`` presses the reset button. Otherwise agent or power button; Unavailable when nothing happened within
    ``timeout_s`` seconds. Raises NotFound, WrongState (suspended or shut off).
    """
    guest = host.guest(vm_id)
    with libvirt_errors(f"look at guest {vm_id}"):
        seen = _look(guest)
    if seen.state != "running":
        raise WrongState(f"guest {seen.name} is {seen.state} and cannot reboot", next="Resume or start it first")
    rebooted = threading.Event()
    with libvirt_errors(f"reboot guest {seen.name}", unsure=True):
        watch = host.conn.domainEventRegisterAny(
            guest, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, lambda *_: rebooted.set(), None
        )
        try:
            if force:
                guest.reset(0)
            else:
                guest.reboot(_reboot_way(host, vm_id))
            done = rebooted.wait(timeout_s)
        finally:
            host.conn.domainEventDeregisterAny(watch)
    if not done:
        raise Unavailable(f"guest {seen.name} did not reboot within {timeout_s:g} s", next="Ask again, or use force")


def _reboot_way(host: Host, vm_id: str) -> int:
    if agent.ping(host, vm_id):
        return int(libvirt.VIR_DOMAIN_REBOOT_GUEST_AGENT)
    return int(libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN)


def save(host: Host, vm_id: str, path: Path) -> None:
    """Write the guest's memory to ``path`` and end the guest; its definition goes.

    Idempotent: absent and saved already is a success. libvirt ends what it began when its caller dies; then the
    complete partial file is found and taken. Raises NotFound (neither guest nor file), HypervisorRefused.
    """
    partial = path.with_name(path.name + ".partial")
    guest = host.lookup(vm_id)
    if guest is not None and active(guest, vm_id):
        partial.unlink(missing_ok=True)
        with host.another() as own, libvirt_errors(f"save guest {vm_id}", unsure=True):
            own.guest(vm_id).saveFlags(str(partial), None, 0)
    if guest is not None:
        _undefine(guest, vm_id)
    if partial.is_file() and _complete(host, partial):
        partial.rename(path)
    if not path.is_file():
        raise NotFound(f"guest {vm_id} neither runs nor was saved to {path}", next="See its state: hdcs vm list")


def _complete(host: Host, path: Path) -> bool:
    """Whether libvirt finished writing this memory file: only then does it read it."""
    try:
        host.conn.saveImageGetXMLDesc(str(path), 0)
    except libvirt.libvirtError as error:
        if translate(error, "read").retryable:
            raise translate(error, f"read {path}") from error
        return False
    return True


def set_console_password(host: Host, vm_id: str, password: str, valid_s: float) -> datetime:
    """Give the SPICE console a ticket for ``valid_s`` seconds from now; returns when it ends (UTC).

    Sessions already open stay open. Raises Invalid (password empty or over 60 characters), NotFound, WrongState.
    """
    if not 1 <= len(password) <= _PASSWORD_MAX or not password.isascii() or valid_s <= 0:
        raise Invalid(f"console password must be 1 to {_PASSWORD_MAX} ASCII characters, valid for more than 0 s")
    guest = host.guest(vm_id)
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=valid_s)
    with libvirt_errors(f"set the console ticket of guest {vm_id}"):
        text = guest.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
        element = xml.with_console_password(text, password, until.strftime("%Y-%m-%dT%H:%M:%S"))
        if element is None:
            raise WrongState(f"guest {vm_id} has no SPICE console", next="Start it anew")
        guest.updateDeviceFlags(element, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    return until
