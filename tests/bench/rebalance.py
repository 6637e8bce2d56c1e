"""Rebalancing against Ganeti's hbal on the same pools: how even it gets, with how many migrations, and how fast.

hbal (Debian package ganeti-htools) reads the pool as a text file with shared storage, so that its moves are single
migrations as ours are; both ends are judged by one score, counted here from where the guests ended. Without it the
figures stand alone.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from statistics import mean, pstdev
from time import perf_counter

from hdcs_tasks.pool.balance_rules import Resident, rebalance
from hdcs_tasks.pool.rules import Free, Need, NodeRoom
from tests.bench.report import Figure, judged, say

VCPUS, MEMORY = 128, 262_144
_MOVE = re.compile(r"^\s+\d+\. (\S+)\s+\S+\s+=> (\S+)", re.MULTILINE)


def run(options: argparse.Namespace) -> list[Figure]:
    seeds = range(3 if options.quick else 10)
    hbal = shutil.which("hbal")
    if hbal is None:
        say("hbal is not installed (apt-get install ganeti-htools): figures without a baseline")
    ours: list[tuple[float, int]] = []
    theirs: list[tuple[float, int]] = []
    seconds: list[float] = []
    their_seconds: list[float] = []
    before: list[float] = []
    as_even: list[int] = []
    for seed in seeds:
        rooms, residents = cluster(20, seed)
        before.append(score(residents, 20))
        moves, took_s = plan(rooms, residents)
        ours.append((score(moved(residents, moves), 20), len(moves)))
        seconds.append(took_s)
        if hbal is not None:
            found, took_s = asked_hbal(hbal, residents, 20)
            theirs.append((score(moved(residents, found), 20), len(found)))
            as_even.append(until(residents, moves, 20, theirs[-1][0]))
            their_seconds.append(took_s)
    figures = [Figure("20 nodes: score before", round(mean(before), 4), "score")]
    figures += compared(ours, theirs, as_even, seconds, their_seconds)
    size = 200 if options.quick else 1000
    rooms, residents = cluster(size, 1)
    moves, took_s = plan(rooms, residents)
    figures.append(Figure(f"{size} nodes: score before", round(score(residents, size), 4), "score"))
    figures.append(Figure(f"{size} nodes: score after", round(score(moved(residents, moves), size), 4), "score"))
    figures.append(Figure(f"{size} nodes: migrations", len(moves), "moves"))
    figures.append(judged(f"{size} nodes: plan", took_s, "s", None, 10.0, "<=", of="value"))
    return figures


def compared(
    ours: list[tuple[float, int]], theirs: list[tuple[float, int]], as_even: list[int], seconds: list[float],
    their_seconds: list[float],
) -> list[Figure]:  # fmt: skip
    after, count = mean(s for s, _ in ours), mean(n for _, n in ours)
    if not theirs:
        return [Figure("20 nodes: score after", round(after, 4), "score"),
                Figure("20 nodes: migrations", count, "moves")]  # fmt: skip
    return [
        judged("20 nodes: score after", after, "score", mean(s for s, _ in theirs), 1.05, "<="),
        judged("20 nodes: migrations to hbal's score", mean(as_even), "moves", mean(n for _, n in theirs), 1.0, "<="),
        Figure("20 nodes: migrations in all", count, "moves"),
        Figure("20 nodes: plan", round(mean(seconds), 4), "s", round(mean(their_seconds), 4),
               round(mean(seconds) / mean(their_seconds), 3)),
    ]  # fmt: skip


def cluster(nodes: int, seed: int) -> tuple[list[NodeRoom], list[Resident]]:
    """A pool of equal server nodes, filled unevenly to about two thirds."""
    rng = random.Random(seed)
    free = [[VCPUS, MEMORY] for _ in range(nodes)]
    residents: list[Resident] = []
    for i in range(13 * nodes):
        at = min(nodes - 1, int(abs(rng.gauss(0, 0.5)) * nodes))
        need = Need(rng.choice([2, 4, 8]), rng.choice([4096, 8192, 16_384]))
        if free[at][0] >= need.vcpus and free[at][1] >= need.memory_mib:
            free[at][0] -= need.vcpus
            free[at][1] -= need.memory_mib
            residents.append(Resident(f"v{i}", f"n{at}", need, vcpus=need.vcpus))
    rooms = [NodeRoom(f"n{n}", Free(*left), VCPUS, MEMORY) for n, left in enumerate(free)]
    return rooms, residents


def plan(rooms: list[NodeRoom], residents: list[Resident]) -> tuple[dict[str, str], float]:
    """VM -> where it goes, and how long the plan took to make."""
    began = perf_counter()
    found = rebalance(rooms, residents, max_moves=100_000)
    return {move.vm: move.target for move in found.moves}, perf_counter() - began


def until(residents: list[Resident], moves: Mapping[str, str], nodes: int, goal: float) -> int:
    """How many of the moves, in their order, bring the score to ``goal``; all where they do not."""
    order = list(moves.items())
    for count in range(len(order)):
        if score(moved(residents, dict(order[:count])), nodes) <= goal:
            return count
    return len(order)


def moved(residents: list[Resident], moves: Mapping[str, str]) -> list[tuple[str, Need]]:
    return [(moves.get(r.vm, r.node), r.need) for r in residents]


def score(residents: list[Resident] | list[tuple[str, Need]], nodes: int) -> float:
    """The standard deviations of the free share of memory and of vCPUs, summed."""
    used = {f"n{n}": [0, 0] for n in range(nodes)}
    for guest in residents:
        at, need = guest if isinstance(guest, tuple) else (guest.node, guest.need)
        used[at][0] += need.memory_mib
        used[at][1] += need.vcpus
    return pstdev(u[0] / MEMORY for u in used.values()) + pstdev(u[1] / VCPUS for u in used.values())


def asked_hbal(hbal: str, residents: list[Resident], nodes: int) -> tuple[dict[str, str], float]:
    with tempfile.NamedTemporaryFile("w", suffix=".data") as file:
        file.write(text_of(residents, nodes))
        file.flush()
        began = perf_counter()
        done = subprocess.run(
            [hbal, "-t", file.name, "--ignore-dynu", "-l", "100000"], capture_output=True, text=True, check=True
        )
        took_s = perf_counter() - began
    return dict(_MOVE.findall(done.stdout)), took_s


def text_of(residents: list[Resident], nodes: int) -> str:
    """The pool in htools' text format (man htools: groups, nodes, instances, tags, policies)."""
    used = {f"n{n}": 0 for n in range(nodes)}
    for guest in residents:
        used[guest.node] += guest.need.memory_mib
    sections = [
        ["pool|u-1|preferred||"],
        [f"{name}|{MEMORY}|0|{MEMORY - mib}|1000000|900000|{VCPUS}|N|u-1|1||N|0|0|1.0" for name, mib in used.items()],
        [f"{g.vm}|{g.need.memory_mib}|100|{g.need.vcpus}|running|Y|{g.node}||rbd||1|-" for g in residents],
        [],
        [f"{owner}|128,1,1024,1,1,1|128,1,128,1,1,1;{MEMORY},{VCPUS},1048576,16,8,12|rbd|1.0|32.0"
         for owner in ("", "pool")],
    ]  # fmt: skip
    return "\n".join("".join(f"{line}\n" for line in section) for section in sections)
