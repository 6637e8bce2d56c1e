"""The record: what exists, what was asked, what became of it. SQLite or PostgreSQL, the same schema.

State columns are written by ``store.transitions.move`` and by nothing else.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from hdcs_tasks.clock import new_id as new_id
from hdcs_tasks.clock import now as now
from hdcs_tasks.states import BackupState, ImageState, OperationState, ServerNodeState, StepState, VmState


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime on both databases (SQLite keeps no zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class StateColumn(TypeDecorator[StrEnum]):
    """A state machine's enum kept as its text."""

    impl = String(20)
    cache_ok = True

    def __init__(self, machine: type[StrEnum]) -> None:
        super().__init__()
        self.machine = machine

    def process_bind_param(self, value: StrEnum | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:
        return None if value is None else self.machine(value)


# PostgreSQL's INTEGER ends at 2 GiB.
Bytes = Annotated[int, mapped_column(BigInteger)]


# Every constraint has a name, so that a later revision can alter it on both databases.
NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, list[Any]: JSON}


class DomainNode(Base):
    """A resource pool: server nodes that share one storage. ``token_key`` proves join requests, never the token.

    ``draining``: it is being emptied, and its server nodes join closed. ``rules`` here, of a server node, a profile and
    a VM: what an operator ruled about placement (pool/policy.py).
    """

    __tablename__ = "domain_node"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    token_key: Mapped[str] = mapped_column(String(64))
    port_first: Mapped[int]
    port_last: Mapped[int]
    storage_primary: Mapped[str | None] = mapped_column(String(63))
    draining: Mapped[bool] = mapped_column(default=False)
    storage_total_bytes: Mapped[Bytes | None]
    storage_free_bytes: Mapped[Bytes | None]
    rules: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=now)


class ServerNode(Base):
    """One host. ``instance`` is the worker process that joined last; ``draining`` survives its restarts."""

    __tablename__ = "server_node"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    domain_node: Mapped[str] = mapped_column(ForeignKey("domain_node.name"), index=True)
    state: Mapped[ServerNodeState] = mapped_column(StateColumn(ServerNodeState))
    draining: Mapped[bool] = mapped_column(default=False)
    ip: Mapped[str] = mapped_column(String(45))
    subnet: Mapped[str] = mapped_column(String(43))
    instance: Mapped[str] = mapped_column(String(64))
    facts: Mapped[dict[str, Any]]
    vcpus: Mapped[int]
    memory_mib: Mapped[int]
    rules: Mapped[dict[str, Any]] = mapped_column(default=dict)
    joined_at: Mapped[datetime] = mapped_column(default=now)
    state_at: Mapped[datetime] = mapped_column(default=now)
    observed_at: Mapped[datetime | None]


class Profile(Base):
    """The hardware shape of a VM. ``disk_key`` here and of a VM: name of the key its disk is encrypted with."""

    __tablename__ = "profile"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    vcpus: Mapped[int]
    memory_mib: Mapped[int]
    disk_bytes: Mapped[Bytes | None]
    usb: Mapped[str] = mapped_column(String(255), default="off")
    disk_key: Mapped[str] = mapped_column(String(63), default="")
    rules: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Image(Base):
    """One version of a disk to clone from. ``shape``: of the machine it was imported from (image/node_import.py)."""

    __tablename__ = "image"
    __table_args__ = (
        Index("image_living", "name", "version", unique=True, sqlite_where=text("deleted_at IS NULL"),
              postgresql_where=text("deleted_at IS NULL")),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(63), index=True)
    version: Mapped[int]
    virtual_size_bytes: Mapped[Bytes | None]
    sha256: Mapped[str | None] = mapped_column(String(64))
    shape: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(default=now)
    deleted_at: Mapped[datetime | None]
    copies: Mapped[list[ImageCopy]] = relationship(back_populates="image", cascade="all, delete-orphan")


class ImageCopy(Base):
    """An image as one domain node's storage holds it."""

    __tablename__ = "image_copy"

    image_id: Mapped[str] = mapped_column(ForeignKey("image.id"), primary_key=True)
    domain_node: Mapped[str] = mapped_column(ForeignKey("domain_node.name"), primary_key=True)
    state: Mapped[ImageState] = mapped_column(StateColumn(ImageState))
    file_bytes: Mapped[Bytes | None]
    image: Mapped[Image] = relationship(back_populates="copies")


class ImagePublished(Base):
    """The version of an image that clones of its name take in a domain node; without a row: the newest."""

    __tablename__ = "image_published"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    domain_node: Mapped[str] = mapped_column(ForeignKey("domain_node.name"), primary_key=True)
    image_id: Mapped[str] = mapped_column(ForeignKey("image.id"), index=True)
    published_at: Mapped[datetime] = mapped_column(default=now)


