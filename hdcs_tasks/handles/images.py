"""Images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hdcs_tasks.errors import HdcsError
from hdcs_tasks.handles.operation import Operation, Part, Plan, View
from hdcs_tasks.image import control as image_control
from hdcs_tasks.image import control_copy, control_export, control_import, control_publish

LOOK_S = 120.0
"""How long a dry run waits for a server node to look."""


class Images(Part):
    def add(
        self, name: str, path: str, *, domain_nodes: Sequence[str] = (), idempotency_key: str | None = None
    ) -> Operation:
        asked = self._asked(idempotency_key)
        return self._op(image_control.add(self._control, name, path, asked, domain_nodes=domain_nodes))

    def import_(
        self, name: str, path: str, *, format: str | None = None, disk: int | None = None, drivers: bool = False,
        profile: str | None = None, domain_nodes: Sequence[str] = (), node: str | None = None, dry_run: bool = False,
        idempotency_key: str | None = None, reason: str = "",
    ) -> Any:  # fmt: skip
        """A new version of image ``name`` from a raw, qcow2, vmdk, vdi, vhdx, vpc or OVA file, or a block device of
        server node ``node``; an Operation, or with ``dry_run`` a Plan that tells what is there and where it would go.
        ``disk``: which of an OVA's; ``drivers``: by virt-v2v; ``profile``: make one out of the machine's shape."""
        request = control_import.ImportRequest(name, path, format, disk, drivers, profile, tuple(domain_nodes), node)
        if dry_run:
            plan = control_import.plan(self._control, request)
            seen = look(self._op(control_import.probe(self._control, request, self._asked(reason=reason))))
            if seen["found"] is not None:
                plan["domain_node"] = seen["found"]["domain_node"]
            return Plan(plan | seen)
        asked = self._asked(idempotency_key, reason)
        return self._op(control_import.import_(self._control, request, asked))

    def export(
        self, name: str, path: str, *, format: str | None = None, compress: bool = False, force: bool = False,
        domain_node: str | None = None, node: str | None = None, dry_run: bool = False,
        idempotency_key: str | None = None, reason: str = "",
    ) -> Any:  # fmt: skip
        """Flattened, to a file or a block device of server node ``node``; an Operation whose result is the manifest, or
        with ``dry_run`` a Plan."""
        request = control_export.ExportRequest(path, format, compress, force, domain_node, node)
        asked = self._asked(None if dry_run else idempotency_key, reason)
        operation = self._op(control_export.export(self._control, name, request, asked, dry_run=dry_run))
        return Plan({"image": name, "path": path} | look(operation)) if dry_run else operation

    def publish(
        self, name: str, version: int, *, domain_nodes: Sequence[str] = (), dry_run: bool = False,
        idempotency_key: str | None = None, reason: str = "",
    ) -> Any:  # fmt: skip
        """Let clones take this version, in all domain nodes that have the image or in the named ones; VMs that are
        there follow by ``vm.refresh``. An Operation, or with ``dry_run`` a Plan."""
        if dry_run:
            return Plan(control_publish.plan(self._control, name, version, domain_nodes=domain_nodes))
        asked = self._asked(idempotency_key, reason)
        return self._op(control_publish.publish(self._control, name, version, asked, domain_nodes=domain_nodes))

    def copy(self, name: str, to: str, *, idempotency_key: str | None = None, reason: str = "") -> Operation:
        """Bring it to domain node ``to``, from one that has it."""
        return self._op(control_copy.copy(self._control, name, to, self._asked(idempotency_key, reason)))

    def delete(self, name: str, *, force: bool = False) -> Operation:
        """``force``: also one that only backups refer to, or that is published."""
        return self._op(image_control.delete(self._control, name, self._asked(), force=force))

    def list(self) -> list[View]:
        return image_control.list_images(self._control)


def look(operation: Operation) -> View:
    """What a server node's look found: ``{fits, found, refusal}``."""
    try:
        return {"fits": True, "found": operation.result(timeout_s=LOOK_S), "refusal": None}
    except HdcsError as error:
        return {"fits": False, "found": None, "refusal": error.to_dict()}
