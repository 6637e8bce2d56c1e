"""``hdcs vm start|stop|…``: what is done to several VMs at once, by name or selector."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hdcs_tasks.cli import output, plans, waiting
from hdcs_tasks.cli.options import (
    DURATION,
    SELECTOR_KEYS,
    SIZE,
    F,
    Face,
    Selection,
    confirm,
    format_option,
    key_option,
    named,
    pass_face,
    reason_option,
    select,
    selector_options,
    wait_options,
    yes_option,
)

if TYPE_CHECKING:
    from hdcs_tasks.cloud import Operation, Vm


def _common(command: F) -> F:
    return selector_options(reason_option(key_option(wait_options(command))))


def _give(
    face: Face, chosen: Selection, ask: Callable[[Vm, dict[str, Any]], Operation], *, reason: str, key: str | None,
    wait: bool, timeout_s: float | None, form: str,
) -> None:  # fmt: skip
    """Give a command to each chosen VM. ``ask`` gets the VM, and who-why-key as the cloud's calls take them."""

    def one(name: str, vm_key: str | None) -> Operation:
        return ask(face.cloud.vms[name], {"reason": reason, "idempotency_key": vm_key})

    waiting.act(chosen, one, key=key, form=form, wait=wait, timeout_s=timeout_s)


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """Of a command's options, those ``_give`` takes."""
    return {key: options[key] for key in ("reason", "key", "wait", "timeout_s", "form")}


def _chosen(face: Face, verb: str, options: dict[str, Any]) -> Selection:
    selector = {key: options[key] for key in SELECTOR_KEYS}
    return select(face, verb, options["names"], options["every"], selector)


@click.command()
@click.argument("name", metavar="VM")
@click.argument("new", metavar="NEW_NAME")
@format_option
@pass_face
def rename(face: Face, name: str, new: str, form: str) -> None:
    """Give a stopped VM another name; id, MAC, disk and backups stay its own.

    \b
    Examples:
      hdcs vm rename desk-001 anna
    """
    output.print_one(face.cloud.vms[name].rename(new).show(), form)


@click.command()
@_common
@click.option("--disk", "disk_bytes", type=SIZE, required=True, help="How large it is to be, e.g. 40GiB.")
@pass_face
def grow(face: Face, /, disk_bytes: int, **options: Any) -> None:
    """Grow the disks of VMs, running or stopped; the guest grows its own file system.

    \b
    Examples:
      hdcs vm grow desk-001 --disk 40GiB
    """
    chosen = _chosen(face, "grow", options)
    _give(face, chosen, lambda vm, asked: vm.grow(disk_bytes, **asked), **_asked(options))


@click.command()
@_common
@click.option("--on", "pin", default=None, metavar="SERVER_NODE", help="On this server node (one VM only).")
@click.option("--dry-run", is_flag=True, help="Print where they would start, and why not elsewhere; change nothing.")
@pass_face
def start(face: Face, /, pin: str | None, dry_run: bool, **options: Any) -> None:
    """Start VMs. Several are one operation with a child per VM.

    \b
    Examples:
      hdcs vm start desk-001
      hdcs vm start desk-001 --on node2
      hdcs vm start --home east --no-wait
      hdcs vm start --tag lab --dry-run
      hdcs vm start --all --reason 'Monday morning'
    """
    chosen = _chosen(face, "start", options)
    if dry_run and chosen.one:
        plans.conclude(face.cloud.vms[chosen.names[0]].start(node=pin, dry_run=True).explain(), options["form"])
        return
    if chosen.one:
        _give(face, chosen, lambda vm, asked: vm.start(node=pin, **asked), **_asked(options))
        return
    if pin is not None:
        raise click.UsageError("--on takes exactly one VM.")
    if not chosen.names:
        waiting.nothing(options["form"])
        return
    if dry_run:
        plans.conclude(face.cloud.vms.start_all(chosen.names, dry_run=True).explain(), options["form"])
        return
    operation = face.cloud.vms.start_all(
        chosen.names, idempotency_key=options["key"], reason=options["reason"], chosen_by=chosen.chosen_by
    )
    waiting.conclude([operation], form=options["form"], wait=options["wait"], timeout_s=options["timeout_s"], one=False)