class Vm(Base):
    """The durable record of a desktop. ``state`` is the record; ``observed_*`` is what libvirt last showed.

    ``warm_pool``: the pool that keeps it ready; None from the moment somebody takes it.
    """

    __tablename__ = "vm"
    __table_args__ = (
        Index("vm_living_name", "name", unique=True, sqlite_where=text("deleted_at IS NULL"),
              postgresql_where=text("deleted_at IS NULL")),
        Index("vm_living_mac", "mac", unique=True, sqlite_where=text("deleted_at IS NULL"),
              postgresql_where=text("deleted_at IS NULL")),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(63), index=True)
    state: Mapped[VmState] = mapped_column(StateColumn(VmState), index=True)
    home: Mapped[str] = mapped_column(ForeignKey("domain_node.name"), index=True)
    server_node: Mapped[str | None] = mapped_column(String(63), index=True)
    image_id: Mapped[str | None] = mapped_column(ForeignKey("image.id"))
    profile: Mapped[str] = mapped_column(String(63))
    vcpus: Mapped[int]
    memory_mib: Mapped[int]
    disk_bytes: Mapped[Bytes]
    usb: Mapped[str] = mapped_column(String(255), default="off")
    disk_key: Mapped[str] = mapped_column(String(63), default="")
    mac: Mapped[str] = mapped_column(String(17))
    port: Mapped[int | None]
    ip: Mapped[str | None] = mapped_column(String(45))
    owner: Mapped[str] = mapped_column(String(255), default="")
    tags: Mapped[list[Any]] = mapped_column(default=list)
    rules: Mapped[dict[str, Any]] = mapped_column(default=dict)
    idle: Mapped[dict[str, Any]] = mapped_column(default=dict)
    warm_pool: Mapped[str | None] = mapped_column(String(63), index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    state_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    active_at: Mapped[datetime | None]
    ready_at: Mapped[datetime | None]
    observed_state: Mapped[str | None] = mapped_column(String(20))
    observed_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]


class Operation(Base):
    """One asked-for change. ``live_vm`` is the VM's id while the operation lives: one live operation per VM.

    ``decision``: why the scheduler put it where it is, or refused (pool/rules.py: Decision).
    """

    __tablename__ = "operation"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    kind: Mapped[str] = mapped_column(String(40), index=True)
    state: Mapped[OperationState] = mapped_column(StateColumn(OperationState), index=True)
    subject: Mapped[str] = mapped_column(String(255), default="")
    vm_id: Mapped[str | None] = mapped_column(ForeignKey("vm.id"), index=True)
    live_vm: Mapped[str | None] = mapped_column(String(36), unique=True)
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("operation.id"), index=True)
    waits_for: Mapped[str | None] = mapped_column(ForeignKey("operation.id"), index=True)
    idempotency_key: Mapped[str | None] = mapped_column(String(255), unique=True)
    request_digest: Mapped[str | None] = mapped_column(String(64))
    requested_by: Mapped[str] = mapped_column(String(255), default="")
    reason: Mapped[str] = mapped_column(Text, default="")
    request: Mapped[dict[str, Any]]
    decision: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    needs_operator: Mapped[bool] = mapped_column(default=False)
    cancel_asked: Mapped[bool] = mapped_column(default=False)
    percent: Mapped[float] = mapped_column(Float, default=0.0)
    phase: Mapped[str] = mapped_column(String(255), default="queued")
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None] = mapped_column(index=True)
    steps: Mapped[list[Step]] = relationship(order_by="Step.seq", back_populates="operation")


class Step(Base):
    """One message's worth of work of an operation. ``node`` is where an attempt may have touched something.

    ``queue`` is where the step belongs, ``sent_to`` where its present attempt went if elsewhere (a retry goes to the
    node that was touched). ``finished_seen_at``: when control first saw that its executor had finished.
    ``ready_at``: when the agent of the guest it started was first heard.
    """

    __tablename__ = "step"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    operation_id: Mapped[str] = mapped_column(ForeignKey("operation.id"), index=True)
    seq: Mapped[int]
    name: Mapped[str] = mapped_column(String(60))
    queue: Mapped[str] = mapped_column(String(160))
    sent_to: Mapped[str | None] = mapped_column(String(160))
    spec: Mapped[dict[str, Any]]
    state: Mapped[StepState] = mapped_column(StateColumn(StepState), index=True)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    node: Mapped[str | None] = mapped_column(String(63))
    history: Mapped[list[Any]] = mapped_column(default=list)
    outcome: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    not_before: Mapped[datetime | None]
    deadline_at: Mapped[datetime]
    created_at: Mapped[datetime] = mapped_column(default=now)
    published_at: Mapped[datetime | None]
    finished_seen_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    ready_at: Mapped[datetime | None]
    operation: Mapped[Operation] = relationship(back_populates="steps")


