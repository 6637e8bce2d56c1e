"""Every error HDCS raises, in one small tree with stable codes.

    HdcsError
    ├── Rejected               rejected             bad input or wrong state: never retried
    │   ├── Invalid            invalid
    │   ├── NotFound           not_found
    │   ├── WrongState         wrong_state
    │   └── QuotaExceeded      quota_exceeded
    ├── Conflict               conflict             somebody else is in the way: re-read, re-plan, bounded
    ├── Unavailable            unavailable          not now: backed off to a deadline
    │   ├── NoCapacity         no_capacity
    │   ├── Unreachable        unreachable
    │   └── RebuildPending     rebuild_pending      Redis lost reservations: allocation waits
    ├── HypervisorRefused      hypervisor_refused   libvirt or QEMU said no: fails visibly
    ├── OutcomeUnknown         outcome_unknown      observe, then decide
    ├── BackupBroken           backup_broken        the next backup is a full one
    ├── ClaimLost              claim_lost           this attempt is no longer ours: stop, report nothing
    ├── Cancelled              cancelled            the operation was cancelled
    ├── OperationFailed        operation_failed     raised by Operation.result()
    └── WaitTimedOut           wait_timed_out       the wait ended, the operation goes on

Every message says what, why and what to do next. Retry-or-not is a property of the class, never of the place that
catches it.
"""

from __future__ import annotations

from typing import Any, ClassVar


class HdcsError(Exception):
    """Base of the tree. ``next`` tells the reader what to do now; ``details`` is JSON-able."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, next: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.next = next
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.message}. {self.next}" if self.next else self.message

    def to_dict(self) -> dict[str, Any]:
        """The error as it travels in messages and is kept in the ledger."""
        return {"code": self.code, "message": self.message, "next": self.next, "details": self.details}


class Rejected(HdcsError):
    code = "rejected"
    exit_code = 2


class Invalid(Rejected):
    code = "invalid"


class NotFound(Rejected):
    code = "not_found"
    exit_code = 3


class WrongState(Rejected):
    code = "wrong_state"
    exit_code = 4


class QuotaExceeded(Rejected):
    code = "quota_exceeded"
    exit_code = 5


class Conflict(HdcsError):
    code = "conflict"
    exit_code = 4


class Unavailable(HdcsError):
    code = "unavailable"
    retryable = True
    exit_code = 6


class NoCapacity(Unavailable):
    code = "no_capacity"
    exit_code = 5


class Unreachable(Unavailable):
    code = "unreachable"


class RebuildPending(Unavailable):
    code = "rebuild_pending"


class HypervisorRefused(HdcsError):
    code = "hypervisor_refused"


class OutcomeUnknown(HdcsError):
    code = "outcome_unknown"
    retryable = True


class BackupBroken(HdcsError):
    code = "backup_broken"


class ClaimLost(HdcsError):
    code = "claim_lost"


class Cancelled(HdcsError):
    code = "cancelled"


class OperationFailed(HdcsError):
    code = "operation_failed"


class WaitTimedOut(HdcsError):
    code = "wait_timed_out"
    exit_code = 7


def _tree(cls: type[HdcsError]) -> dict[str, type[HdcsError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


BY_CODE: dict[str, type[HdcsError]] = _tree(HdcsError)


def from_dict(data: dict[str, Any]) -> HdcsError:
    """The error that ``to_dict`` described; an unknown code becomes a plain HdcsError."""
    cls = BY_CODE.get(str(data.get("code")), HdcsError)
    return cls(str(data.get("message", "")), next=str(data.get("next", "")), details=data.get("details") or {})
