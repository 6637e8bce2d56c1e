"""Layer two: which server node of a resource pool a VM starts on, and what it claims there. One script call each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from hdcs_tasks.errors import Conflict, HdcsError, Invalid, NoCapacity
from hdcs_tasks.reservations.answers import NAMED, placed
from hdcs_tasks.reservations.ips import guest_span, ip_number, ip_text
from hdcs_tasks.reservations.link import Link, check_token
from hdcs_tasks.reservations.model import (
    Claim,
    Fence,
    MixEntry,
    NodeCapacity,
    Placed,
    PlaceRequest,
    PoolNode,
    PoolNodeView,
    Standing,
)
from hdcs_tasks.reservations.scripts import Value

_NODE_FIELDS = (
    "vcpus", "memory_mib", "used_vcpus", "used_memory_mib", "schedulable", "max_starts", "tags", "subnet",
    "starts_floor", "starts_ceiling",
)  # fmt: skip


@lru_cache(maxsize=64)
def _mix_text(mix: tuple[MixEntry, ...]) -> str:
    return ";".join(f"{m.vcpus},{m.memory_mib},{m.weight:.6f}" for m in mix)


def _wrapped(words: Sequence[str]) -> str:
    return f",{','.join(words)}," if words else ""


def read_claims(domain_node: str, vm: str, text: str | None) -> list[Claim]:
    """The packed claims of a VM (claims.lua)."""
    claims = []
    for part in text.split(";") if text else []:
        node, vcpus, memory, port, ip, step = part.split(",")
        claims.append(Claim(domain_node, vm, node, int(vcpus), int(memory), int(port), ip_text(int(ip)), step))
    return claims


def write_claims(claims: Iterable[Claim]) -> str:
    return ";".join(f"{c.node},{c.vcpus},{c.memory_mib},{c.port},{ip_number(c.ip)},{c.step}" for c in claims)


def node_fields(domain_node: str, node: PoolNode) -> dict[str, Value]:
    """The hash of a server node without its used amounts (pool_put.lua)."""
    return {
        "domain_node": domain_node, "vcpus": node.vcpus, "memory_mib": node.memory_mib,
        "schedulable": int(node.schedulable), "max_starts": node.max_starts, "tags": _wrapped(node.tags),
        "subnet": node.subnet, "starts_floor": node.min_starts, "starts_ceiling": node.max_starts,
    }  # fmt: skip


class Pool:
    """The resource pools of all domain nodes."""

    def __init__(self, link: Link, propose_mac: Callable[[], str]) -> None:
        self._link = link
        self._propose_mac = propose_mac
        self._epoch = link.key("epoch", "run_id")

    # ---- server nodes

    def put_node(self, domain_node: str, node: PoolNode) -> None:
        """Register a server node, or change its totals and flags; claims on it stay accounted (free may go below 0,
        then it takes nothing more). Conflict: it is in another pool, or addresses of its old subnet are owned."""
        check_token("domain node", domain_node)
        check_token("server node", node.name)
        for tag in node.tags:
            check_token("tag", tag)
        key = self._link.key
        f = node_fields(domain_node, node)
        keys = [key("pool", domain_node), key("nodes", domain_node), key("claims", domain_node), key("node", node.name),
                key("ips", node.name), key("pools", "all")]  # fmt: skip
        answer = self._link.call(
            "pool_put", keys, domain_node, node.name, f["vcpus"], f["memory_mib"], f["schedulable"], f["max_starts"],
            f["tags"], f["subnet"], *guest_span(node.subnet),
        )  # fmt: skip
        if answer == "ok":
            self._link.do("HSET", key("node", node.name), "starts_floor", node.min_starts, "starts_ceiling",
                          node.max_starts)  # fmt: skip
            return
        if answer == "subnet":
            raise Conflict(
                f"server node {node.name} cannot change its subnet to {node.subnet or 'none'}: VMs own addresses of it",
                next="Drain it first, then change the subnet",
            )
        raise Conflict(
            f"server node {node.name} belongs to domain node {answer.split()[1]}, not {domain_node}",
            next="Remove it there first: hdcs node remove",
        )

    def remove_node(self, domain_node: str, name: str, force: bool = False) -> None:
        """Take a server node out. Conflict while VMs hold claims on it; ``force`` leaves those to be released."""
        key = self._link.key
        keys = [key("pool", domain_node), key("nodes", domain_node), key("claims", domain_node), key("node", name),
                key("starts", name)]  # fmt: skip
        holders = self._link.call("pool_remove", keys, name, int(force))
        if holders and not force:
            raise Conflict(
                f"server node {name} still holds {len(holders)} VMs: {', '.join(sorted(holders)[:NAMED])}",
                next="Drain it first: hdcs node drain",
                details={"vms": sorted(holders)},
            )

    def nodes(self, domain_node: str) -> list[PoolNodeView]:
        """All server nodes of the pool by name, with what is free."""
        link = self._link
        now = link.do("TIME")
        now_ms = int(now[0]) * 1000 + int(now[1]) // 1000
        names = sorted(link.do("SMEMBERS", link.key("nodes", domain_node)))
        commands: list[Sequence[Value]] = []
        for name in names:
            ips = link.key("ips", name)
            commands += [
                ("HMGET", link.key("node", name), *_NODE_FIELDS), ("HMGET", ips, ":next", ":last"),
                ("LLEN", f"{ips}:free"), ("ZCOUNT", f"{ips}:cooling", "-inf", now_ms),
                ("ZCOUNT", link.key("starts", name), now_ms, "+inf"),
            ]  # fmt: skip
        answers = link.commands(commands)
        rows = (answers[i : i + 5] for i in range(0, len(answers), 5))
        return [_view(name, row) for name, row in zip(names, rows, strict=True) if row[0][0] is not None]

    def domain_nodes(self) -> list[str]:
        """Domain nodes that ever had a server node."""
        return sorted(self._link.do("SMEMBERS", self._link.key("pools", "all")))

    # ---- placement

    def place(self, request: PlaceRequest) -> Placed:
        """Pick the server node and claim vCPU, memory, console port, IP (and MAC) there: all or nothing, in one call.

        A VM that already holds a fitting claim (not on an excluded node, on the pinned one if any) gets that one again.
        NoCapacity tells, for every server node, why not; Conflict: the VM holds two claims, or one of another size.
        """
        placed = self.place_many([request])[0]
        if isinstance(placed, HdcsError):
            raise placed
        return placed

    def place_many(self, requests: Sequence[PlaceRequest]) -> list[Placed | HdcsError]:
        """``place`` for each, in order and pipelined; a refusal stands in its place. RebuildPending and Unreachable
        are raised: ask again for all, placements already made are found again."""
        answers: list[Placed | HdcsError | None] = [None] * len(requests)
        open_ = list(range(len(requests)))
        for _ in range(64):
            raw = self._run([requests[i] for i in open_])
            again = []
            for i, answer in zip(open_, raw, strict=True):
                if answer[0] == "mac":
                    again.append(i)
                else:
                    answers[i] = placed(requests[i], answer)
            open_ = again
            if not open_:
                break
        return [a or NoCapacity("no free MAC found", next="Set HDCS_MAC_PREFIX to another prefix") for a in answers]

    def _run(self, requests: Sequence[PlaceRequest]) -> list[Any]:
        if len(requests) == 1:
            keys, args = self._place_call(requests[0])
            return [self._link.call("pool_place", keys, *args)]
        return self._link.call_many("pool_place", map(self._place_call, requests))

    def _place_call(self, r: PlaceRequest) -> tuple[Sequence[str], Sequence[Value]]:
        if r.vcpus < 1 or r.memory_mib < 1:
            raise Invalid(f"VM {r.vm}: {r.vcpus} vCPU and {r.memory_mib} MiB", next="Ask for at least 1 of each")
        for name in (r.domain_node, r.vm, r.step, r.pin or "-", r.prefer or "-", *r.exclude, *r.tags):
            check_token("name in a placement", name)
        mac = self._propose_mac() if r.mac else ""
        packed = (
            f"{r.domain_node}|{r.vm}|{r.step}|{r.vcpus}|{r.memory_mib}|{r.pin or ''}|{_wrapped(r.exclude)}|"
            f"{r.console_port:d}|{r.ip:d}|{mac}|{r.order}|{_wrapped(r.tags)}|{r.start_s * 1000:.0f}|{r.told}"
        )
        args: tuple[Value, ...] = (self._link.prefix, _mix_text(r.mix), packed)
        if r.marks or r.shuns or r.seeks or r.prefer:
            for name in (*r.marks, *r.shuns, *r.seeks):
                check_token("tag", name)
            args = (*args, f"{_wrapped(r.marks)}|{_wrapped(r.shuns)}|{_wrapped(r.seeks)}|{r.prefer or ''}")
        return (self._epoch,), args

    def started(self, domain_node: str, node: str, vm: str) -> bool:
        """The VM's start on this node ended: it no longer counts against ``max_starts``. False: it did not count."""
        key = self._link.key
        gone = self._link.commands([("ZREM", key("starts", node), vm), ("ZREM", key("starting", domain_node), vm)])
        return any(gone)

    # ---- starts, and how full it is

    def limit_starts(self, domain_node: str, max_starts: int) -> None:
        """How many starts may be under way at once on this domain node's storage; 0: any."""
        if max_starts:
            self._link.do("HSET", self._link.key("limits", "all"), domain_node, max_starts)
        else:
            self._link.do("HDEL", self._link.key("limits", "all"), domain_node)

    def start_limit(self, domain_node: str) -> int:
        """What ``limit_starts`` set; 0: any."""
        return int(self._link.do("HGET", self._link.key("limits", "all"), domain_node) or 0)

    def bounds(self, node: str) -> tuple[int, int] | None:
        """Floor and ceiling an operator set for a server node's starts; None: it is in no pool, or not to adapt."""
        floor, ceiling = self._link.do("HMGET", self._link.key("node", node), "starts_floor", "starts_ceiling")
        return (int(floor), int(ceiling)) if floor and ceiling and int(floor) and int(ceiling) else None

    def bound_starts(self, node: str, starts: int, facts: Mapping[str, str]) -> None:
        """The bound in force from now on, and what it was measured by (kept as it is, for ``admission``)."""
        key = self._link.key
        if not self._link.do("HEXISTS", key("node", node), "vcpus"):
            return
        words = [word for pair in facts.items() for word in pair]
        self._link.commands([
            ("HSET", key("node", node), "max_starts", starts), ("HSET", key("admission", node), *words),
        ])  # fmt: skip

    def admission(self, name: str) -> dict[str, str]:
        """What a bound was last measured by: of a server node, or of a domain node's storage (``storage_facts``)."""
        return self._link.pairs(self._link.do("HGETALL", self._link.key("admission", name)))

    def storage_facts(self, domain_node: str, facts: Mapping[str, str]) -> None:
        """What the bound of a domain node's storage was measured by."""
        words = [word for pair in facts.items() for word in pair]
        self._link.do("HSET", self._link.key("admission", f"{domain_node}|"), *words)

    def start_began(self, node: str, vm: str, start_s: float) -> float | None:
        """When (Unix time) the VM's start on this node was placed, if it still counts as under way; ``start_s`` as in
        its placement."""
        score = self._link.do("ZSCORE", self._link.key("starts", node), vm)
        return None if score is None else float(score) / 1000 - start_s

    def free_starts(self, domain_node: str) -> int | None:
        """How many more starts may be under way on this domain node's storage; None: any."""
        limit = self.start_limit(domain_node)
        if not limit:
            return None
        now = self._link.do("TIME")
        now_ms = int(now[0]) * 1000 + int(now[1]) // 1000
        return max(0, limit - int(self._link.do("ZCOUNT", self._link.key("starting", domain_node), now_ms, "+inf")))

    def standing(
        self, domain_node: str, vcpus: int, memory_mib: int, order: Literal["pack", "spread"], best: int = 5
    ) -> Standing:
        """How the pool stands for a VM of this size, cheap at any size of the pool (a refusal of ``place`` tells why
        for every server node)."""
        pool, least = self._link.key("pool", domain_node), memory_mib * 65536 + vcpus
        by = ("ZREVRANGEBYSCORE", pool, "+inf", least) if order == "spread" else ("ZRANGEBYSCORE", pool, least, "+inf")
        nodes, open_, fitting, rows = self._link.commands([
            ("SCARD", self._link.key("nodes", domain_node)), ("ZCARD", pool), ("ZCOUNT", pool, least, "+inf"),
            (*by, "WITHSCORES", "LIMIT", 0, best),
        ])  # fmt: skip
        pairs = [(name, int(float(score))) for name, score in _pairs(rows)]
        seen = tuple((name, score % 65536, score // 65536) for name, score in pairs)
        return Standing(int(nodes), int(open_), int(fitting), seen)

    def release(
        self, domain_node: str, vm: str, node: str, ip_cooling_s: float, port_cooling_s: float | None = None,
        step: str | None = None, fence: Fence | None = None,
    ) -> bool:  # fmt: skip
        """The VM was observed stopped on this node: capacity is free at once, the IP after ``ip_cooling_s``. With
        ``port_cooling_s`` and no other claim left, its port cools too. ``step``: only what that step claimed ('' is
        what a rebuild wrote); ``fence``: only while that attempt is its holder's. False: it held nothing there."""
        key = self._link.key
        keys = [key("pool", domain_node), key("claims", domain_node), key("node", node), key("ips", node),
                key("starts", node), key("ports", domain_node), key("starting", domain_node),
                key("step", fence.step if fence else "none")]  # fmt: skip
        port_ms: Value = "" if port_cooling_s is None else round(port_cooling_s * 1000)
        by_step = "" if step is None else f"={step}"
        held: tuple[Value, Value] = (fence.attempt, fence.holder) if fence else ("", "")
        return bool(
            self._link.call("pool_release", keys, vm, node, round(ip_cooling_s * 1000), port_ms, by_step, *held)
        )

    def restore(self, claim: Claim) -> None:
        """Give a VM back what it is seen to use and holds no claim on: just this server node, port and IP, also where
        there is no room. Conflict: port or IP is another VM's by now, or the server node is in no pool."""
        key, at = self._link.key, claim.domain_node
        keys = [key("epoch", "run_id"), key("pool", at), key("claims", at), key("node", claim.node), key("ports", at),
                key("ips", claim.node)]  # fmt: skip
        amounts = (claim.vcpus, claim.memory_mib, claim.port, ip_number(claim.ip))
        answer = str(self._link.call("claim_restore", keys, claim.vm, claim.node, *amounts))
        if answer == "no node":
            raise Conflict(f"server node {claim.node} is in no pool", next="It joins again by itself: hdcs node list")
        if answer != "ok":
            what, other = answer.split(" ", 1)
            shown = f"console port {claim.port}" if what == "port" else f"address {claim.ip}"
            raise Conflict(
                f"{shown} of VM {claim.vm}, which runs on {claim.node}, is VM {other}'s by now",
                next="Stop and start one of the two: it gets another one",
                details={"vm": claim.vm, "other": other},
            )

    # ---- reading

    def claims(self, domain_node: str) -> list[Claim]:
        """Every claim in the domain node."""
        pairs = self._link.pairs(self._link.do("HGETALL", self._link.key("claims", domain_node)))
        return [claim for vm, text in sorted(pairs.items()) for claim in read_claims(domain_node, vm, text)]

    def claim_counts(self, domain_node: str, vms: Sequence[str]) -> dict[str, int]:
        """How many claims each of these VMs holds in the domain node."""
        texts = self._link.commands([("HGET", self._link.key("claims", domain_node), vm) for vm in vms])
        return {vm: len(read_claims(domain_node, vm, text)) for vm, text in zip(vms, texts, strict=True)}

    def claim_of(self, vm: str) -> list[Claim]:
        """What the VM holds, in whatever domain node: none, one, or two while it migrates."""
        pools = self.domain_nodes()
        texts = self._link.commands([("HGET", self._link.key("claims", d), vm) for d in pools])
        return [claim for d, text in zip(pools, texts, strict=True) for claim in read_claims(d, vm, text)]

    def capacity(
        self, domain_node: str, vcpus: int, memory_mib: int, free_ports: int | None = None
    ) -> dict[str, NodeCapacity]:
        """How many more VMs of this shape (memory with overhead) each server node takes; key '' is the pool's sum,
        cut to ``free_ports`` where given."""
        found = {n.name: _node_capacity(n, vcpus, memory_mib) for n in self.nodes(domain_node)}
        total = sum(c.vms for c in found.values())
        if free_ports is not None and free_ports < total:
            return found | {"": NodeCapacity(free_ports, "ports")}
        return found | {"": NodeCapacity(total, "server nodes")}


def _pairs(rows: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Member and score, as Redis answers them flat or, with RESP3, in pairs."""
    if rows and isinstance(rows[0], list | tuple):
        return [(row[0], row[1]) for row in rows]
    return list(zip(rows[::2], rows[1::2], strict=True))


def _view(name: str, row: Sequence[Any]) -> PoolNodeView:
    facts, (highest, last), listed, ripe, starts = row
    vcpus, memory, used_vcpus, used_memory, schedulable, max_starts, tags, subnet, floor, ceiling = facts
    unused = int(last) - int(highest) if subnet and last else 0
    return PoolNodeView(
        name=name, vcpus=int(vcpus), memory_mib=int(memory), free_vcpus=int(vcpus) - int(used_vcpus),
        free_memory_mib=int(memory) - int(used_memory), free_ips=unused + int(listed) + int(ripe),
        subnet=subnet, max_starts=int(max_starts), starts=int(starts), schedulable=schedulable == "1",
        tags=tuple(t for t in tags.split(",") if t), min_starts=int(floor or 0),
        starts_ceiling=int(ceiling if ceiling is not None else max_starts),
    )  # fmt: skip


def _node_capacity(node: PoolNodeView, vcpus: int, memory_mib: int) -> NodeCapacity:
    if not node.schedulable:
        return NodeCapacity(0, "draining")
    limits = [(node.free_memory_mib // memory_mib, "memory"), (node.free_vcpus // vcpus, "vcpus")]
    if node.subnet:
        limits.append((node.free_ips, "ips"))
    vms, limit = min(limits)
    return NodeCapacity(max(0, vms), limit)
