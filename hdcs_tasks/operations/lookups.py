"""What nearly every transaction looks up in the ledger."""

from __future__ import annotations

from sqlalchemy import bindparam, or_, select
from sqlalchemy.orm import Session, aliased

from hdcs_tasks.errors import NotFound
from hdcs_tasks.states import STEP_LIVE
from hdcs_tasks.store.lookups import by_key
from hdcs_tasks.store.models import Operation, Step

# FOR NO KEY UPDATE on PostgreSQL: a row updated twice in a transaction takes a key-share lock on every row it refers
# to, so two children that end at once would deadlock on a parent locked FOR UPDATE. Read anew: what was read before the
# lock may have changed while waiting for it.
LOCKED_OPERATION = (
    select(Operation).where(Operation.id == bindparam("id")).with_for_update(key_share=True)
    .execution_options(populate_existing=True)
)  # fmt: skip
LOCKED_STEP = (
    select(Step).where(Step.id == bindparam("id")).with_for_update(key_share=True)
    .execution_options(populate_existing=True)
)  # fmt: skip
# Asked in nearly every transaction; made once, since making a statement costs as much as running it.
_ABOVE = aliased(Operation)
_OF_STEP = select(Step.operation_id).where(Step.id == bindparam("step")).scalar_subquery()
_PARENT_OF_IT = (
    select(_ABOVE.parent_id).join(Step, Step.operation_id == _ABOVE.id).where(Step.id == bindparam("step"))
    .scalar_subquery()
)  # fmt: skip
LOCKED_ABOVE = (
    select(Operation).where(or_(Operation.id == _PARENT_OF_IT, Operation.id == _OF_STEP))
    .order_by(Operation.id == _OF_STEP).with_for_update(key_share=True).execution_options(populate_existing=True)
)  # fmt: skip
"""A step's operation and the one above it, locked in this order: the parent first."""
BY_KEY = select(Operation).where(Operation.idempotency_key == bindparam("key"))
LIVE_ON = select(Operation).where(Operation.live_vm == bindparam("vm"))
WAITING_FOR = (
    select(Operation).where(Operation.waits_for == bindparam("ended")).order_by(Operation.created_at)
    .with_for_update(key_share=True)
)  # fmt: skip
CHILDREN = (
    select(Operation).where(Operation.parent_id == bindparam("parent")).order_by(Operation.created_at)
    .execution_options(populate_existing=True)
)  # fmt: skip
LAST_SEQ = select(Step.seq).where(Step.operation_id == bindparam("operation")).order_by(Step.seq.desc()).limit(1)
LIVE_STEP = select(Step.id).where(Step.operation_id == bindparam("operation"), Step.state.in_(STEP_LIVE)).limit(1)


def get_operation(session: Session, operation_id: str) -> Operation:
    """The operation of this id (or unique id prefix of at least 6 characters); else NotFound."""
    found = by_key(session, Operation, operation_id)
    if found is None and len(operation_id) >= 6:
        matches = session.scalars(select(Operation).where(Operation.id.startswith(operation_id, autoescape=True))).all()
        found = matches[0] if len(matches) == 1 else None
    if found is None:
        raise NotFound(
            f"there is no operation {operation_id!r}",
            next="Give its id or 6 and more characters it alone begins with. See: hdcs op list",
        )
    return found
