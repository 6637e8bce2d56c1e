"""``hdcs warm``: warm pools, desktops that are kept ready."""

from __future__ import annotations

import click

from hdcs_tasks.cli import output
from hdcs_tasks.cli.options import Face, delete_records, format_option, pass_face, yes_option

COLUMNS = (
    output.Column("name"), output.Column("image"), output.Column("profile"),
    output.Column("domain_node", "domain node"), output.Column("kept"), output.Column("size"), output.Column("ready"),
)  # fmt: skip


@click.group()
def warm() -> None:
    """Warm pools: desktops kept ready, for `hdcs vm clone --warm`."""


@warm.command()
@click.argument("name")
@click.option("--image", required=True, help="Of its newest version; a new version replaces them.")
@click.option("--size", type=click.IntRange(0, 1000), required=True, help="How many are kept ready.")
@click.option("--profile", default="small", show_default=True, help="Their hardware shape.")
@click.option("--domain-node", default=None, help="Where. Default: where they fit best.")
@click.option("--saved/--started", default=False, show_default=True,
              help="With their memory saved: no room on a server node, a start in about a second.")  # fmt: skip
@format_option
@pass_face
def create(
    face: Face, name: str, image: str, size: int, profile: str, domain_node: str | None, saved: bool, form: str
) -> None:
    """Keep desktops ready. What is taken is made anew.

    \b
    Examples:
      hdcs warm create lab --image mini --size 5
      hdcs warm create office --image office --profile large --size 3 --saved --domain-node east
    """
    found = face.cloud.warm_pools.create(
        name, image=image, size=size, profile=profile, saved=saved, domain_node=domain_node
    )
    output.print_one(found, form)


@warm.command("list")
@format_option
@pass_face
def list_(face: Face, form: str) -> None:
    """List the warm pools.

    \b
    Examples:
      hdcs warm list
    """
    output.print_rows(face.cloud.warm_pools.list(), COLUMNS, form)


@warm.command()
@click.argument("name")
@format_option
@pass_face
def show(face: Face, name: str, form: str) -> None:
    """Show one warm pool with its desktops.

    \b
    Examples:
      hdcs warm show lab -f json
    """
    output.print_one(face.cloud.warm_pools.show(name), form)


@warm.command("set")
@click.argument("name")
@click.option("--size", type=click.IntRange(0, 1000), default=None, help="How many are kept ready.")
@click.option("--saved/--started", default=None, help="How they are kept.")
@format_option
@pass_face
def set_(face: Face, name: str, size: int | None, saved: bool | None, form: str) -> None:
    """Change a warm pool; desktops too many are deleted.

    \b
    Examples:
      hdcs warm set lab --size 10
    """
    if size is None and saved is None:
        raise click.UsageError("Nothing to change: give --size, --saved or --started.")
    output.print_one(face.cloud.warm_pools.set(name, size=size, saved=saved), form)


@warm.command()
@click.argument("name")
@yes_option
@format_option
@pass_face
def delete(face: Face, name: str, yes: bool, form: str) -> None:
    """Delete a warm pool with its desktops; those that were taken stay.

    \b
    Examples:
      hdcs warm delete lab -y
    """
    told = ", and its desktops are on their way out"
    delete_records(
        "warm pool",
        [name],
        lambda each: face.cloud.warm_pools.delete(each),
        yes,
        form,
        ask=" with its desktops",
        told=told,
    )
