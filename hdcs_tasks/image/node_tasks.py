"""Celery edge of images on a server node."""

from __future__ import annotations

from hdcs_tasks.image import node
from hdcs_tasks.operations.node_tasks import step_task

add = step_task("image.add_on_node", node.add)
delete = step_task("image.delete_on_node", node.delete)
