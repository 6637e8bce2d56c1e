"""``hdcs node``: server nodes."""

from __future__ import annotations

from typing import Any

import click

from hdcs_tasks.cli import output, plans, waiting
from hdcs_tasks.cli.options import (
    Face,
    changes,
    delete_records,
    drain_options,
    format_option,
    pass_face,
    wait_options,
    yes_option,
)

COLUMNS = (
    output.Column("name"), output.Column("domain_node", "domain node"), output.Column("state"), output.Column("ip"),
    output.Column("subnet"), output.Column("vcpus"), output.Column("free_vcpus", "free"),
    output.column("memory_mib"), output.column("free_memory_mib", "free"), output.column("observed_at", "observed"),
)  # fmt: skip


@click.group()
def node() -> None:
    """Server nodes: the hosts that run guests."""


@node.command("list")
@click.option("--domain-node", default=None, help="Only those of this domain node.")
@format_option
@pass_face
def list_(face: Face, domain_node: str | None, form: str) -> None:
    """List the server nodes with what is free on them.

    \b
    Examples:
      hdcs node list
      hdcs node list --domain-node east -f json
    """
    rows = [row for row in face.cloud.server_nodes.list() if domain_node in (None, row["domain_node"])]
    output.print_rows(rows, COLUMNS, form)


@node.command()
@click.argument("name")
@format_option
@pass_face
def show(face: Face, name: str, form: str) -> None:
    """Show one server node with the facts its host reported.

    \b
    Examples:
      hdcs node show node1
    """
    output.print_one(face.cloud.server_nodes.show(name), form)


@node.command("set")
@click.argument("name")
@click.option("--memory-overcommit", type=float, default=None, help="Guest memory promised per MiB of host memory.")
@click.option("--vcpu-overcommit", type=float, default=None, help="vCPUs promised per effective core.")
@click.option("--host-reserve-mib", type=int, default=None, help="Host memory never given to guests, in MiB.")
@click.option(
    "--max-starts",
    type=int,
    default=None,
    help="Starts under way at once while it is calm; 0: any.",
)
@click.option("--min-starts", type=int, default=None, help="As few as measured load may lower that to; 0: it stays.")
@click.option("--tag", "tags", multiple=True, help="Its tags, all of them (may be repeated).")
@click.option("--default", "defaults", multiple=True, metavar="RULE", help="Back to the default (may be repeated).")
@format_option
@pass_face
def set_(face: Face, /, name: str, defaults: tuple[str, ...], form: str, **options: Any) -> None:
    """Change a server node's placement rules; what is not named stays. They go before its domain node's.

    \b
    Examples:
      hdcs node set node1 --tag gpu --max-starts 32 --min-starts 4
      hdcs node set node1 --default tags --default max-starts
    """
    output.print_one(face.cloud.server_nodes.set(name, **changes(options, defaults)), form)


@node.command()
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
@click.option("--move/--no-move", default=True, show_default=True, help="Move its VMs, or only close it.")
@drain_options
@wait_options
@pass_face
def drain(
    face: Face, /, names: tuple[str, ...], dry_run: bool, wait: bool, timeout_s: float | None, form: str, **options: Any
) -> None:
    """Empty server nodes: no new VM starts there, running ones move live to others of the domain node.

    Stopped VMs need nothing. What cannot be moved stays and is named with its reason. The node stays closed until
    `hdcs node resume`, also over restarts of its worker. Several are all closed before the first VM moves.

    \b
    Examples:
      hdcs node drain node1 node2 --dry-run
      hdcs node drain node2 --dry-run
      hdcs node drain node2 --concurrency 4 --reason 'new memory'
      hdcs node drain node2 --no-move
    """
    if dry_run:
        plans.conclude(face.cloud.server_nodes.drain(names[0], dry_run=True, also=names[1:]).explain(), form)
        return
    opened, refused = waiting.each(names, lambda name: face.cloud.server_nodes.drain(name, also=names, **options))
    waiting.conclude(opened, form=form, wait=wait, timeout_s=timeout_s, one=len(names) == 1, refused=refused)


@node.command()
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
@format_option
@pass_face
def resume(face: Face, names: tuple[str, ...], form: str) -> None:
    """Let VMs start on these server nodes again; a drain under way begins no more moves.

    \b
    Examples:
      hdcs node resume node2
    """
    output.print_rows([face.cloud.server_nodes.resume(name) for name in names], _BRIEF, form)


@node.command()
@click.argument("names", nargs=-1, required=True, metavar="NODE...")
@yes_option
@format_option
@pass_face
def remove(face: Face, names: tuple[str, ...], yes: bool, form: str) -> None:
    """Forget server nodes that have left for good.

    \b
    Examples:
      hdcs node remove node2 -y
    """
    delete_records(
        "server node",
        names,
        lambda each: face.cloud.server_nodes.remove(each),
        yes,
        form,
        told="; its name is free again",
    )


_BRIEF = output.columns("name", "domain_node", "state", "draining")
