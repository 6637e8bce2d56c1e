"""Celery edge of VMs on a server node: which step is whose work."""

from __future__ import annotations

from hdcs_tasks.app import app
from hdcs_tasks.operations.node_tasks import node_context, step_task
from hdcs_tasks.vm import node, node_export, node_migrate, node_move, node_refresh, node_shape, node_start

clone = step_task("vm.clone_on_node", node.clone)
start = step_task("vm.start_on_node", node_start.start)
delete = step_task("vm.delete_on_node", node.delete)
discard = step_task("vm.discard_on_node", node.delete)
grow = step_task("vm.grow_on_node", node_shape.grow)
save = step_task("vm.save_on_node", node.save)
stop = step_task("vm.stop_on_node", node.stop)
suspend = step_task("vm.suspend_on_node", node.suspend)
resume = step_task("vm.resume_on_node", node.resume)
reboot = step_task("vm.reboot_on_node", node.reboot)
console = step_task("vm.console_on_node", node.console)
migrate_prepare = step_task("vm.migrate_prepare_on_node", node_migrate.prepare)
migrate = step_task("vm.migrate_on_node", node_migrate.perform)
migrate_finish = step_task("vm.migrate_finish_on_node", node_migrate.finish)
migrate_clean = step_task("vm.migrate_clean_on_node", node_migrate.clean)
migrate_look = step_task("vm.migrate_look_on_node", node_migrate.look)
migrate_undo = step_task("vm.migrate_undo_on_node", node_migrate.undo)
refresh = step_task("vm.refresh_on_node", node_refresh.refresh)
check_export = step_task("vm.check_export_on_node", node_export.check)
export = step_task("vm.export_on_node", node_export.export)
move_prepare = step_task("vm.move_prepare_on_node", node_move.prepare)
move = step_task("vm.move_on_node", node_move.perform)
move_finish = step_task("vm.move_finish_on_node", node_move.finish)
move_clean = step_task("vm.move_clean_on_node", node_move.clean)
move_look = step_task("vm.move_look_on_node", node_migrate.look)
move_undo = step_task("vm.move_undo_on_node", node_move.undo)
offer = step_task("vm.offer_on_node", node_move.offer)
fetch = step_task("vm.fetch_on_node", node_move.fetch)


@app.task(name="vm.end_left_on_node")
def end_left(vm_id: str, mac: str) -> None:
    node.end_left(node_context(), vm_id, mac)