class Backup(Base):
    """One point of a backup chain: a plain qcow2 file and its manifest in a domain node's storage."""

    __tablename__ = "backup"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    vm_id: Mapped[str] = mapped_column(String(36), index=True)
    vm_name: Mapped[str] = mapped_column(String(63))
    domain_node: Mapped[str] = mapped_column(ForeignKey("domain_node.name"))
    chain: Mapped[str] = mapped_column(String(36), index=True)
    seq: Mapped[int]
    kind: Mapped[str] = mapped_column(String(12))
    parent_id: Mapped[str | None] = mapped_column(String(36))
    state: Mapped[BackupState] = mapped_column(StateColumn(BackupState))
    checkpoint: Mapped[str | None] = mapped_column(String(80))
    manifest: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    file_bytes: Mapped[Bytes | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    proven_at: Mapped[datetime | None]
    copies: Mapped[list[BackupCopy]] = relationship(
        back_populates="backup", cascade="all, delete-orphan", lazy="selectin"
    )


class BackupCopy(Base):
    """A backup point as a second domain node's storage holds it; ``verified_at``: when it was last read there."""

    __tablename__ = "backup_copy"

    backup_id: Mapped[str] = mapped_column(ForeignKey("backup.id"), primary_key=True)
    domain_node: Mapped[str] = mapped_column(ForeignKey("domain_node.name"), primary_key=True)
    state: Mapped[BackupState] = mapped_column(StateColumn(BackupState))
    verified_at: Mapped[datetime | None]
    backup: Mapped[Backup] = relationship(back_populates="copies")


class BackupPolicy(Base):
    """Which VMs are backed up when, what is kept, and what is proven.

    ``selector``: equalities as ``vm.control_list`` takes them. ``slot_at``, ``drill_slot_at``: the moment of the
    newest run; a sweep claims the next by moving it on. ``copy_to``: the domain node that
    gets a second copy. ``pending``: ids of VMs the present run has not begun with.
    """

    __tablename__ = "backup_policy"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    selector: Mapped[dict[str, Any]]
    schedule: Mapped[str] = mapped_column(String(40))
    full_every: Mapped[int]
    full_percent: Mapped[int | None]
    keep: Mapped[dict[str, Any]]
    merge: Mapped[bool] = mapped_column(default=False)
    bandwidth_mib_s: Mapped[int | None]
    concurrency: Mapped[int]
    copy_to: Mapped[str | None] = mapped_column(String(63))
    drill_schedule: Mapped[str | None] = mapped_column(String(40))
    drill_points: Mapped[int] = mapped_column(default=1)
    enabled: Mapped[bool] = mapped_column(default=True)
    pending: Mapped[list[Any]] = mapped_column(default=list)
    slot_at: Mapped[datetime] = mapped_column(default=now)
    drill_slot_at: Mapped[datetime] = mapped_column(default=now)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Storm(Base):
    """Desktops that are to be ready at a time. Either ``selector`` (as ``vm.control_list`` takes it) or ``clone``
    (image, profile, count, name, domain_node, owner, tag) says which. ``lead_s``: begin so long before; None: as
    measured.

    ``slot_at``: the moment last begun for; a sweep claims the next by moving it on. ``runs``: the newest first, as
    vm/control_storm.py keeps them.
    """

    __tablename__ = "storm"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    schedule: Mapped[str] = mapped_column(String(40))
    selector: Mapped[dict[str, Any]]
    clone: Mapped[dict[str, Any]]
    lead_s: Mapped[float | None]
    enabled: Mapped[bool] = mapped_column(default=True)
    slot_at: Mapped[datetime] = mapped_column(default=now)
    runs: Mapped[list[Any]] = mapped_column(default=list)
    created_at: Mapped[datetime] = mapped_column(default=now)


class WarmPool(Base):
    """Desktops of one image (its newest version) and profile kept ready: started, or with memory ``saved``."""

    __tablename__ = "warm_pool"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    image: Mapped[str] = mapped_column(String(63))
    profile: Mapped[str] = mapped_column(String(63))
    domain_node: Mapped[str | None] = mapped_column(ForeignKey("domain_node.name"))
    size: Mapped[int]
    saved: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Event(Base):
    """What happened that nobody asked for: a node lost, a guest gone, an idle desktop taken back."""

    __tablename__ = "event"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[datetime] = mapped_column(default=now, index=True)
    kind: Mapped[str] = mapped_column(String(60), index=True)
    subject: Mapped[str] = mapped_column(String(255), index=True)
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
