"""Pure decisions of idle reclamation: who uses a desktop, which policy is its, and which rung of its ladder is next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hdcs_tasks.errors import Invalid
from hdcs_tasks.states import VmState

EXEMPT_TAG = "always-on"
RUNGS = ("warn", "suspend", "save", "stop", "delete")
"""In the order in which they may stand on a ladder."""
AFTER_MAX_S = 366 * 86_400.0
SELECTOR = frozenset({"names", "tag", "owner", "home", "profile"})

_S = VmState
GIVEN_IN = {
    "warn": frozenset({_S.RUNNING}), "suspend": frozenset({_S.RUNNING}),
    "save": frozenset({_S.RUNNING, _S.SUSPENDED}), "stop": frozenset({_S.RUNNING, _S.SUSPENDED}),
    "delete": frozenset({_S.STOPPED, _S.SAVED}),
}  # fmt: skip
"""In which states of a VM each rung can be taken. Only a desktop at rest is deleted: nobody can sit at it."""


@dataclass(frozen=True)
class Limits:
    """Up to here a guest counts as quiet: CPU in percent of one vCPU, bytes per second of disk and of network."""

    cpu_percent: float = 10.0
    disk_bytes_s: float = 512 * 1024
    net_bytes_s: float = 64 * 1024


@dataclass(frozen=True)
class Rung:
    """What is done, and how long nobody must have used the desktop before."""

    do: str
    after_s: float


@dataclass(frozen=True)
class Policy:
    """``selector``: names, tag, owner, home, profile, all of which a VM must match; empty means every VM.

    ``inside``: whether the guest agent is asked who is logged in and whose processes run. ``rank``: of several policies
    that select a VM the lowest is its, then the first by name.
    """

    name: str
    ladder: tuple[Rung, ...]
    selector: Mapping[str, Any]
    limits: Limits = Limits()
    rank: int = 100
    inside: bool = True
    force: bool = False
    message: str = ""


@dataclass(frozen=True)
class Desktop:
    """A VM as far as policies look at it. ``did``: the last rung taken since it was last used, ``did_s``: how long ago.

    ``idle_s``: how long nobody used it; None where that is not known.
    """

    name: str
    state: VmState
    home: str
    owner: str
    profile: str
    tags: Sequence[str]
    warm_pool: str | None
    idle_s: float | None
    did: str | None = None
    did_s: float = 0.0


@dataclass(frozen=True)
class Next:
    """The next rung, in how many seconds it is due (0: now), and for how long it has been."""

    do: str
    in_s: float
    late_s: float = 0.0


def ladder_of(times: Mapping[str, float | None]) -> tuple[Rung, ...]:
    """The ladder of ``{rung: seconds or None}``. Raises Invalid for one that cannot be climbed."""
    given = [(do, float(times[do] or 0)) for do in RUNGS if times.get(do) is not None]
    if not given:
        raise Invalid("an idle policy without a rung does nothing", next=f"Name a time for: {', '.join(RUNGS)}")
    for do, after_s in given:
        if not 1 <= after_s <= AFTER_MAX_S:
            raise Invalid(f"{do} after {after_s:g} s is not between 1 s and a year")
    for (low, low_s), (high, high_s) in pairwise(given):
        if low_s >= high_s:
            raise Invalid(f"{high} after {high_s:g} s comes before {low} after {low_s:g} s",
                          next=f"The order is: {', '.join(RUNGS)}")  # fmt: skip
    names = {do for do, _ in given}
    if "delete" in names and not names & {"stop", "save"}:
        raise Invalid("only a desktop at rest is deleted", next="Give a time for stop or save, too")
    return tuple(Rung(do, after_s) for do, after_s in given)


def check_selector(selector: Mapping[str, Any]) -> None:
    if unknown := sorted(set(selector) - SELECTOR):
        raise Invalid(f"VMs are not selected by {unknown[0]!r}", next=f"Known: {', '.join(sorted(SELECTOR))}")


def selects(policy: Policy, vm: Desktop) -> bool:
    wanted = policy.selector
    return (
        (not wanted.get("names") or vm.name in wanted["names"]) and (not wanted.get("tag") or wanted["tag"] in vm.tags)
        and all(not wanted.get(key) or wanted[key] == getattr(vm, key) for key in ("owner", "home", "profile"))
    )  # fmt: skip


def policy_of(policies: Sequence[Policy], vm: Desktop) -> Policy | None:
    """The policy that is this VM's; None: none is."""
    mine = [policy for policy in policies if selects(policy, vm)]
    return min(mine, key=lambda policy: (policy.rank, policy.name), default=None)


