"""``hdcs pool``: capacity and events of the resource pools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from hdcs_tasks.cli import idle as idle_face
from hdcs_tasks.cli import output, waiting
from hdcs_tasks.cli.options import (
    Face,
    confirm,
    format_option,
    key_option,
    pass_face,
    reason_option,
    wait_options,
    yes_option,
)
from hdcs_tasks.errors import Invalid, NoCapacity

CAPACITY = (
    output.Column("domain_node", "domain node", lambda name: name or "all"),
    output.Column("server_node", "server node", lambda name: name or "all"), output.Column("vms"),
    output.Column("n_plus_one", "n+1"), output.Column("limit"),
)  # fmt: skip
LINE = (
    output.Column("domain_node", "domain node"), output.Column("place"), output.Column("subject", "vm"),
    output.Column("kind"), output.Column("waits_for", "waits for"), output.column("since_at", "since"),
    output.column("eta_s", "to go"), output.Column("operation", "operation", output.short_id), output.Column("why"),
)  # fmt: skip
MOVES = (
    output.Column("vm"), output.Column("from"), output.Column("to"), output.column("memory_mib"),
    output.Column("vcpus"), output.Column("score", "score then"),
)  # fmt: skip
BALANCE = output.columns("when", "score", "memory", "vcpus", "n_plus_one")
EVENTS = (output.column("at", "at"), output.Column("kind"), output.Column("subject"), output.Column("message"))


@click.group()
def pool() -> None:
    """Resource pools: what fits, and what happened."""


class NodeShape(click.ParamType[dict[str, Any]]):
    """``32x65536`` or ``east:32x65536``: vCPUs and MiB a new server node would promise to guests."""

    name = "node shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        found = re.fullmatch(r"(?:([a-z0-9-]+):)?(\d+)x(\d+)", str(value))
        if not found:
            self.fail(f"{value!r} is not VCPUSxMIB or DOMAIN_NODE:VCPUSxMIB, as in east:32x65536", param, ctx)
        return {"domain_node": found[1], "vcpus": int(found[2]), "memory_mib": int(found[3])}


@pool.command()
@click.argument("profile", required=False)
@click.option("--without", multiple=True, metavar="SERVER_NODE", help="As if it were gone (may be repeated).")
@click.option(
    "--with-node",
    "with_nodes",
    multiple=True,
    type=NodeShape(),
    metavar="[DOMAIN_NODE:]VCPUSxMIB",
    help="As if there were one more, promising so much to guests (may be repeated).",
)
@click.option("--n-plus-one", is_flag=True, help="Exit with 5 unless one fits with a server node kept free.")
@click.option(
    "--mix",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help='JSON file {"profile": how many, …}: how often that mix fits.',
)
@click.option("--image", default=None, help="Count storage by this image's disk. Default: the image with the largest.")
@format_option
@pass_face
def capacity(
    face: Face, profile: str | None, without: tuple[str, ...], with_nodes: tuple[dict[str, Any], ...],
    n_plus_one: bool, mix: Path | None, image: str | None, form: str,
) -> None:  # fmt: skip
    """How many more VMs of a profile fit: per server node, per domain node and in all, with what limits each.

    N+1 is how many fit with one server node of each domain node kept free.

    \b
    Examples:
      hdcs pool capacity small
      hdcs pool capacity small --without node2 --n-plus-one
      hdcs pool capacity small --with-node east:64x262144 -f json
      hdcs pool capacity small --image office
      hdcs pool capacity --mix office.json
    """
    if profile is None and mix is None:
        raise click.UsageError("Name a profile, or give a mix of profiles with --mix FILE.")
    found = face.cloud.capacity(
        profile, without=without, with_nodes=with_nodes, mix=None if mix is None else _mix(mix), image=image
    )
    if form == "json":
        output.print_json(found)
    else:
        output.print_rows(_capacity_rows(found), CAPACITY, form)
        if form == "table" and profile is not None:
            output.message(f"storage counted: {output.in_bytes(found['disk_bytes'])} a VM, by {found['disk_by']}")
    if n_plus_one and profile is not None and not found["n_plus_one"]:
        raise NoCapacity(f"no VM of profile {profile} fits with a server node kept free", next="Add a server node")


def _mix(file: Path) -> dict[str, int]:
    try:
        mix = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise Invalid(f"the mix {file} cannot be read: {error}", next='As in {"small": 10, "large": 1}') from None
    if not isinstance(mix, dict):
        raise Invalid("the mix is not an object of profile and number", next='As in {"small": 10, "large": 1}')
    return mix


def _capacity_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per server node, one per domain node (no server node), one for all (neither), and one for a mix."""
    rows: list[dict[str, Any]] = []
    for name, pooled in found.get("domain_nodes", {}).items():
        rows += [{"domain_node": name, "server_node": node, "n_plus_one": "", **room}
                 for node, room in pooled["server_nodes"].items()]  # fmt: skip
        rows.append({"domain_node": name, "server_node": ""} | {k: pooled[k] for k in ("vms", "n_plus_one", "limit")})
    if found["profile"] is not None:
        total = {"vms": found["vms"], "n_plus_one": found["n_plus_one"], "limit": ""}
        rows.append({"domain_node": "", "server_node": ""} | total)
    if (mix := found.get("mix")) is not None:
        limit = f"{mix['rounds']} times the mix; then {mix['stopped_by']}"
        rows.append({"domain_node": "mix", "server_node": "", "vms": mix["vms"], "n_plus_one": "", "limit": limit})
    return rows


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


