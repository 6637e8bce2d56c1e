"""Writing all reservations anew from a snapshot of record and world, and finding what has no owner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from hdcs_tasks.errors import Conflict, Invalid
from hdcs_tasks.reservations.epoch import Epoch
from hdcs_tasks.reservations.ips import guest_span, ip_number
from hdcs_tasks.reservations.link import Link
from hdcs_tasks.reservations.model import Claim, Orphans, PoolNode, PoolSnapshot, Snapshot
from hdcs_tasks.reservations.names import pack_subnet
from hdcs_tasks.reservations.pool import node_fields, write_claims
from hdcs_tasks.reservations.scripts import Value

# Families of keys a rebuild owns. Not: lease, step, ack (they end by themselves).
_FAMILIES = ("mac:*", "subnet:*", "port_ranges:*", "ports:*", "pools:*", "pool:*", "nodes:*", "node:*", "claims:*",
             "ips:*", "starts:*", "starting:*", "limits:*", "tagged:*", "disk:*")  # fmt: skip
_CHUNK = 1000


def rebuild(
    link: Link, epoch: Epoch, present: Snapshot, snapshot: Snapshot, port_cooling_s: float, token: str | None
) -> None:
    """See ``Reservations.rebuild``. ``present``: what Redis holds, for server nodes only it knows."""
    _check(snapshot)
    run_id = epoch.run_id()
    token = token or epoch.close()
    merged = _merged(present, snapshot)
    old = [key for family in _FAMILIES for key in link.scan(family)]
    commands: list[Sequence[Value]] = [("UNLINK", *old[at : at + _CHUNK]) for at in range(0, len(old), _CHUNK)]
    commands += _commands(link, merged)
    now = link.do("TIME")
    commands += _cooling_ports(link, merged, int(now[0]) * 1000 + int(now[1]) // 1000 + round(port_cooling_s * 1000))
    # Last, and with the run_id of before: a Redis that restarted in between stays closed. Only while the rebuild is in
    # our hands: what was given out since another one opened the epoch is not in this snapshot.
    key = link.key("epoch", "run_id")
    if not link.transaction([*commands, ("SET", key, run_id)], while_=(key, token)):
        raise Conflict("another control worker took the rebuild in hand meanwhile", next="It ends it; look again")


def _merged(present: Snapshot, snapshot: Snapshot) -> Snapshot:
    """The snapshot, with the server nodes, subnets and port ranges that only Redis knows."""
    known = {node.name for pool in snapshot.pools.values() for node in pool.nodes}
    pools = dict(snapshot.pools)
    for name, old in present.pools.items():
        new = pools.get(name, PoolSnapshot(old.port_first, old.port_last))
        extra = tuple(node for node in old.nodes if node.name not in known)
        first, last = (new.port_first, new.port_last) if new.port_last else (old.port_first, old.port_last)
        pools[name] = replace(new, port_first=first, port_last=last, nodes=new.nodes + extra)
    taken = set(snapshot.subnets.values())
    subnets = {n: s for n, s in present.subnets.items() if s not in taken} | dict(snapshot.subnets)
    return Snapshot(snapshot.macs, subnets, pools)


def _check(snapshot: Snapshot) -> None:
    """Refuse a snapshot that gives one thing to two owners: opening on it would spread the damage."""
    _unique("MAC", snapshot.macs.values())
    _unique("subnet", snapshot.subnets.values())
    _unique("server node", (n.name for p in snapshot.pools.values() for n in p.nodes))
    for name, pool in snapshot.pools.items():
        _unique(f"console port of {name}", pool.ports.values())
        _unique(f"IP of {name}", (c.ip for c in pool.claims if c.ip))
        _unique(f"claim of {name}", ((c.vm, c.node) for c in pool.claims))
        for claim in pool.claims:
            if claim.port and pool.ports.get(claim.vm) != claim.port:
                raise Invalid(f"snapshot: VM {claim.vm} claims port {claim.port} but owns {pool.ports.get(claim.vm)}",
                              next="Make the snapshot's ports and claims agree")  # fmt: skip


def _unique(what: str, values: Iterable[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise Invalid(f"snapshot: {what} {value} is there twice", next="Find its one owner before rebuilding")
        seen.add(value)


def _commands(link: Link, snapshot: Snapshot) -> Iterator[Sequence[Value]]:
    yield from _hash(link.key("mac", "all"), snapshot.macs)
    yield from _hash(link.key("mac", "all"), {f":{mac}": vm for vm, mac in snapshot.macs.items()})
    yield from _hash(link.key("subnet", "of_node"), {n: pack_subnet(s) for n, s in snapshot.subnets.items()})
    for name, pool in snapshot.pools.items():
        yield from _pool_commands(link, name, pool)
        yield from _ips(link, pool, snapshot.subnets)


def _pool_commands(link: Link, name: str, pool: PoolSnapshot) -> Iterator[Sequence[Value]]:
    yield ("SADD", link.key("pools", "all"), name)
    if pool.port_last:
        yield ("HSET", link.key("port_ranges", "all"), name, f"{pool.port_first}-{pool.port_last}")
        yield from _span(link.key("ports", name), pool.port_first, pool.port_last, pool.ports)
    by_vm: dict[str, list[Claim]] = {}
    by_node: dict[str, list[Claim]] = {}
    for claim in pool.claims:
        by_vm.setdefault(claim.vm, []).append(claim)
        by_node.setdefault(claim.node, []).append(claim)
    yield from _hash(link.key("claims", name), {vm: write_claims(claims) for vm, claims in by_vm.items()})
    for node in pool.nodes:
        yield from _node_commands(link, name, node, by_node.get(node.name, []))
    for vm, marks in pool.marks.items():
        for mark in marks:
            yield ("SADD", link.key("tagged", name), mark)
            yield ("SADD", link.key("tagged", name, mark), vm)
    if pool.max_starts:
        yield ("HSET", link.key("limits", "all"), name, pool.max_starts)
    yield from _hash(link.key("disk", name), pool.disks)
    yield ("SET", link.key("disk", name, "used"), sum(pool.disks.values()))


def _cooling_ports(link: Link, snapshot: Snapshot, ripe_ms: int) -> Iterator[Sequence[Value]]:
    """Whoever owns a port without a claim stopped, and when is forgotten: its port cools from now on."""
    for name, pool in snapshot.pools.items():
        running = {claim.vm for claim in pool.claims}
        for vm in pool.ports.keys() - running:
            yield ("ZADD", link.key("ports", name) + ":cooling", ripe_ms, vm)


def _node_commands(link: Link, domain_node: str, node: PoolNode, claims: Sequence[Claim]) -> Iterator[Sequence[Value]]:
    vcpus, memory = sum(c.vcpus for c in claims), sum(c.memory_mib for c in claims)
    fields = node_fields(domain_node, node) | {"used_vcpus": vcpus, "used_memory_mib": memory}
    yield from _hash(link.key("node", node.name), fields)
    yield ("SADD", link.key("nodes", domain_node), node.name)
    free_vcpus, free_memory = node.vcpus - vcpus, node.memory_mib - memory
    if node.schedulable and free_vcpus > 0 and free_memory > 0:
        yield ("ZADD", link.key("pool", domain_node), free_memory * 65536 + min(free_vcpus, 65535), node.name)


def _ips(link: Link, pool: PoolSnapshot, subnets: Mapping[str, str]) -> Iterator[Sequence[Value]]:
    """Addresses of every server node, also of a lost one: what it holds must not be given again when it is back."""
    in_pool = {node.name: node.subnet for node in pool.nodes}
    owned: dict[str, dict[str, int]] = {name: {} for name in in_pool}
    for claim in pool.claims:
        if claim.ip:
            owned.setdefault(claim.node, {})[claim.vm] = ip_number(claim.ip)
    for name, ips in owned.items():
        if subnet := in_pool.get(name) or subnets.get(name):
            yield from _span(link.key("ips", name), *guest_span(subnet), ips)


def _span(base: str, first: int, last: int, owned: Mapping[str, int]) -> Iterator[Sequence[Value]]:
    """A span as span.lua keeps it: the cursor stands on the highest owned number, gaps below are listed as free."""
    inside = {n for n in owned.values() if first <= n <= last}
    highest = max(inside, default=first - 1)
    free = [n for n in range(first, highest) if n not in inside]
    for at in range(0, len(free), _CHUNK):
        yield ("RPUSH", f"{base}:free", *free[at : at + _CHUNK])
    yield from _hash(base, {":first": first, ":last": last, ":next": highest, **owned})


def _hash(key: str, pairs: Mapping[str, Value]) -> Iterator[Sequence[Value]]:
    items = list(pairs.items())
    for at in range(0, len(items), _CHUNK):
        yield ("HSET", key, *(x for pair in items[at : at + _CHUNK] for x in pair))


def orphans(present: Snapshot, cooling: Mapping[str, set[str]], vms: set[str]) -> Orphans:
    """Reservations in ``present`` of VMs that are not among ``vms``."""
    return Orphans(
        macs=tuple(vm for vm in present.macs if vm not in vms),
        ports=tuple((d, vm) for d, p in present.pools.items() for vm in p.ports
                    if vm not in vms and vm not in cooling.get(d, ())),
        disks=tuple((d, vm) for d, p in present.pools.items() for vm in p.disks if vm not in vms),
        claims=tuple(c for p in present.pools.values() for c in p.claims if c.vm not in vms),
    )  # fmt: skip
