"""A handle on an asked-for change, and what every part of ``Cloud`` shares."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, TypeAlias

from hdcs_tasks.errors import OperationFailed, WaitTimedOut, from_dict
from hdcs_tasks.operations import views
from hdcs_tasks.operations.control import Asked, Control

View: TypeAlias = dict[str, Any]
ENDED = frozenset({"done", "failed", "cancelled"})


class Operation:
    """A handle on an asked-for change: look, watch, wait, cancel."""

    def __init__(self, control: Control, operation_id: str) -> None:
        self._control = control
        self.id = operation_id

    def show(self) -> View:
        """The operation as it stands, with steps, attempts and children."""
        return views.show(self._control, self.id)

    @property
    def state(self) -> str:
        return str(self.show()["state"])

    @property
    def progress(self) -> View:
        """``percent`` (0 to 100), ``phase``, ``eta_s`` (seconds or None)."""
        seen = self.show()
        return {key: seen[key] for key in ("percent", "phase", "eta_s")}

    def watch(self, *, timeout_s: float | None = None, every_s: float = 0.25) -> Iterator[View]:
        """Every change of state, percent or phase, until it has ended. Raises WaitTimedOut; the operation goes on."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        last: tuple[Any, ...] | None = None
        highest = 0.0
        while True:
            seen = self.show()
            # A step tried again begins anew, and the record follows live progress only now and then.
            seen["percent"] = highest = max(highest, seen["percent"])
            now = (seen["state"], seen["percent"], seen["phase"], tuple(c["state"] for c in seen["children"]))
            if now != last:
                last = now
                yield seen
            if seen["state"] in ENDED:
                return
            if end is not None and time.monotonic() > end:
                raise WaitTimedOut(
                    f"operation {self.id} ({seen['kind']}) has not ended after {timeout_s:.0f} s: {seen['phase']}",
                    next=f"It goes on; watch it with: hdcs op watch {self.id}",
                )
            time.sleep(every_s)

    def result(self, *, timeout_s: float | None = 600.0) -> View:
        """Wait for the end and return the result. Raises what made it fail, Cancelled, or WaitTimedOut."""
        *_, seen = self.watch(timeout_s=timeout_s)
        if seen["state"] == "done":
            return dict(seen["result"] or {})
        error = seen["error"] or {"code": OperationFailed.code, "message": f"operation {self.id} {seen['state']}"}
        raise from_dict(error)

    def cancel(self) -> View:
        return views.cancel(self._control, self.id)


class Part:
    def __init__(self, control: Control, by: str) -> None:
        self._control = control
        self._by = by

    def _asked(self, idempotency_key: str | None = None, reason: str = "") -> Asked:
        return Asked(by=self._by, reason=reason, idempotency_key=idempotency_key)

    def _op(self, record: Any) -> Operation:
        return Operation(self._control, record.id)


class Plan:
    """What a call would do (``dry_run=True``)."""

    def __init__(self, plan: View) -> None:
        self.plan = plan

    def explain(self) -> View:
        return self.plan


class Operations(Part):
    def __getitem__(self, operation_id: str) -> Operation:
        return Operation(self._control, str(views.show(self._control, operation_id)["id"]))

    def list(self, **filters: Any) -> list[View]:
        """Newest first; filters: live, vm, kind, limit."""
        return views.list_operations(self._control, **filters)
