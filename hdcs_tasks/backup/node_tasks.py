"""Celery edge of backups on a server node."""

from __future__ import annotations

from hdcs_tasks.backup import node, node_chains, node_copy, node_restore
from hdcs_tasks.operations.node_tasks import step_task

create = step_task("backup.create_on_node", node.create)
restore = step_task("backup.restore_on_node", node_restore.restore)
restore_in_place = step_task("backup.restore_in_place_on_node", node_restore.restore_in_place)
prove = step_task("backup.prove_on_node", node_restore.prove)
verify = step_task("backup.verify_on_node", node_chains.verify)
delete = step_task("backup.delete_on_node", node_chains.delete)
prune = step_task("backup.prune_on_node", node_chains.prune)
fetch = step_task("backup.fetch_on_node", node_copy.fetch)
drop_copies = step_task("backup.drop_copies_on_node", node_copy.drop)
extract = step_task("backup.extract_on_node", node_restore.extract)
scan = step_task("backup.scan_on_node", node_chains.scan)
