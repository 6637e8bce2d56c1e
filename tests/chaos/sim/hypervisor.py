"""A small libvirt for each server node: guests, their jobs, DHCP hosts; disks are small files in one shared folder.

What libvirtd was asked to do goes on when the asking worker dies. ``rooms`` puts these functions where the rooms of a
server node (``hdcs_tasks/*/node*.py``) look for ``hdcs_tasks.hypervisor``; the rooms themselves run as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from hdcs_tasks.errors import (
    Cancelled,
    Conflict,
    HypervisorRefused,
    NotFound,
    OutcomeUnknown,
    Unavailable,
    Unreachable,
    WrongState,
)
from hdcs_tasks.hypervisor.migration import Adopted
from hdcs_tasks.hypervisor.spec import GuestInfo, GuestSpec
from hdcs_tasks.hypervisor.whereabouts import Presence, Whereabouts
from tests.chaos.sim.kernel import Actor, Kernel

JOB_LOCK_S = 30.0


@dataclass
class Guest:
    vm_id: str
    name: str
    state: str  # shutoff | running | paused
    spec: GuestSpec
    job: str = ""

    @property
    def active(self) -> bool:
        return self.state in ("running", "paused")


@dataclass
class HostModel:
    """One server node's libvirtd. ``domain_node`` names the storage it shares with others."""

    name: str
    domain_node: str
    ip: str
    up: bool = True
    powered: bool = True
    guests: dict[str, Guest] = field(default_factory=dict)
    dhcp: dict[str, str] = field(default_factory=dict)
    locks: set[str] = field(default_factory=set)

    lives: int = 0
    """How often its libvirtd has died: a call that was under way then never learns how it ended."""

    def down(self) -> None:
        self.up = False
        self.lives += 1

    def power_off(self) -> None:
        """Every guest dies with its host; definitions and the network's hosts are files and stay."""
        self.powered = False
        self.down()
        self.dhcp.clear()  # hosts are added live
        for guest in self.guests.values():
            guest.state, guest.job = "shutoff", ""


