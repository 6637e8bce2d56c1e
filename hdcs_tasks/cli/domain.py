"""``hdcs domain``: domain nodes, each a resource pool with its own storage."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from hdcs_tasks.cli import output, plans, waiting
from hdcs_tasks.cli.options import Face, changes, drain_options, format_option, pass_face, wait_options

COLUMNS = (
    output.Column("name"), output.Column("server_nodes", "server nodes"),
    output.Column("storage_primary", "storage primary"), output.Column("vcpus"), output.Column("free_vcpus", "free"),
    output.column("memory_mib"), output.column("free_memory_mib", "free"), output.Column("ports_free", "ports free"),
    output.column("storage_free_bytes"), output.column("disk_promised_bytes"), output.Column("draining"),
)  # fmt: skip


@click.group()
def domain() -> None:
    """Domain nodes: groups of server nodes that share one storage."""


@domain.command("list")
@format_option
@pass_face
def list_(face: Face, form: str) -> None:
    """List the domain nodes with their pooled capacity, ports and storage.

    \b
    Examples:
      hdcs domain list
      hdcs domain list -f csv
    """
    output.print_rows(face.cloud.domain_nodes.list(), COLUMNS, form)


@domain.command()
@click.argument("name")
@format_option
@pass_face
def show(face: Face, name: str, form: str) -> None:
    """Show one domain node.

    \b
    Examples:
      hdcs domain show east
    """
    output.print_one(face.cloud.domain_nodes.show(name), form)


@domain.command()
@click.argument("name")
@format_option
@pass_face
def create(face: Face, name: str, form: str) -> None:
    """Create a domain node and print its join token, which is shown once and never kept.

    Put the token into the file HDCS_JOIN_TOKEN_FILE names on each of its server nodes.

    \b
    Examples:
      hdcs domain create east
      hdcs domain create east -f json
    """
    output.print_one(asdict(face.cloud.domain_nodes.create(name)), form)
    output.message("The token is shown only now; a new one: hdcs domain token " + name)


@domain.command("set")
@click.argument("name")
@click.option("--memory-overcommit", type=float, default=None, help="Guest memory promised per MiB of host memory.")
@click.option("--vcpu-overcommit", type=float, default=None, help="vCPUs promised per effective core.")
@click.option("--disk-overcommit", type=float, default=None, help="Virtual disk bytes promised per byte of storage.")
@click.option("--host-reserve-mib", type=int, default=None, help="Host memory never given to guests, in MiB.")
@click.option(
    "--placement",
    type=click.Choice(["spread", "pack"]),
    default=None,
    help="Even load and fast starts, or room kept for big VMs.",
)
@click.option("--max-starts", type=int, default=None, help="Starts under way at once on its storage; 0: any.")
@click.option("--min-starts", type=int, default=None, help="As few as a slow storage may lower that to; 0: it stays.")
@click.option("--default", "defaults", multiple=True, metavar="RULE", help="Back to the default (may be repeated).")
@format_option
@pass_face
def set_(face: Face, /, name: str, defaults: tuple[str, ...], form: str, **options: Any) -> None:
    """Change a domain node's placement rules; what is not named stays.

    What runs stays where it is, also where less may be promised now.

    \b
    Examples:
      hdcs domain set east --memory-overcommit 1.5 --placement pack
      hdcs domain set east --max-starts 16
      hdcs domain set east --default memory-overcommit
    """
    output.print_one(face.cloud.domain_nodes.set(name, **changes(options, defaults)), form)


@domain.command()
@click.argument("name")
@format_option
@pass_face
def token(face: Face, name: str, form: str) -> None:
    """Replace a domain node's join token and print the new one.

    Server nodes that are in stay in; the old token admits nobody any more.

    \b
    Examples:
      hdcs domain token east > join-token
    """
    new = face.cloud.domain_nodes.new_token(name)
    if form == "table":
        click.echo(new)
    else:
        output.print_one({"name": name, "token": new}, form)


@domain.command()
@click.argument("name")
@drain_options
@wait_options
@pass_face
def drain(
    face: Face, /, name: str, dry_run: bool, wait: bool, timeout_s: float | None, form: str, **options: Any
) -> None:
    """Empty a domain node: all its VMs, stopped ones too, move to other domain nodes.

    Running VMs move live with their own disk layer, the others' files are copied; images they stand on are brought
    once. What cannot be moved stays and is named with its reason. It stays closed until `hdcs domain resume`.

    \b
    Examples:
      hdcs domain drain east --dry-run
      hdcs domain drain east --bandwidth-mib-s 200 --no-wait
    """
    if dry_run:
        plans.conclude(face.cloud.domain_nodes.drain(name, dry_run=True).explain(), form)
        return
    waiting.conclude([face.cloud.domain_nodes.drain(name, **options)], form=form, wait=wait, timeout_s=timeout_s)


@domain.command()
@click.argument("name")
@format_option
@pass_face
def resume(face: Face, name: str, form: str) -> None:
    """Open a domain node's server nodes again; a drain under way begins no more moves.

    \b
    Examples:
      hdcs domain resume east
    """
    output.print_one(face.cloud.domain_nodes.resume(name), form)
