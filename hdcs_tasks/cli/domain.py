"""``hdcs domain``: domain nodes, each a resource pool with its own storage."""

from __future__ import annotations

from dataclasses import asdict

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.options import Face, format_option, pass_face

COLUMNS = (
    output.Column("name"), output.Column("server_nodes", "server nodes"),
    output.Column("storage_primary", "storage primary"), output.Column("vcpus"), output.Column("free_vcpus", "free"),
    output.column("memory_mib"), output.column("free_memory_mib", "free"), output.Column("ports_free", "ports free"),
    output.column("storage_free_bytes"), output.column("disk_promised_bytes"),
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