class World:
    """All hosts, and the judge of what is done to them."""

    def __init__(self, kernel: Kernel, hosts: list[HostModel]) -> None:
        self.kernel = kernel
        self.hosts = {host.name: host for host in hosts}
        self.by_state_dir: dict[Path, HostModel] = {}
        self.fence: Callable[[Actor, str], None] = lambda actor, what: None
        self.refuse = 0.0
        self.broken_hand_over = 0.0

    Presence = Presence

    def running(self, vm_id: str) -> list[str]:
        return [h.name for h in self.hosts.values() if (g := h.guests.get(vm_id)) is not None and g.active]

    # --- the ways into a host

    def _enter(self, host: HostModel, what: str) -> None:
        """A call to libvirtd: it may find it away, and its caller may die or stop before it."""
        self.kernel.point(f"libvirt {what}")
        if not host.up:
            raise Unreachable(f"libvirtd of {host.name} does not answer", next="Look at it")

    def _change(self, host: HostModel, what: str, vm_id: str) -> None:
        """The same, for a call that changes something: the fence is judged here."""
        self._enter(host, what)
        self.fence(self.kernel.actor(), f"{what} {vm_id} on {host.name}")
        self.kernel.tell(f"{host.name}: {what} {self.name_of(vm_id)}")

    def name_of(self, vm_id: str) -> str:
        for host in self.hosts.values():
            if vm_id in host.guests:
                return host.guests[vm_id].name
        return vm_id[:8]

    def _free_of_jobs(self, host: HostModel, vm_id: str) -> Guest | None:
        """The guest once no job holds it, as libvirt's own lock has callers wait."""
        free = lambda: (g := host.guests.get(vm_id)) is None or not g.job  # noqa: E731
        if not self.kernel.wait_for(free, JOB_LOCK_S):
            raise Unavailable(f"guest {vm_id} is held by another job", next="Ask again")
        return host.guests.get(vm_id)

    def _job(self, host: HostModel, guest: Guest, job: str, seconds: float, finish: Callable[[], None]) -> None:
        """A job of libvirtd: it ends whether or not its caller still lives. The caller waits for it."""
        guest.job, life = job, host.lives

        def end() -> None:
            if guest.job == job and host.powered:
                guest.job = ""
                if host.guests.get(guest.vm_id) is guest:
                    finish()

        self.kernel.at(seconds, end)
        self.kernel.wait_for(lambda: guest.job != job or host.lives != life, seconds + 60)
        if host.lives != life:
            raise OutcomeUnknown(f"libvirtd of {host.name} went away", next="Observe the guest before deciding")

    def _seen(self, vm_id: str) -> None:
        """The rule of rules: one running guest per VM in the whole data center."""
        where = [name for name in self.running(vm_id) if self.hosts[name].guests[vm_id].state == "running"]
        if len(where) > 1:
            self.kernel.violated("VM runs twice", f"{self.name_of(vm_id)} on {' and '.join(where)}")

    # --- guests

    def info(self, host: HostModel, vm_id: str) -> GuestInfo | None:
        self._enter(host, "info")
        guest = host.guests.get(vm_id)
        return None if guest is None else _info(guest)

    def list_guests(self, host: HostModel, *, inactive: bool = False) -> list[GuestInfo]:
        self._enter(host, "list")
        return [_info(guest) for guest in host.guests.values() if not (inactive and guest.active)]

    def start(self, host: HostModel, spec: GuestSpec, *, saved: Path | None = None, paused: bool = False) -> GuestInfo:
        self._change(host, "start", spec.vm_id)
        guest = self._free_of_jobs(host, spec.vm_id)
        if guest is not None and guest.active:
            if not spec.step or guest.spec.step != spec.step:
                raise Conflict(f"guest {spec.name} runs already, started by step {guest.spec.step}")
            _use_up(saved)
            return _info(guest)
        host.guests.pop(spec.vm_id, None)
        for path in spec.disks:
            if not Path(path).is_file():
                raise NotFound(f"guest {spec.name}: {path} does not exist")
        if saved is not None and not saved.is_file():
            raise NotFound(f"guest {spec.name}: no saved memory at {saved}")
        if self.kernel.rng.random() < self.refuse:
            self.kernel.fault("libvirt said no", f"start {spec.name}")
            raise HypervisorRefused(f"cannot start guest {spec.name}: QEMU said no")
        guest = host.guests[spec.vm_id] = Guest(spec.vm_id, spec.name, "shutoff", spec)

        def began() -> None:
            guest.state = "running"
            self._seen(spec.vm_id)

        self._job(host, guest, "start", self.kernel.rng.uniform(0.3, 2.0), began)
        _use_up(saved)
        if not guest.active:
            raise Unavailable(f"guest {spec.name} ended right after its start", next="Look at its console log")
        return _info(guest)

    def stop(self, host: HostModel, vm_id: str, *, force: bool = False, timeout_s: float = 60) -> bool:
        self._change(host, "stop", vm_id)
        guest = self._free_of_jobs(host, vm_id) if not force else host.guests.get(vm_id)
        if guest is None:
            return False
        ran = guest.active
        if ran and not force:
            self._ask_to_stop(host, guest, timeout_s)
        if host.guests.get(vm_id) is guest:
            guest.job = ""
            del host.guests[vm_id]
        return ran

    def _ask_to_stop(self, host: HostModel, guest: Guest, timeout_s: float) -> None:
        if guest.state != "running":
            raise WrongState(f"guest {guest.name} is suspended and cannot shut itself down")
        if self.kernel.rng.random() < 0.1:
            self.kernel.sleep(timeout_s)
            raise Unavailable(f"guest {guest.name} did not shut down within {timeout_s:g} s")
        if guest.job:
            raise Unavailable(f"guest {guest.name} is held by another job", next="Ask again")

        def off() -> None:
            guest.state = "shutoff"

        self._job(host, guest, "shutdown", self.kernel.rng.uniform(0.5, 5.0), off)

    def _guest(self, host: HostModel, vm_id: str) -> Guest:
        guest = self._free_of_jobs(host, vm_id)
        if guest is None:
            raise NotFound(f"guest {vm_id} does not run on {host.name}")
        return guest

    def suspend(self, host: HostModel, vm_id: str) -> None:
        self._change(host, "suspend", vm_id)
        guest = self._guest(host, vm_id)
        if not guest.active:
            raise WrongState(f"guest {guest.name} is {guest.state}")
        guest.state = "paused"

    def resume(self, host: HostModel, vm_id: str) -> None:
        self._change(host, "resume", vm_id)
        guest = self._guest(host, vm_id)
        if not guest.active:
            raise WrongState(f"guest {guest.name} is {guest.state}")
        guest.state = "running"
        self._seen(vm_id)

    def reboot(self, host: HostModel, vm_id: str, *, force: bool = False, timeout_s: float = 120) -> None:
        self._change(host, "reboot", vm_id)
        guest = self._guest(host, vm_id)
        if guest.state != "running":
            raise WrongState(f"guest {guest.name} is {guest.state} and cannot reboot")
        self.kernel.sleep(self.kernel.rng.uniform(0.1, 3.0))

    def save(self, host: HostModel, vm_id: str, path: Path) -> None:
        self._change(host, "save", vm_id)
        partial = path.with_name(path.name + ".partial")
        guest = self._free_of_jobs(host, vm_id)
        if guest is not None and guest.active:
            partial.unlink(missing_ok=True)

            def written() -> None:
                partial.write_text(vm_id)
                guest.state = "shutoff"

            self._job(host, guest, "save", self.kernel.rng.uniform(0.5, 6.0), written)
        if guest is not None and host.guests.get(vm_id) is guest and not guest.active:
            del host.guests[vm_id]
        if partial.is_file():
            partial.rename(path)
        if not path.is_file():
            raise NotFound(f"guest {vm_id} neither runs nor was saved to {path}")

    # --- migration

    def migrate_live(
        self, host: HostModel, vm_id: str, *, target_address: str, on_progress: Any, cancelled: Callable[[], bool],
        deadline_s: float, **_: Any,
    ) -> Any:  # fmt: skip
        self._change(host, "migrate", vm_id)
        guest = self._guest(host, vm_id)
        target = next(h for h in self.hosts.values() if h.ip == target_address)
        if not target.up:
            raise HypervisorRefused(f"libvirtd of {target.name} does not answer")
        if (there := target.guests.get(vm_id)) is not None and (there.active or there.job):
            raise Conflict(f"guest {guest.name} already exists at {target.name}")
        seconds, started, life = self.kernel.rng.uniform(1.0, 15.0), self.kernel.time, host.lives
        guest.job, was = "migrate", guest.state  # a suspended one arrives suspended

        def arrive() -> None:
            if guest.job != "migrate" or host.guests.get(vm_id) is not guest:
                return
            guest.job = ""
            if not (host.powered and target.up):
                return
            if self.kernel.rng.random() < self.broken_hand_over:
                self._hand_over_unseen(host, guest)
                if self.kernel.rng.random() < 0.5:
                    return  # libvirtd of the target never let it run
            else:
                del host.guests[vm_id]
            target.guests[vm_id] = replace(guest, state=was)
            self._seen(vm_id)

        self.kernel.at(seconds, arrive)
        while guest.job == "migrate" and host.up and host.lives == life:
            on_progress(min(99.0, 100.0 * (self.kernel.time - started) / seconds), "memory", None)
            self.kernel.sleep(0.5)
            if cancelled() and guest.job == "migrate":
                guest.job = ""
                raise Cancelled("migration aborted")
        if not host.up or host.lives != life:
            raise OutcomeUnknown(f"libvirtd of {host.name} went away")
        if host.guests.get(vm_id) is guest:
            raise HypervisorRefused("the migration ended at its source")
        return SimpleNamespace(total_ms=1, downtime_ms=1, bytes=1, memory_bytes=1, disk_bytes=0)

    def adopt(
        self, host: HostModel, vm_id: str, *, cancelled: Callable[[], bool], deadline_s: float, **_: Any
    ) -> Adopted:
        """Watch the move a dead worker left to its end."""
        self._enter(host, "adopt")
        guest = host.guests.get(vm_id)
        if guest is None:
            return Adopted.LEFT
        if guest.job != "migrate":
            return Adopted.NONE
        while guest.job == "migrate" and host.up:
            self.kernel.sleep(0.5)
            if cancelled() and guest.job == "migrate":
                guest.job = ""
                raise Cancelled("migration aborted")
        return Adopted.STAYED if host.guests.get(vm_id) is guest else Adopted.LEFT

    def finish_at_target(self, host: HostModel, vm_id: str) -> None:
        self._change(host, "finish", vm_id)
        self._guest(host, vm_id).state = "running"
        self._seen(vm_id)

    def arrived(self, host: HostModel, vm_id: str) -> None:
        """libvirt keeps no figures here."""

    def peer(self, _ctx: Any, address: str) -> HostModel | None:
        host = next(h for h in self.hosts.values() if h.ip == address)
        return host if host.up else None

    def observe(self, source: HostModel | None, target: HostModel | None, vm_id: str) -> Whereabouts:
        def presence(host: HostModel | None) -> Presence:
            if host is None or not host.up:
                return Presence.UNKNOWN
            guest = host.guests.get(vm_id)
            return Presence.ABSENT if guest is None else Presence(guest.state)

        guest = None if source is None else source.guests.get(vm_id)
        return Whereabouts(presence(source), presence(target), guest is not None and guest.job == "migrate")

    def _hand_over_unseen(self, host: HostModel, guest: Guest) -> None:
        """The source's libvirtd dies when the guest is stopped for its hand-over: nobody ends it there, or goes on."""
        self.kernel.fault("libvirtd killed in a hand-over", f"{guest.name} on {host.name}")
        host.guests[guest.vm_id] = replace(guest, state="paused")
        host.down()

        def back() -> None:
            host.up = host.powered

        self.kernel.at(self.kernel.rng.choice((0.5, 6.0)), back)

    # --- network, disks, locks

    def add_dhcp_host(self, host: HostModel, network: str, mac: str, ip: str, name: str = "") -> bool:
        self._change(host, "add DHCP host for", mac)
        for other in [m for m, i in host.dhcp.items() if i == ip and m != mac]:
            del host.dhcp[other]  # stale, unless its guest runs
            if any(guest.active and guest.spec.mac == other for guest in host.guests.values()):
                self.kernel.violated("address given twice", f"{ip} on {host.name}: {mac} and {other}")
        host.dhcp[mac] = ip
        return True

    def remove_dhcp_host(self, host: HostModel, network: str, mac: str) -> bool:
        self._enter(host, "remove DHCP host")
        return host.dhcp.pop(mac, None) is not None

    def dhcp_hosts(self, host: HostModel, network: str) -> list[Any]:
        self._enter(host, "list DHCP hosts")
        return [SimpleNamespace(mac=mac, ip=ip, name="") for mac, ip in host.dhcp.items()]

    def create_overlay(self, base: Path, target: Path, *, attempt: str = "0", **_: Any) -> Path:
        self.kernel.point("create overlay")
        if target.exists():
            return target
        self.fence(self.kernel.actor(), f"create overlay {target.parent.name}")
        partial = target.with_name(f"{target.name}.{attempt}.partial")
        try:
            partial.touch()
            self.kernel.sleep(self.kernel.rng.uniform(0.02, 2.0))
            self.kernel.point("rename overlay")
            os.link(partial, target)
            partial.unlink()
        except FileExistsError:
            partial.unlink(missing_ok=True)
            raise Conflict(f"{target} appeared meanwhile") from None
        except OSError as error:
            raise HypervisorRefused(f"cannot create {target}: {error}") from error
        return target

    @contextmanager
    def vm_lock(self, state_dir: Path, vm_id: str, timeout_s: float = 0) -> Iterator[None]:
        """flock: the kernel frees it when the process dies, and not while it is stopped."""
        held = self.by_state_dir[state_dir].locks
        self.kernel.point("lock")
        if not self.kernel.wait_for(lambda: vm_id not in held, timeout_s):
            raise Unavailable(f"VM {vm_id} is being worked on by another process of this server node")
        held.add(vm_id)
        try:
            yield
        finally:
            held.discard(vm_id)


