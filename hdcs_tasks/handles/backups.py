"""Backups and their policies."""

from __future__ import annotations

from typing import Any

from hdcs_tasks.backup import control as backup_control
from hdcs_tasks.backup import control_adopt, control_copy, control_drill, control_policy, control_prune, control_restore
from hdcs_tasks.backup.rules import Keep
from hdcs_tasks.handles.operation import Operation, Part, Plan, View


class Backups(Part):
    def create(
        self, vm: str, *, full: bool = False, bandwidth_mib_s: int | None = None, idempotency_key: str | None = None,
        reason: str = "",
    ) -> Operation:  # fmt: skip
        asked = self._asked(idempotency_key, reason)
        return self._op(backup_control.create(self._control, vm, asked, full=full, bandwidth_mib_s=bandwidth_mib_s))

    def restore(
        self, backup_id: str, *, name: str | None = None, in_place: bool = False, domain_node: str | None = None,
        start: bool = True, idempotency_key: str | None = None,
    ) -> Operation:  # fmt: skip
        """As a new VM ``name``, or ``in_place``: the disk of the stopped VM it was taken of is set back.

        ``domain_node``: where; by default where the backup, or else a good copy of it, lies."""
        asked = self._asked(idempotency_key)
        return self._op(
            control_restore.restore(
                self._control, backup_id, asked, name=name, in_place=in_place, domain_node=domain_node, start=start
            )
        )

    def extract(
        self, backup_id: str, name: str, *, domain_node: str | None = None, idempotency_key: str | None = None
    ) -> Operation:
        """Its disk alone, as the plain file ``import/<name>.qcow2`` of the storage."""
        asked = self._asked(idempotency_key)
        return self._op(control_restore.extract(self._control, backup_id, name, asked, domain_node=domain_node))

    def copy(
        self, backup_id: str, to: str, *, bandwidth_mib_s: int | None = None, idempotency_key: str | None = None
    ) -> Operation:
        """A second copy, with all the point stands on, in domain node ``to``; verified there."""
        asked = self._asked(idempotency_key)
        return self._op(control_copy.copy(self._control, backup_id, to, asked, bandwidth_mib_s=bandwidth_mib_s))

    def verify(self, backup_id: str, *, domain_node: str | None = None) -> Operation:
        """Check a point against its manifests; ``domain_node``: the copy there."""
        return self._op(backup_control.verify(self._control, backup_id, self._asked(), domain_node=domain_node))

    def drill(self, backup_id: str, *, timeout_s: float = control_drill.AGENT_TIMEOUT_S) -> Operation:
        """Prove a point: restored into a throwaway VM without network, whose agent must answer in ``timeout_s``."""
        return self._op(control_drill.drill(self._control, backup_id, self._asked(), timeout_s=timeout_s))

    def delete(self, *backup_ids: str) -> Operation:
        """Points of one VM, named in any order; all of them, or (a later one builds on one of them) none."""
        return self._op(backup_control.delete(self._control, backup_ids, self._asked()))

    def prune(
        self, vm: str, *, last: int = 1, daily: int = 0, weekly: int = 0, monthly: int = 0, merge: bool = False,
        dry_run: bool = False, idempotency_key: str | None = None,
    ) -> Any:  # fmt: skip
        """Drop what these numbers of newest points do not ask for; an Operation, or a Plan with ``dry_run``."""
        keep = Keep(last, daily, weekly, monthly)
        if dry_run:
            return Plan(control_prune.plan(self._control, vm, keep, merge=merge))
        return self._op(control_prune.prune(self._control, vm, self._asked(idempotency_key), keep, merge=merge))

    def adopt(self, domain_node: str) -> Operation:
        """Record the points a repository holds and the record has lost."""
        return self._op(control_adopt.adopt(self._control, domain_node, self._asked()))

    def list(self, vm: str | None = None, *, unproven: bool = False) -> list[View]:
        return backup_control.list_backups(self._control, vm, unproven=unproven)

    def show(self, backup_id: str) -> View:
        """One backup by its id or a unique prefix of at least 6 characters."""
        return backup_control.show(self._control, backup_id)


class Policies(Part):
    """Backup policies."""

    def create(
        self, name: str, *, schedule: str, last: int = 1, daily: int = 0, weekly: int = 0, monthly: int = 0,
        selector: View | None = None, **more: Any,
    ) -> View:  # fmt: skip
        """``more``: full_every, full_percent, merge, bandwidth_mib_s, concurrency, drill_schedule, drill_points,
        copy_to."""
        keep = Keep(last, daily, weekly, monthly)
        return control_policy.create(self._control, name, schedule=schedule, selector=selector or {}, keep=keep, **more)

    def list(self) -> list[View]:
        return control_policy.list_policies(self._control)

    def show(self, name: str) -> View:
        return control_policy.show(self._control, name)

    def enable(self, name: str, enabled: bool = True) -> View:
        return control_policy.enable(self._control, name, enabled)

    def delete(self, name: str) -> None:
        control_policy.delete(self._control, name)

    def run(self, name: str) -> View:
        """Begin a run now, besides the schedule."""
        return control_policy.run(self._control, name)