@click.command()
@_common
@click.option("--force", is_flag=True, help="Switch off at once, also what a backup or migration holds.")
@click.option("--grace", "grace_s", type=DURATION, default="60s", show_default=True,
              help="How long the guest may take to shut down.")  # fmt: skip
@yes_option
@pass_face
def stop(face: Face, /, force: bool, grace_s: float, yes: bool, **options: Any) -> None:
    """Shut VMs down.

    \b
    Examples:
      hdcs vm stop desk-001
      hdcs vm stop --tag lab --grace 5m
      hdcs vm stop desk-001 --force -y
    """
    chosen = _chosen(face, "stop", options)
    if force and chosen.names:
        confirm(f"Switch off {named(chosen.names)} at once? Unsaved work is lost.", yes)
    _give(face, chosen, lambda vm, asked: vm.stop(force=force, timeout_s=grace_s, **asked), **_asked(options))


@click.command()
@_common
@pass_face
def suspend(face: Face, /, **options: Any) -> None:
    """Halt VMs where they are; they keep their memory on the server node.

    \b
    Examples:
      hdcs vm suspend desk-001
    """
    _give(face, _chosen(face, "suspend", options), lambda vm, asked: vm.suspend(**asked), **_asked(options))


@click.command()
@_common
@pass_face
def resume(face: Face, /, **options: Any) -> None:
    """Let suspended VMs run on.

    \b
    Examples:
      hdcs vm resume desk-001
      hdcs vm resume --node node1
    """
    _give(face, _chosen(face, "resume", options), lambda vm, asked: vm.resume(**asked), **_asked(options))


@click.command()
@_common
@click.option("--force", is_flag=True, help="Reset, as by the button: the guest is not asked.")
@yes_option
@pass_face
def reboot(face: Face, /, force: bool, yes: bool, **options: Any) -> None:
    """Restart the guests of running VMs.

    \b
    Examples:
      hdcs vm reboot desk-001
      hdcs vm reboot desk-001 --force -y
    """
    chosen = _chosen(face, "reboot", options)
    if force and chosen.names:
        confirm(f"Reset {named(chosen.names)}? Unsaved work is lost.", yes)
    _give(face, chosen, lambda vm, asked: vm.reboot(force=force, **asked), **_asked(options))


@click.command()
@_common
@pass_face
def save(face: Face, /, **options: Any) -> None:
    """Write VMs' memory to storage and free their server node; `hdcs vm restore` brings them back.

    \b
    Examples:
      hdcs vm save desk-001
      hdcs vm save --owner alice --state running
    """
    _give(face, _chosen(face, "save", options), lambda vm, asked: vm.save(**asked), **_asked(options))


@click.command()
@_common
@pass_face
def restore(face: Face, /, **options: Any) -> None:
    """Bring saved VMs back, as they were.

    \b
    Examples:
      hdcs vm restore desk-001
    """
    _give(face, _chosen(face, "restore", options), lambda vm, asked: vm.restore(**asked), **_asked(options))


@click.command()
@_common
@yes_option
@pass_face
def delete(face: Face, /, yes: bool, **options: Any) -> None:
    """Delete VMs with their disks; their backups stay. A running guest is switched off.

    \b
    Examples:
      hdcs vm delete desk-001
      hdcs vm delete --tag lab -y
    """
    chosen = _chosen(face, "delete", options)
    if chosen.names:
        confirm(f"Delete {named(chosen.names)} with their disks?" if len(chosen.names) > 1
                else f"Delete {named(chosen.names)} with its disk?", yes)  # fmt: skip
    _give(face, chosen, lambda vm, asked: vm.delete(**asked), **_asked(options))


COMMANDS = (rename, grow, start, stop, suspend, resume, reboot, save, restore, delete)
