"""Pure decisions about VMs: names of a bulk request, legal commands, shapes."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from hdcs_tasks.errors import Conflict, Invalid
from hdcs_tasks.routing import check_name
from hdcs_tasks.states import VmState
from hdcs_tasks.vm.move_rules import MOVABLE

COUNT_MAX = 10_000
_FIELD = re.compile(r"\{(?::0?(\d{1,2})d)?\}")


def expand_names(pattern: str, count: int, taken: Collection[str]) -> list[str]:
    """The names of ``count`` new VMs.

    ``desk-{:03d}`` numbers from 1 and passes over names in ``taken``; a pattern without a field names one VM and must
    be free. Raises Invalid for a bad pattern, count or name, Conflict for a taken name.
    """
    if not 1 <= count <= COUNT_MAX:
        raise Invalid(f"a count of {count} is not between 1 and {COUNT_MAX}", next="Ask for 1 VM or more")
    fields = _FIELD.findall(pattern)
    if not fields:
        return [_single(pattern, count, taken)]
    if len(fields) > 1 or "{" in _FIELD.sub("", pattern):
        raise Invalid(f"{pattern!r} is not a name pattern", next="Use one field, as in desk-{:03d}")
    width = int(fields[0] or 1)
    names: list[str] = []
    number = 1
    while len(names) < count:
        name = _FIELD.sub(f"{number:0{width}d}", pattern)
        if name not in taken:
            names.append(check_name("VM", name))
        number += 1
    return names


def _single(name: str, count: int, taken: Collection[str]) -> str:
    check_name("VM", name)
    if count > 1:
        raise Invalid(f"{count} VMs cannot all be named {name!r}", next=f"Use a pattern with a number: {name}-{{:03d}}")
    if name in taken:
        raise Conflict(f"there is a VM named {name!r} already", next="Choose another name, or see: hdcs vm list")
    return name


@dataclass(frozen=True)
class Command:
    """A short command to a guest: the states it may be given in, passes through, and ends in."""

    step: str
    given_in: frozenset[VmState]
    via: VmState
    to: VmState


_S = VmState
COMMANDS = {
    "suspend": Command("vm.suspend_on_node", frozenset({_S.RUNNING}), _S.SUSPENDING, _S.SUSPENDED),
    "resume": Command("vm.resume_on_node", frozenset({_S.SUSPENDED}), _S.RESUMING, _S.RUNNING),
    "reboot": Command("vm.reboot_on_node", frozenset({_S.RUNNING}), _S.REBOOTING, _S.RUNNING),
    "save": Command("vm.save_on_node", frozenset({_S.RUNNING, _S.SUSPENDED}), _S.SAVING, _S.SAVED),
    "stop": Command(
        "vm.stop_on_node",
        frozenset({_S.RUNNING, _S.SUSPENDED, _S.FAILED, _S.STARTING, _S.SUSPENDING, _S.RESUMING, _S.REBOOTING,
                   _S.SAVING, _S.MIGRATING, _S.STOPPING}),
        _S.STOPPING, _S.STOPPED,
    ),
}  # fmt: skip


_OTHERS = {
    "start": frozenset({_S.STOPPED, _S.SAVED}),
    "restore": frozenset({_S.SAVED}),
    "migrate": MOVABLE,
    "grow": frozenset({_S.RUNNING, _S.SUSPENDED, _S.STOPPED}),
    "backup": frozenset({_S.RUNNING, _S.SUSPENDED, _S.STOPPED}),
    "export": frozenset({_S.RUNNING, _S.SUSPENDED, _S.STOPPED}),
    "refresh": frozenset({_S.STOPPED}),
    "delete": frozenset(_S) - {_S.DELETED, _S.DELETING},
}


def given_in(verb: str) -> frozenset[VmState]:
    """The states of a VM in which ``verb`` may be given; Invalid for a verb there is not."""
    found = COMMANDS[verb].given_in if verb in COMMANDS else _OTHERS.get(verb)
    if found is None:
        raise Invalid(f"{verb!r} is not done to VMs", next=f"Known: {', '.join(sorted([*COMMANDS, *_OTHERS]))}")
    return found


def wrong_state_hint(verb: str, state: VmState, name: str) -> str:
    """What to do instead, for a command given to VM ``name`` in the wrong state."""
    hints = {
        ("refresh", _S.RUNNING): f"Stop it first: hdcs vm stop {name}",
        ("export", _S.SAVED): f"Bring it back first: hdcs vm restore {name}",
        ("stop", _S.STOPPED): "There is nothing to stop",
        ("stop", _S.SAVED): f"It does not run: start it from its saved memory (hdcs vm restore {name}) or delete it",
        ("start", _S.RUNNING): "There is nothing to start",
        ("start", _S.SUSPENDED): f"Wake it with: hdcs vm resume {name}",
        ("suspend", _S.SUSPENDED): "There is nothing to suspend",
        ("resume", _S.RUNNING): "There is nothing to resume",
        ("resume", _S.SAVED): f"Bring it back with: hdcs vm restore {name}",
        ("migrate", _S.STOPPED): "It needs no move: it starts on any server node of its domain node",
        ("migrate", _S.SAVED): "It needs no move: it can be restored on any server node of its domain node",
    }
    return hints.get((verb, state), f"Look at it with: hdcs vm show {name}")


_USB_RULE = re.compile(r"(0x[0-9a-fA-F]{1,2}|-1)(,(0x[0-9a-fA-F]{1,4}|-1)){2},-1,[01]")


def check_usb(policy: str) -> None:
    """Raise Invalid unless it is on, off, or a SPICE filter: ``class,vendor,product,-1,allow`` joined by '|'."""
    if policy not in ("on", "off") and not all(_USB_RULE.fullmatch(rule.strip()) for rule in policy.split("|")):
        raise Invalid(f"{policy!r} is not a USB policy", next="Use on, off, or e.g. 0x08,-1,-1,-1,1|-1,-1,-1,-1,0")
