"""``hdcs pool``: capacity and events of the resource pools."""

from __future__ import annotations

from typing import Any

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.options import Face, format_option, pass_face

CAPACITY = (
    output.Column("domain_node", "domain node", lambda name: name or "all"),
    output.Column("server_node", "server node", lambda name: name or "all"), output.Column("vms"),
    output.Column("limit"),
)  # fmt: skip
EVENTS = (output.column("at", "at"), output.Column("kind"), output.Column("subject"), output.Column("message"))


@click.group()
def pool() -> None:
    """Resource pools: what fits, and what happened."""


@pool.command()
@click.argument("profile")
@format_option
@pass_face
def capacity(face: Face, profile: str, form: str) -> None:
    """How many more VMs of a profile fit: per server node, per domain node and in all, with what limits each.

    \b
    Examples:
      hdcs pool capacity small
      hdcs pool capacity small -f json
    """
    found = face.cloud.capacity(profile)
    if form == "json":
        output.print_json(found)
    else:
        output.print_rows(_capacity_rows(found), CAPACITY, form)


def _capacity_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per server node, one per domain node (no server node), and one for all (neither)."""
    rows: list[dict[str, Any]] = []
    for name, pooled in found["domain_nodes"].items():
        rows += [{"domain_node": name, "server_node": node, **room} for node, room in pooled["server_nodes"].items()]
        rows.append({"domain_node": name, "server_node": "", "vms": pooled["vms"], "limit": pooled["limit"]})
    return [*rows, {"domain_node": "", "server_node": "", "vms": found["vms"], "limit": ""}]


@pool.command()
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@format_option
@pass_face
def events(face: Face, limit: int, form: str) -> None:
    """What happened that nobody asked for: server nodes that joined or were lost, guests gone, idle VMs stopped.

    \b
    Examples:
      hdcs pool events --limit 20
    """
    output.print_rows(face.cloud.events(limit), EVENTS, form)
