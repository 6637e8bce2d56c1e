"""Every state machine of HDCS: which states a record has and which moves are legal.

The only writer of a state column is ``hdcs_tasks.store.transitions.move``, which asks ``check`` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from hdcs_tasks.errors import WrongState


class VmState(StrEnum):
    """A desktop. The ``-ing`` states belong to a live operation; the others rest."""

    CREATING = "creating"
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    RESUMING = "resuming"
    REBOOTING = "rebooting"
    SAVING = "saving"
    SAVED = "saved"
    MIGRATING = "migrating"
    DELETING = "deleting"
    DELETED = "deleted"
    FAILED = "failed"


class OperationState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StepState(StrEnum):
    """``parked``: waits for capacity or ``not_before``; ``published``: a message is out, an attempt was issued."""

    PENDING = "pending"
    PUBLISHED = "published"
    PARKED = "parked"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ServerNodeState(StrEnum):
    UP = "up"
    DRAINING = "draining"
    LEFT = "left"
    LOST = "lost"


class ImageState(StrEnum):
    ADDING = "adding"
    READY = "ready"
    FAILED = "failed"
    DELETING = "deleting"
    DELETED = "deleted"


class BackupState(StrEnum):
    CREATING = "creating"
    READY = "ready"
    BROKEN = "broken"
    FAILED = "failed"
    DELETING = "deleting"
    DELETED = "deleted"


class AlarmState(StrEnum):
    """``pending``: seen, but not for long enough; forgotten when it passes before it is raised."""

    PENDING = "pending"
    RAISED = "raised"
    ACKNOWLEDGED = "acknowledged"
    CLEARED = "cleared"


_V = VmState
_VM: Mapping[StrEnum, frozenset[StrEnum]] = {
    _V.CREATING: frozenset({_V.STOPPED, _V.FAILED, _V.DELETING, _V.DELETED}),
    _V.STOPPED: frozenset({_V.STARTING, _V.DELETING, _V.RUNNING, _V.MIGRATING}),
    # CREATING again: a clone refused by layer two is planned anew in another domain node.
    _V.STARTING: frozenset({_V.CREATING, _V.RUNNING, _V.STOPPED, _V.SAVED, _V.FAILED, _V.STOPPING, _V.DELETING}),
    _V.RUNNING: frozenset(
        {_V.STOPPING, _V.SUSPENDING, _V.REBOOTING, _V.SAVING, _V.MIGRATING, _V.STOPPED, _V.SUSPENDED, _V.DELETING}
    ),
    _V.STOPPING: frozenset({_V.STOPPED, _V.RUNNING, _V.SUSPENDED, _V.FAILED, _V.DELETING}),
    _V.SUSPENDING: frozenset({_V.SUSPENDED, _V.RUNNING, _V.STOPPED, _V.FAILED, _V.STOPPING, _V.DELETING}),
    _V.SUSPENDED: frozenset({_V.RESUMING, _V.SAVING, _V.STOPPING, _V.DELETING, _V.RUNNING, _V.STOPPED, _V.MIGRATING}),
    _V.RESUMING: frozenset({_V.RUNNING, _V.SUSPENDED, _V.STOPPED, _V.FAILED, _V.STOPPING, _V.DELETING}),
    _V.REBOOTING: frozenset({_V.RUNNING, _V.STOPPED, _V.FAILED, _V.STOPPING, _V.DELETING}),
    _V.SAVING: frozenset({_V.SAVED, _V.RUNNING, _V.SUSPENDED, _V.STOPPED, _V.FAILED, _V.STOPPING, _V.DELETING}),
    _V.SAVED: frozenset({_V.STARTING, _V.STOPPING, _V.DELETING, _V.MIGRATING}),
    _V.MIGRATING: frozenset({_V.RUNNING, _V.SUSPENDED, _V.STOPPED, _V.SAVED, _V.FAILED, _V.STOPPING, _V.DELETING}),
    # What it was, where the deletion was cancelled before it had touched anything.
    _V.DELETING: frozenset({_V.DELETED, _V.FAILED, _V.RUNNING, _V.SUSPENDED, _V.STOPPED, _V.SAVED}),
    _V.DELETED: frozenset(),
    _V.FAILED: frozenset({_V.DELETING, _V.STOPPED, _V.RUNNING, _V.STOPPING, _V.SUSPENDED}),
}

_O = OperationState
_OPERATION: Mapping[StrEnum, frozenset[StrEnum]] = {
    _O.QUEUED: frozenset({_O.RUNNING, _O.DONE, _O.FAILED, _O.CANCELLED}),
    _O.RUNNING: frozenset({_O.DONE, _O.FAILED, _O.CANCELLED}),
    _O.DONE: frozenset(),
    _O.FAILED: frozenset(),
    _O.CANCELLED: frozenset(),
}

_S = StepState
_STEP: Mapping[StrEnum, frozenset[StrEnum]] = {
    _S.PENDING: frozenset({_S.PUBLISHED, _S.FAILED, _S.CANCELLED}),
    _S.PUBLISHED: frozenset({_S.PUBLISHED, _S.PARKED, _S.DONE, _S.FAILED, _S.CANCELLED}),
    _S.PARKED: frozenset({_S.PUBLISHED, _S.FAILED, _S.CANCELLED}),
    _S.DONE: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}

_N = ServerNodeState
_SERVER_NODE: Mapping[StrEnum, frozenset[StrEnum]] = {
    _N.UP: frozenset({_N.DRAINING, _N.LEFT, _N.LOST}),
    _N.DRAINING: frozenset({_N.UP, _N.LEFT, _N.LOST}),
    _N.LEFT: frozenset({_N.UP, _N.DRAINING}),
    _N.LOST: frozenset({_N.UP, _N.DRAINING, _N.LEFT}),
}

_I = ImageState
_IMAGE: Mapping[StrEnum, frozenset[StrEnum]] = {
    _I.ADDING: frozenset({_I.READY, _I.FAILED}),
    _I.READY: frozenset({_I.DELETING, _I.ADDING}),
    _I.FAILED: frozenset({_I.ADDING, _I.DELETING}),
    _I.DELETING: frozenset({_I.DELETED, _I.READY, _I.FAILED}),
    _I.DELETED: frozenset({_I.ADDING}),
}

_B = BackupState
_BACKUP: Mapping[StrEnum, frozenset[StrEnum]] = {
    _B.CREATING: frozenset({_B.READY, _B.FAILED}),
    _B.READY: frozenset({_B.BROKEN, _B.DELETING}),
    _B.BROKEN: frozenset({_B.DELETING, _B.READY}),
    _B.FAILED: frozenset({_B.DELETING}),
    _B.DELETING: frozenset({_B.DELETED, _B.READY, _B.BROKEN}),
    _B.DELETED: frozenset(),
}

_A = AlarmState
_ALARM: Mapping[StrEnum, frozenset[StrEnum]] = {
    _A.PENDING: frozenset({_A.RAISED}),
    _A.RAISED: frozenset({_A.ACKNOWLEDGED, _A.CLEARED}),
    _A.ACKNOWLEDGED: frozenset({_A.CLEARED}),
    _A.CLEARED: frozenset(),
}

MACHINES: Mapping[type[StrEnum], Mapping[StrEnum, frozenset[StrEnum]]] = {
    VmState: _VM,
    OperationState: _OPERATION,
    StepState: _STEP,
    ServerNodeState: _SERVER_NODE,
    ImageState: _IMAGE,
    BackupState: _BACKUP,
    AlarmState: _ALARM,
}

OPERATION_LIVE = frozenset({OperationState.QUEUED, OperationState.RUNNING})
STEP_LIVE = frozenset({StepState.PENDING, StepState.PUBLISHED, StepState.PARKED})
IN_POOL = (ServerNodeState.UP, ServerNodeState.DRAINING)
VM_RESTS = frozenset(
    {VmState.STOPPED, VmState.RUNNING, VmState.SUSPENDED, VmState.SAVED, VmState.DELETED, VmState.FAILED}
)
VM_HOLDS_GUEST = frozenset(
    {
        VmState.STARTING, VmState.RUNNING, VmState.STOPPING, VmState.SUSPENDING, VmState.SUSPENDED, VmState.RESUMING,
        VmState.REBOOTING, VmState.SAVING, VmState.MIGRATING,
    }
)  # fmt: skip


def allowed(old: StrEnum, new: StrEnum) -> bool:
    """Whether a record may move from ``old`` to ``new``; both of one machine."""
    return new in MACHINES[type(old)][old]


def check(old: StrEnum, new: StrEnum, subject: str) -> None:
    """Raise WrongState unless ``subject`` may move from ``old`` to ``new``."""
    if not allowed(old, new):
        raise WrongState(
            f"{subject} is {old} and cannot become {new}",
            next="Wait for the operation that holds it, or look at it with: hdcs op list",
        )


# --- the picture of all this: docs/states.md

_TITLES: Mapping[type[StrEnum], tuple[str, StrEnum]] = {
    VmState: ("VM", VmState.CREATING),
    OperationState: ("Operation", OperationState.QUEUED),
    StepState: ("Step of an operation", StepState.PENDING),
    ServerNodeState: ("Server node", ServerNodeState.UP),
    ImageState: ("Image copy", ImageState.ADDING),
    BackupState: ("Backup", BackupState.CREATING),
    AlarmState: ("Alarm", AlarmState.PENDING),
}


def document() -> str:
    """The text of docs/states.md: per machine a diagram and a table of its legal moves."""
    parts = [
        "# States\n\nMade by `python -m hdcs_tasks.states > docs/states.md`; a test compares. A state column is "
        "written in one place, `hdcs_tasks/store/transitions.py`, by compare-and-set.\n"
    ]
    for machine, (title, first) in _TITLES.items():
        moves = MACHINES[machine]
        edges = [f"    [*] --> {first}"]
        rows = []
        for old in machine:
            new = [state for state in machine if state in moves[old]]
            edges += [f"    {old} --> {state}" for state in new] or [f"    {old} --> [*]"]
            rows.append(f"| {old} | {', '.join(new) or 'an end'} |")
        diagram = "\n".join(edges)
        table = "\n".join(rows)
        parts.append(
            f"## {title}\n\n```mermaid\nstateDiagram-v2\n{diagram}\n```\n\n| from | to |\n| --- | --- |\n{table}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
