"""Printing what a dry run found: where each VM would go, and for every server node why or why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from hdcs_tasks.cli import output
from hdcs_tasks.errors import from_dict

VMS = output.columns("name", "domain_node", "server_node")
WAY = output.columns("way")
WARM = (output.column("warm_pool", "warm pool"), output.column("was", "is now"))
NODES = (
    output.column("domain_node"), output.column("node", "server node"), output.Column("rank"),
    output.Column("free_vcpus", "free vcpus"), output.column("free_memory_mib", "free memory"), output.Column("vms"),
    output.Column("score"), output.Column("why"),
)  # fmt: skip


def conclude(plan: dict[str, Any], form: str) -> None:
    """Print a plan; raise its refusal, so that the exit code tells."""
    if form == "json":
        output.print_json(plan)
    else:
        warm = WARM if any(vm.get("warm_pool") for vm in plan["vms"]) else ()
        way = WAY if any(vm.get("way") for vm in plan["vms"]) else ()
        output.print_rows([_brief(vm) for vm in plan["vms"]], (*VMS, *way, *warm), form)
        if form == "table":
            _explain(plan)
    if not plan["fits"]:
        raise from_dict(plan["refusal"])


def conclude_look(plan: dict[str, Any], form: str) -> None:
    """Print what a server node's look found; raise its refusal, so that the exit code tells."""
    if form == "json":
        output.print_json(plan)
    elif plan["fits"]:
        rest = {key: value for key, value in plan.items() if key not in ("fits", "found", "refusal", "domain_nodes")}
        output.print_one(rest | plan["found"], form)
    if not plan["fits"]:
        raise from_dict(plan["refusal"])


def _brief(vm: dict[str, Any]) -> dict[str, Any]:
    keys = ("name", "domain_node", "server_node", "way", "warm_pool", "was", "message")
    return {key: vm[key] for key in keys if key in vm}


def _explain(plan: dict[str, Any]) -> None:
    rows = list(_node_rows(plan))
    if rows:
        click.echo("")
        output.print_table(rows, NODES)


def _node_rows(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every server node once per domain node: as the first VM found it, or the first that was refused."""
    told: set[str] = set()
    deciding = plan.get("domain_nodes") or sorted(plan["vms"], key=lambda vm: vm["server_node"] is not None)
    for found in deciding:
        if found["domain_node"] in told or not found["decision"]:
            continue
        told.add(found["domain_node"])
        for node in found["decision"]["nodes"]:
            yield {"domain_node": found["domain_node"]} | node


def print_decision(decision: dict[str, Any]) -> None:
    """What an operation kept of the scheduler's choice: counts by reason, and the best server nodes."""
    counts = decision.get("counts") or {
        pool["domain_node"]: pool["why"] or ", ".join(f"{n} {word}" for word, n in pool["counts"].items())
        for pool in decision.get("domain_nodes", [])
    }
    output.print_table([{"why": word, "n": n} for word, n in counts.items()],
                       (output.Column("why", "placement"), output.Column("n", "server nodes")))  # fmt: skip
    if decision.get("best"):
        output.print_table(decision["best"], (output.Column("node", "best server nodes"), *NODES[3:5], *NODES[6:]))
