"""Celery edge of images on a server node."""

from __future__ import annotations

from hdcs_tasks.image import node, node_export, node_import
from hdcs_tasks.operations.node_tasks import step_task
from hdcs_tasks.pool import node_files

add = step_task("image.add_on_node", node.add)
copy = step_task("image.copy_on_node", node_files.fetch)
delete = step_task("image.delete_on_node", node.delete)
probe = step_task("image.probe_on_node", node_import.probe)
import_ = step_task("image.import_on_node", node_import.bring_in)
check_export = step_task("image.check_export_on_node", node_export.check)
export = step_task("image.export_on_node", node_export.export)
