"""The record's first schema

Revision: 0001, the first
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "domain_node",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("token_key", sa.String(length=64), nullable=False),
        sa.Column("port_first", sa.Integer(), nullable=False),
        sa.Column("port_last", sa.Integer(), nullable=False),
        sa.Column("storage_primary", sa.String(length=63), nullable=True),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("storage_total_bytes", sa.BigInteger(), nullable=True),
        sa.Column("storage_free_bytes", sa.BigInteger(), nullable=True),
        sa.Column("rules", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_domain_node")),
    )
    op.create_table(
        "event",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(length=60), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
    )
    op.create_index(op.f("ix_event_at"), "event", ["at"], unique=False)
    op.create_index(op.f("ix_event_kind"), "event", ["kind"], unique=False)
    op.create_index(op.f("ix_event_subject"), "event", ["subject"], unique=False)
    op.create_table(
        "image",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("virtual_size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("shape", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_image")),
    )
    op.create_index(
        "image_living",
        "image",
        ["name", "version"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_index(op.f("ix_image_name"), "image", ["name"], unique=False)
    op.create_table(
        "profile",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("vcpus", sa.Integer(), nullable=False),
        sa.Column("memory_mib", sa.Integer(), nullable=False),
        sa.Column("disk_bytes", sa.BigInteger(), nullable=True),
        sa.Column("usb", sa.String(length=255), nullable=False),
        sa.Column("disk_key", sa.String(length=63), nullable=False),
        sa.Column("rules", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_profile")),
    )
    op.create_table(
        "backup",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("vm_id", sa.String(length=36), nullable=False),
        sa.Column("vm_name", sa.String(length=63), nullable=False),
        sa.Column("domain_node", sa.String(length=63), nullable=False),
        sa.Column("chain", sa.String(length=36), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("parent_id", sa.String(length=36), nullable=True),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("checkpoint", sa.String(length=80), nullable=True),
        sa.Column("manifest", sa.JSON(), nullable=True),
        sa.Column("file_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("proven_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["domain_node"], ["domain_node.name"], name=op.f("fk_backup_domain_node")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backup")),
    )
    op.create_index(op.f("ix_backup_chain"), "backup", ["chain"], unique=False)
    op.create_index(op.f("ix_backup_vm_id"), "backup", ["vm_id"], unique=False)
    op.create_table(
        "backup_copy",
        sa.Column("backup_id", sa.String(length=36), nullable=False),
        sa.Column("domain_node", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("verified_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["backup_id"], ["backup.id"], name=op.f("fk_backup_copy_backup_id")),
        sa.ForeignKeyConstraint(["domain_node"], ["domain_node.name"], name=op.f("fk_backup_copy_domain_node")),
        sa.PrimaryKeyConstraint("backup_id", "domain_node", name=op.f("pk_backup_copy")),
    )
    op.create_table(
        "backup_policy",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("selector", sa.JSON(), nullable=False),
        sa.Column("schedule", sa.String(length=40), nullable=False),
        sa.Column("full_every", sa.Integer(), nullable=False),
        sa.Column("full_percent", sa.Integer(), nullable=True),
        sa.Column("keep", sa.JSON(), nullable=False),
        sa.Column("merge", sa.Boolean(), nullable=False),
        sa.Column("bandwidth_mib_s", sa.Integer(), nullable=True),
        sa.Column("concurrency", sa.Integer(), nullable=False),
        sa.Column("copy_to", sa.String(length=63), nullable=True),
        sa.Column("drill_schedule", sa.String(length=40), nullable=True),
        sa.Column("drill_points", sa.Integer(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("pending", sa.JSON(), nullable=False),
        sa.Column("slot_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("drill_slot_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_backup_policy")),
    )
    op.create_table(
        "storm",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("schedule", sa.String(length=40), nullable=False),
        sa.Column("selector", sa.JSON(), nullable=False),
        sa.Column("clone", sa.JSON(), nullable=False),
        sa.Column("lead_s", sa.Double(), nullable=True),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("slot_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("runs", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_storm")),
    )
    op.create_table(
        "warm_pool",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("image", sa.String(length=63), nullable=False),
        sa.Column("profile", sa.String(length=63), nullable=False),
        sa.Column("domain_node", sa.String(length=63), nullable=True),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("saved", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["domain_node"], ["domain_node.name"], name=op.f("fk_warm_pool_domain_node")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_warm_pool")),
    )
    op.create_table(
        "image_copy",
        sa.Column("image_id", sa.String(length=36), nullable=False),
        sa.Column("domain_node", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("file_bytes", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["domain_node"], ["domain_node.name"], name=op.f("fk_image_copy_domain_node")),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_image_copy_image_id")),
        sa.PrimaryKeyConstraint("image_id", "domain_node", name=op.f("pk_image_copy")),
    )
    op.create_table(
        "image_published",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("domain_node", sa.String(length=63), nullable=False),
        sa.Column("image_id", sa.String(length=36), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["domain_node"], ["domain_node.name"], name=op.f("fk_image_published_domain_node")),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_image_published_image_id")),
        sa.PrimaryKeyConstraint("name", "domain_node", name=op.f("pk_image_published")),
    )
    op.create_index(op.f("ix_image_published_image_id"), "image_published", ["image_id"], unique=False)
    op.create_table(
        "server_node",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("domain_node", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("ip", sa.String(length=45), nullable=False),
        sa.Column("subnet", sa.String(length=43), nullable=False),
        sa.Column("instance", sa.String(length=64), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("vcpus", sa.Integer(), nullable=False),
        sa.Column("memory_mib", sa.Integer(), nullable=False),
        sa.Column("rules", sa.JSON(), nullable=False),
        sa.Column("joined_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("observed_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["domain_node"], ["domain_node.name"], name=op.f("fk_server_node_domain_node")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_server_node")),
    )
    op.create_index(op.f("ix_server_node_domain_node"), "server_node", ["domain_node"], unique=False)
    op.create_table(
        "vm",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("home", sa.String(length=63), nullable=False),
        sa.Column("server_node", sa.String(length=63), nullable=True),
        sa.Column("image_id", sa.String(length=36), nullable=True),
        sa.Column("profile", sa.String(length=63), nullable=False),
        sa.Column("vcpus", sa.Integer(), nullable=False),
        sa.Column("memory_mib", sa.Integer(), nullable=False),
        sa.Column("disk_bytes", sa.BigInteger(), nullable=False),
        sa.Column("usb", sa.String(length=255), nullable=False),
        sa.Column("disk_key", sa.String(length=63), nullable=False),
        sa.Column("mac", sa.String(length=17), nullable=False),
        sa.Column("port", sa.Integer(), nullable=True),
        sa.Column("ip", sa.String(length=45), nullable=True),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("rules", sa.JSON(), nullable=False),
        sa.Column("idle", sa.JSON(), nullable=False),
        sa.Column("warm_pool", sa.String(length=63), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("active_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("observed_state", sa.String(length=20), nullable=True),
        sa.Column("observed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["home"], ["domain_node.name"], name=op.f("fk_vm_home")),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_vm_image_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vm")),
    )
    op.create_index(op.f("ix_vm_home"), "vm", ["home"], unique=False)
    op.create_index(op.f("ix_vm_name"), "vm", ["name"], unique=False)
    op.create_index(op.f("ix_vm_server_node"), "vm", ["server_node"], unique=False)
    op.create_index(op.f("ix_vm_state"), "vm", ["state"], unique=False)
    op.create_index(op.f("ix_vm_warm_pool"), "vm", ["warm_pool"], unique=False)
    op.create_index(
        "vm_living_mac",
        "vm",
        ["mac"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_index(
        "vm_living_name",
        "vm",
        ["name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "operation",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("vm_id", sa.String(length=36), nullable=True),
        sa.Column("live_vm", sa.String(length=36), nullable=True),
        sa.Column("parent_id", sa.String(length=36), nullable=True),
        sa.Column("waits_for", sa.String(length=36), nullable=True),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("request_digest", sa.String(length=64), nullable=True),
        sa.Column("requested_by", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("decision", sa.JSON(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("needs_operator", sa.Boolean(), nullable=False),
        sa.Column("cancel_asked", sa.Boolean(), nullable=False),
        sa.Column("percent", sa.Float(), nullable=False),
        sa.Column("phase", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["parent_id"], ["operation.id"], name=op.f("fk_operation_parent_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_operation_vm_id")),
        sa.ForeignKeyConstraint(["waits_for"], ["operation.id"], name=op.f("fk_operation_waits_for")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operation")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_operation_idempotency_key")),
        sa.UniqueConstraint("live_vm", name=op.f("uq_operation_live_vm")),
    )
    op.create_index(op.f("ix_operation_created_at"), "operation", ["created_at"], unique=False)
    op.create_index(op.f("ix_operation_ended_at"), "operation", ["ended_at"], unique=False)
    op.create_index(op.f("ix_operation_kind"), "operation", ["kind"], unique=False)
    op.create_index(op.f("ix_operation_parent_id"), "operation", ["parent_id"], unique=False)
    op.create_index(op.f("ix_operation_state"), "operation", ["state"], unique=False)
    op.create_index(op.f("ix_operation_vm_id"), "operation", ["vm_id"], unique=False)
    op.create_index(op.f("ix_operation_waits_for"), "operation", ["waits_for"], unique=False)
    op.create_table(
        "step",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("operation_id", sa.String(length=36), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=60), nullable=False),
        sa.Column("queue", sa.String(length=160), nullable=False),
        sa.Column("sent_to", sa.String(length=160), nullable=True),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("node", sa.String(length=63), nullable=True),
        sa.Column("history", sa.JSON(), nullable=False),
        sa.Column("outcome", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["operation_id"], ["operation.id"], name=op.f("fk_step_operation_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_step")),
    )
    op.create_index(op.f("ix_step_operation_id"), "step", ["operation_id"], unique=False)
    op.create_index(op.f("ix_step_state"), "step", ["state"], unique=False)
    op.create_table(
        "alarm",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("severity", sa.String(length=12), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("live_key", sa.String(length=300), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("next", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("since_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ok_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("state_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("raised_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("acknowledged_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("acknowledged_by", sa.String(length=255), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("cleared_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alarm")),
        sa.UniqueConstraint("live_key", name=op.f("uq_alarm_live_key")),
    )
    op.create_index(op.f("ix_alarm_kind"), "alarm", ["kind"], unique=False)
    op.create_index(op.f("ix_alarm_state"), "alarm", ["state"], unique=False)
    op.create_index(op.f("ix_alarm_state_at"), "alarm", ["state_at"], unique=False)
    op.create_table(
        "idle_policy",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("selector", sa.JSON(), nullable=False),
        sa.Column("ladder", sa.JSON(), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("inside", sa.Boolean(), nullable=False),
        sa.Column("force", sa.Boolean(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_idle_policy")),
    )
    op.create_table(
        "operation_tally",
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("outcome", sa.String(length=20), nullable=False),
        sa.Column("buckets", sa.JSON(), nullable=False),
        sa.Column("total_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "outcome", name=op.f("pk_operation_tally")),
    )
    op.create_table(
        "quota",
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("vms", sa.Integer(), nullable=True),
        sa.Column("running_vms", sa.Integer(), nullable=True),
        sa.Column("vcpus", sa.Integer(), nullable=True),
        sa.Column("memory_mib", sa.Integer(), nullable=True),
        sa.Column("disk_bytes", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_quota")),
    )
    op.create_table(
        "usage_span",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("vm_id", sa.String(length=36), nullable=False),
        sa.Column("vm_name", sa.String(length=63), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("home", sa.String(length=63), nullable=False),
        sa.Column("server_node", sa.String(length=63), nullable=True),
        sa.Column("level", sa.String(length=8), nullable=False),
        sa.Column("vcpus", sa.Integer(), nullable=False),
        sa.Column("memory_mib", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("observed", sa.Boolean(), nullable=False),
        sa.Column("open_key", sa.String(length=80), nullable=True),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_span")),
        sa.UniqueConstraint("open_key", name=op.f("uq_usage_span_open_key")),
    )
    op.create_index(op.f("ix_usage_span_closed_at"), "usage_span", ["closed_at"], unique=False)
    op.create_index(op.f("ix_usage_span_opened_at"), "usage_span", ["opened_at"], unique=False)
    op.create_index(op.f("ix_usage_span_server_node"), "usage_span", ["server_node"], unique=False)
    op.create_index(op.f("ix_usage_span_vm_id"), "usage_span", ["vm_id"], unique=False)
    op.create_table(
        "notice",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("alarm_id", sa.String(length=36), nullable=False),
        sa.Column("what", sa.String(length=12), nullable=False),
        sa.Column("target", sa.String(length=16), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("given_up_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["alarm_id"], ["alarm.id"], name=op.f("fk_notice_alarm_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notice")),
    )
    op.create_index(op.f("ix_notice_alarm_id"), "notice", ["alarm_id"], unique=False)
    op.create_index(op.f("ix_notice_not_before"), "notice", ["not_before"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_notice_not_before"), table_name="notice")
    op.drop_index(op.f("ix_notice_alarm_id"), table_name="notice")
    op.drop_table("notice")
    op.drop_index(op.f("ix_usage_span_vm_id"), table_name="usage_span")
    op.drop_index(op.f("ix_usage_span_server_node"), table_name="usage_span")
    op.drop_index(op.f("ix_usage_span_opened_at"), table_name="usage_span")
    op.drop_index(op.f("ix_usage_span_closed_at"), table_name="usage_span")
    op.drop_table("usage_span")
    op.drop_table("quota")
    op.drop_table("operation_tally")
    op.drop_table("idle_policy")
    op.drop_index(op.f("ix_alarm_state_at"), table_name="alarm")
    op.drop_index(op.f("ix_alarm_state"), table_name="alarm")
    op.drop_index(op.f("ix_alarm_kind"), table_name="alarm")
    op.drop_table("alarm")
    op.drop_index(op.f("ix_step_state"), table_name="step")
    op.drop_index(op.f("ix_step_operation_id"), table_name="step")
    op.drop_table("step")
    op.drop_index(op.f("ix_operation_waits_for"), table_name="operation")
    op.drop_index(op.f("ix_operation_vm_id"), table_name="operation")
    op.drop_index(op.f("ix_operation_state"), table_name="operation")
    op.drop_index(op.f("ix_operation_parent_id"), table_name="operation")
    op.drop_index(op.f("ix_operation_kind"), table_name="operation")
    op.drop_index(op.f("ix_operation_ended_at"), table_name="operation")
    op.drop_index(op.f("ix_operation_created_at"), table_name="operation")
    op.drop_table("operation")
    op.drop_index(
        "vm_living_name",
        table_name="vm",
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.drop_index(
        "vm_living_mac",
        table_name="vm",
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.drop_index(op.f("ix_vm_warm_pool"), table_name="vm")
    op.drop_index(op.f("ix_vm_state"), table_name="vm")
    op.drop_index(op.f("ix_vm_server_node"), table_name="vm")
    op.drop_index(op.f("ix_vm_name"), table_name="vm")
    op.drop_index(op.f("ix_vm_home"), table_name="vm")
    op.drop_table("vm")
    op.drop_index(op.f("ix_server_node_domain_node"), table_name="server_node")
    op.drop_table("server_node")
    op.drop_index(op.f("ix_image_published_image_id"), table_name="image_published")
    op.drop_table("image_published")
    op.drop_table("image_copy")
    op.drop_table("warm_pool")
    op.drop_table("storm")
    op.drop_table("backup_policy")
    op.drop_table("backup_copy")
    op.drop_index(op.f("ix_backup_vm_id"), table_name="backup")
    op.drop_index(op.f("ix_backup_chain"), table_name="backup")
    op.drop_table("backup")
    op.drop_table("profile")
    op.drop_index(op.f("ix_image_name"), table_name="image")
    op.drop_index(
        "image_living",
        table_name="image",
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.drop_table("image")
    op.drop_index(op.f("ix_event_subject"), table_name="event")
    op.drop_index(op.f("ix_event_kind"), table_name="event")
    op.drop_index(op.f("ix_event_at"), table_name="event")
    op.drop_table("event")
    op.drop_table("domain_node")