def _info(guest: Guest) -> GuestInfo:
    spec = guest.spec
    return GuestInfo(
        vm_id=guest.vm_id, name=guest.name, state=guest.state, memory_mib=spec.memory_mib, vcpus=spec.vcpus,
        mac=spec.mac, network=spec.network, console_port=spec.console_port, disks=spec.disks,
        operation=spec.operation, step=spec.step, attempt=spec.attempt,
    )  # fmt: skip


def _use_up(saved: Path | None) -> None:
    if saved is not None:
        saved.unlink(missing_ok=True)


@contextmanager
def rooms(world: World) -> Iterator[None]:
    """The rooms of server nodes with this world where their hypervisor was."""
    from hdcs_tasks.monitor import node as monitor_node
    from hdcs_tasks.pool import node as pool_node
    from hdcs_tasks.pool import node_cables
    from hdcs_tasks.vm import node as vm_node
    from hdcs_tasks.vm import node_address, node_migrate, node_start

    nothing = lambda *_, **__: None  # noqa: E731
    with ExitStack() as stack:
        for room in (vm_node, node_start, node_address, node_migrate, pool_node, node_cables, monitor_node):
            for name, stand_in in (
                ("guests", world), ("networks", world), ("disks", world), ("migration", world),
                ("vm_lock", world.vm_lock),
                ("peer", world.peer), ("whereabouts", world),
                ("restore_checkpoints", nothing), ("ensure_seed", nothing),
                ("agent", SimpleNamespace(renew_network=nothing)),
            ):  # fmt: skip
                if hasattr(room, name):
                    stack.enter_context(patch.object(room, name, stand_in))
        yield