@pool.command()
@click.argument("domain_node", required=False)
@format_option
@pass_face
def line(face: Face, domain_node: str | None, form: str) -> None:
    """Who waits to start, in order: its place, what it waits for, and when it may be through at the present pace.

    \b
    Examples:
      hdcs pool line
      hdcs pool line east -f json
    """
    output.print_rows(face.cloud.line(domain_node), LINE, form)


@pool.command()
@click.argument("domain_node")
@click.option("--dry-run", is_flag=True, help="Print the migrations and what they would bring; change nothing.")
@click.option("--max-moves", type=click.IntRange(1, 10_000), default=100, show_default=True, help="At most so many.")
@click.option("--concurrency", type=click.IntRange(1, 100), default=2, show_default=True, help="So many at once.")
@yes_option
@reason_option
@key_option
@wait_options
@pass_face
def rebalance(
    face: Face, domain_node: str, dry_run: bool, max_moves: int, concurrency: int, yes: bool, reason: str,
    key: str | None, wait: bool, timeout_s: float | None, form: str,
) -> None:  # fmt: skip
    """Even the load of a domain node's server nodes by live migrations. The plan is shown first.

    The score is the standard deviation of the free share of memory and of vCPUs over the server nodes, and the share of
    them whose largest guest would find no room elsewhere (N+1). Pinned VMs, those to be kept together and those on
    draining server nodes stay where they are.

    \b
    Examples:
      hdcs pool rebalance east --dry-run
      hdcs pool rebalance east --max-moves 20 --concurrency 4 -y
    """
    plan = face.cloud.rebalance(domain_node, max_moves=max_moves, dry_run=True).explain()
    if dry_run:
        _print_plan(plan, form)
        return
    if plan["moves"]:
        if form == "table":
            _print_plan(plan, form)
        confirm(f"Begin {len(plan['moves'])} live migrations in {domain_node}, {concurrency} at once?", yes)
    operation = face.cloud.rebalance(
        domain_node, max_moves=max_moves, concurrency=concurrency, idempotency_key=key, reason=reason
    )
    waiting.conclude([operation], form=form, wait=wait, timeout_s=timeout_s)


def _print_plan(plan: dict[str, Any], form: str) -> None:
    if form == "json":
        output.print_json(plan)
        return
    output.print_rows(plan["moves"], MOVES, form)
    if form == "table":
        output.print_table(
            [
                {"when": when} | {key: round(value, 4) for key, value in plan[when].items()}
                for when in ("before", "after")
            ],
            BALANCE,
        )
        output.message(plan["message"])


@pool.command()
@click.argument("names", nargs=-1, metavar="[VM]...")
@click.option("--policy", default=None, help="Only what this idle policy sees.")
@click.option("--dry-run", is_flag=True, help="Print what is seen of each desktop and what would happen when.")
@format_option
@pass_face
def idle(face: Face, names: tuple[str, ...], policy: str | None, dry_run: bool, form: str) -> None:
    """Take back desktops nobody uses, as their idle policies say (`hdcs idle`); beat does so all the time.

    Without --dry-run the server nodes are asked to look at every desktop whose next step is due; who is in use, also in
    the last second, is left alone.

    \b
    Examples:
      hdcs pool idle --dry-run
      hdcs pool idle desk-004 --dry-run -f json
      hdcs pool idle
    """
    if not dry_run:
        if names or policy:
            raise click.UsageError("A sweep looks at all desktops; a VM or --policy goes with --dry-run.")
        due = face.cloud.idle.sweep()
        output.print_rows([{"name": name} for name in due], (output.Column("name"),), form)
        output.message(f"{len(due)} desktops are due; what becomes of them: hdcs pool events, hdcs op list")
        return
    seen = face.cloud.idle.preview(names=names, policy=policy)
    output.print_rows(seen if form == "json" else [idle_face.flat(one) for one in seen], idle_face.SEEN, form)