def exempt(vm: Desktop) -> str:
    """Why idle policies leave this VM alone; empty: they do not."""
    if EXEMPT_TAG in vm.tags:
        return f"tagged {EXEMPT_TAG}"
    return f"of the warm pool {vm.warm_pool}" if vm.warm_pool else ""


def use_seen(
    limits: Limits, *, state: str, console_clients: int, cpu_percent: float | None, disk_bytes_s: float | None,
    net_bytes_s: float | None,
) -> str:  # fmt: skip
    """What a sample shows of somebody using a guest; empty: nothing.

    A first sample, with no rate yet, counts as use: fail closed. Disk and network unknown beside a known CPU (a host
    with a hung QEMU) are not judged. A paused guest is used by who looks at its console.
    """
    if console_clients > 0:
        return "a console client is connected"
    if state != "running":
        return ""
    if cpu_percent is None:
        return "not measured yet"
    if cpu_percent > limits.cpu_percent:
        return f"CPU at {cpu_percent:.0f} % of one vCPU"
    if disk_bytes_s is not None and disk_bytes_s > limits.disk_bytes_s:
        return f"disk at {disk_bytes_s / 1024:.0f} KiB/s"
    if net_bytes_s is not None and net_bytes_s > limits.net_bytes_s:
        return f"network at {net_bytes_s / 1024:.0f} KiB/s"
    return ""


def sample_use(limits: Limits, sample: Mapping[str, Any]) -> str:
    """``use_seen`` of a sample as monitoring keeps it. Rates of a time in which the guest was looked into say nothing:
    answering is work."""
    if sample.get("looked"):
        return "a console client is connected" if sample["console_clients"] > 0 else ""
    rates = {key: sample.get(key) for key in ("cpu_percent", "disk_bytes_s", "net_bytes_s")}
    return use_seen(limits, state=sample["state"], console_clients=sample["console_clients"], **rates)


def use_inside(look: Mapping[str, Any]) -> str:
    """What a look into a guest (``monitor.node_idle.look``) shows of somebody using it; empty: nothing, or the agent
    is silent and the rest decides."""
    if look.get("console_clients"):
        return "a console client is connected"
    if users := look.get("users"):
        return f"logged in: {', '.join(users)}"
    if processes := look.get("processes"):
        return f"processes of users run: {', '.join(processes[:3])}"
    # It answers, but not in time: somebody may well be there.
    return str(look.get("says") or "not known") if look.get("unsure") else ""


def next_rung(ladder: Sequence[Rung], vm: Desktop) -> Next | None:
    """What is done next with a VM nobody uses, and when; None: nothing any more.

    Rungs are climbed one at a time, each as long after the one before as the ladder says: who was only just warned has
    the whole time between, however long the desktop was idle before. A rung its state does not allow is passed over.
    """
    if vm.idle_s is None or exempt(vm):
        return None
    done = next((n for n, rung in enumerate(ladder) if rung.do == vm.did), None)
    for number in range(0 if done is None else done + 1, len(ladder)):
        rung = ladder[number]
        if vm.state not in GIVEN_IN[rung.do]:
            continue
        wait_s = rung.after_s - vm.idle_s
        if done is not None:
            wait_s = max(wait_s, rung.after_s - ladder[done].after_s - vm.did_s)
        return Next(rung.do, max(0.0, wait_s), max(0.0, -wait_s))
    return None


def shortest_s(policies: Sequence[Policy]) -> float:
    """No desktop used more recently than this is any policy's business."""
    return min((policy.ladder[0].after_s for policy in policies), default=AFTER_MAX_S)
