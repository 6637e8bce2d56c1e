"""Marks: what a VM is to others that run beside it (its tags, and whom it shuns), as pool_place.lua keeps them."""

from __future__ import annotations

from collections.abc import Sequence

from hdcs_tasks.reservations.link import Link
from hdcs_tasks.reservations.pool import read_claims


class Marks:
    """The marks of VMs that were placed with some; they count while the VM holds a claim."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def all(self, domain_node: str) -> dict[str, tuple[str, ...]]:
        """VM -> its marks, for every VM of the domain node that was placed with some."""
        link = self._link
        names = sorted(link.do("SMEMBERS", link.key("tagged", domain_node)))
        sets = link.commands([("SMEMBERS", link.key("tagged", domain_node, mark)) for mark in names])
        found: dict[str, tuple[str, ...]] = {}
        for mark, vms in zip(names, sets, strict=True):
            for vm in vms:
                found[vm] = (*found.get(vm, ()), mark)
        return found

    def members(self, domain_node: str) -> dict[str, dict[str, frozenset[str]]]:
        """Server node -> mark -> the VMs with that mark that hold a claim there."""
        marks = self.all(domain_node)
        if not marks:
            return {}
        texts = self._link.commands([("HGET", self._link.key("claims", domain_node), vm) for vm in marks])
        found: dict[str, dict[str, frozenset[str]]] = {}
        for (vm, has), text in zip(marks.items(), texts, strict=True):
            for claim in read_claims(domain_node, vm, text):
                there = found.setdefault(claim.node, {})
                for mark in has:
                    there[mark] = there.get(mark, frozenset()) | {vm}
        return found

    def add(self, domain_node: str, vm: str, marks: Sequence[str]) -> None:
        """Marks of a VM that runs already (those of a start come with its placement)."""
        link = self._link
        link.commands([
            command for mark in marks for command in (
                ("SADD", link.key("tagged", domain_node), mark), ("SADD", link.key("tagged", domain_node, mark), vm),
            )
        ])  # fmt: skip

    def forget(self, domain_node: str, vm: str) -> None:
        """The VM is gone for good."""
        link = self._link
        names = link.do("SMEMBERS", link.key("tagged", domain_node))
        link.commands([("SREM", link.key("tagged", domain_node, mark), vm) for mark in names])
