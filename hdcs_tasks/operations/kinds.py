"""The kinds of operations there are: what somebody may ask the list for."""

from __future__ import annotations

from difflib import get_close_matches

from hdcs_tasks.errors import NotFound

KINDS = (
    "backup.adopt", "backup.copy", "backup.create", "backup.delete", "backup.drill", "backup.drop_copies",
    "backup.extract", "backup.prune", "backup.restore", "backup.verify",
    "image.add", "image.add_copy", "image.check_export", "image.copy", "image.delete", "image.delete_copy",
    "image.export", "image.import", "image.probe", "image.publish", "image.publish_on",
    "pool.drain", "pool.drain_domain", "pool.rebalance",
    "vm.check_export", "vm.clean", "vm.clone", "vm.clone_many", "vm.console", "vm.delete", "vm.export", "vm.grow",
    "vm.migrate", "vm.reboot", "vm.refresh", "vm.resume", "vm.save", "vm.start", "vm.start_many", "vm.stop",
    "vm.suspend",
)  # fmt: skip


def check_kind(kind: str) -> None:
    """NotFound, naming the kinds, for one that there is not."""
    if kind not in KINDS:
        close = get_close_matches(kind, KINDS, n=3)
        told = f"Did you mean {' or '.join(close)}? " if close else ""
        raise NotFound(f"there is no kind of operation {kind!r}", next=f"{told}Known: {', '.join(KINDS)}")
