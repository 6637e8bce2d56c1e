"""Celery edge of backups on a server node."""

from __future__ import annotations

from hdcs_tasks.backup import node
from hdcs_tasks.operations.node_tasks import step_task

create = step_task("backup.create_on_node", node.create)
restore = step_task("backup.restore_on_node", node.restore)
verify = step_task("backup.verify_on_node", node.verify)
delete = step_task("backup.delete_on_node", node.delete)
