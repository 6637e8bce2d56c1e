"""Images."""

from __future__ import annotations

from collections.abc import Sequence

from hdcs_tasks.handles.operation import Operation, Part, View
from hdcs_tasks.image import control as image_control
from hdcs_tasks.image import control_copy


class Images(Part):
    def add(
        self, name: str, path: str, *, domain_nodes: Sequence[str] = (), idempotency_key: str | None = None
    ) -> Operation:
        asked = self._asked(idempotency_key)
        return self._op(image_control.add(self._control, name, path, asked, domain_nodes=domain_nodes))

    def copy(self, name: str, to: str, *, idempotency_key: str | None = None, reason: str = "") -> Operation:
        """Bring it to domain node ``to``, from one that has it."""
        return self._op(control_copy.copy(self._control, name, to, self._asked(idempotency_key, reason)))

    def delete(self, name: str) -> Operation:
        return self._op(image_control.delete(self._control, name, self._asked()))

    def list(self) -> list[View]:
        return image_control.list_images(self._control)
