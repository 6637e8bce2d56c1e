"""Moves between domain nodes, step by step on the server nodes: the VM's own disk layer travels with it or before it.

Live: an empty overlay on the image is made at the target, libvirt copies the source's layer into it while the guest
runs (its dirty bitmaps too), then its memory. Carried: the files of a VM that does not run are copied, checked by hash.
At the source they are removed once the VM is seen at the target.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hdcs_tasks.errors import Conflict, HdcsError, HypervisorRefused, NotFound, Rejected
from hdcs_tasks.hypervisor import disks, migration, networks, storage
from hdcs_tasks.hypervisor.checkpoints import keep_checkpoints, redefine_checkpoints
from hdcs_tasks.hypervisor.connection import Host, peer_of
from hdcs_tasks.hypervisor.errors import is_storage_full
from hdcs_tasks.hypervisor.keys import KeyRing, give_to_libvirt
from hdcs_tasks.logs import logger
from hdcs_tasks.operations.node import HandOver, Run
from hdcs_tasks.pool import node_files
from hdcs_tasks.vm import node_migrate
from hdcs_tasks.vm.node import (
    CHECKPOINTS,
    OPEN,
    image_path,
    layout,
    lock,
    release,
    remove_folder,
    saved_memory,
)
from hdcs_tasks.vm.node_address import give_address
from hdcs_tasks.vm.node_start import choose, decision, noted, place_request

log = logger(__name__)


def prepare(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target: claim capacity, IP and a port of this domain node; DHCP host; an empty overlay on the image."""
    ctx = run.ctx
    placed = choose(run, place_request(run, spec, spec["vm_id"], start_s=0))
    if placed.node != ctx.server_node:
        raise HandOver(placed.node, noted(spec, placed))
    place = layout(ctx)
    with lock(ctx, spec["vm_id"]):
        run.check()
        allocated = _make_room(run, spec, place)
        give_address(ctx, spec["mac"], placed.ip, spec["name"])
    return {
        "node": placed.node, "ip": placed.ip, "port": placed.port, "address": ctx.settings.server_node_ip,
        "root": str(place.root), "listen": ctx.settings.console_listen, "overlay_bytes": allocated,
        "decision": decision(run, spec, placed),
    }  # fmt: skip


def _make_room(run: Run, spec: dict[str, Any], place: storage.StorageLayout) -> int:
    """The empty overlay the guest's layer is copied into; how many bytes that layer takes at its source.

    What lies there under the VM's id is older: its guest is seen at the source.
    """
    ctx = run.ctx
    with Host.open(peer_of(ctx.settings, spec["source"]["ip"])) as source:
        virtual, allocated = migration.disk_sizes(source, spec["vm_id"])
    folder = place.vm_dir(spec["vm_id"])
    remove_folder(folder)
    node_files.check_space(place, allocated, ctx.domain_node)
    run.check()
    folder.mkdir(mode=0o711)
    image = spec.get("image")
    disk = place.disk(spec["vm_id"])
    if image is None:
        disks.create_blank(disk, virtual, attempt=str(run.attempt))
    else:
        base = image_path(place, image["name"], image["version"])
        if not base.is_file():
            raise NotFound(
                f"image {image['name']}:{image['version']} is not in the storage of {ctx.domain_node}",
                next=f"Bring it there: hdcs image copy {image['name']}:{image['version']} {ctx.domain_node}",
            )
        key = KeyRing.of(ctx.settings).find(spec.get("disk_key"))
        give_to_libvirt(ctx.host(), key)
        disks.create_overlay(
            base, disk, size_bytes=virtual, base_format="qcow2", key=key, attempt=str(run.attempt)
        )  # fmt: skip
    (folder / OPEN).touch()
    return allocated


def perform(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the source: move the running guest with its own layer. Where it is gone already, an earlier attempt did."""
    ctx, target = run.ctx, spec["target"]
    if spec["source"]["name"] != ctx.server_node:
        raise HandOver(spec["source"]["name"], spec)
    place = layout(ctx)
    _same_root(place, target["root"])
    with lock(ctx, spec["vm_id"]):
        kept = _checkpoints(place, spec["vm_id"])
        if node_migrate.has_left(run, spec):
            return node_migrate.UNSEEN | {"checkpoints": kept}
        run.check()
        try:
            done = migration.migrate_with_storage(
                ctx.host(), spec["vm_id"], console_port=target["port"], console_listen=target["listen"],
                **node_migrate.terms(run, spec),
            )  # fmt: skip
        except (NotFound, Conflict, HypervisorRefused) as error:
            if node_migrate.has_left(run, spec):
                return node_migrate.UNSEEN | {"checkpoints": kept}
            raise _told(error, target) from error
    log.info("moved", vm=spec["name"], to=target["node"], downtime_ms=done.downtime_ms, bytes=done.bytes)
    return node_migrate.measured(done) | {"checkpoints": kept}


def _told(error: HdcsError, target: dict[str, Any]) -> HdcsError:
    """Of a storage that ran full under the copy libvirt tells, not whose it is: only the target's is written to."""
    if not is_storage_full(error):
        return error
    return HypervisorRefused(
        f"the storage of domain node {target['domain_node']} is full: {error.message}",
        next="Delete VMs, images or backups there, or add storage. The guest runs on at its source",
        details=error.details,
    )


def _same_root(place: storage.StorageLayout, there: str) -> None:
    """A guest's definition, its overlay and its saved memory name absolute paths."""
    if str(place.root) != there:
        raise Rejected(
            f"the storage is at {place.root} here and at {there} in the other domain node",
            next="Moves between domain nodes need one HDCS_STORAGE_ROOT everywhere",
        )


def _checkpoints(place: storage.StorageLayout, vm_id: str) -> list[str]:
    file = place.vm_dir(vm_id) / CHECKPOINTS
    try:
        found: list[str] = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return []
    return found


def finish(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target: the guest runs here. Its backup chain stays where it is, so the bitmaps that came with it go."""
    with lock(run.ctx, spec["vm_id"]):
        if not node_migrate.see_it_here(run, spec).active:
            return {"network": node_migrate.ENDED}
        run.check()
        node_migrate.take_over(run, spec)
        bitmaps = _forget_points(run, spec)
        network = node_migrate.renew(run, spec)
        return {"network": network, "bitmaps": bitmaps} | node_migrate.figures(run.ctx, spec)


def _forget_points(run: Run, spec: dict[str, Any]) -> str:
    """The next backup here is a full one; a bitmap of a point that lies elsewhere only costs write speed."""
    host, vm_id = run.ctx.host(), spec["vm_id"]
    try:
        redefine_checkpoints(host, vm_id, spec.get("checkpoints", []))
        keep_checkpoints(host, vm_id)
    except HdcsError as error:
        log.warning("bitmaps of older backups not removed", vm=vm_id, error=str(error))
        return f"left: {error.message}"
    return "removed" if spec.get("checkpoints") else "none"


def clean(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the source, once the guest is seen at the target: what the VM held here is given back, its files go."""
    ctx = run.ctx
    place = layout(ctx)
    with lock(ctx, spec["vm_id"]):
        node_migrate.leave(run, spec)
        _remove_files(place, spec["vm_id"])
        release(ctx, spec["vm_id"], spec["mac"])
    return {"node": ctx.server_node}


def undo(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """On the target, after a move that did not happen: no guest, file, claim, port or address of the VM stays here."""
    ctx = run.ctx
    place = layout(ctx)
    with lock(ctx, spec["vm_id"]):
        if not node_migrate.take_back(run, spec):
            return {"node": ctx.server_node, "held_by": "target"}
        _remove_files(place, spec["vm_id"])
        networks.remove_dhcp_host(ctx.host(), ctx.settings.network_name, spec["mac"])
        ctx.reservations.pool.release(
            ctx.domain_node, spec["vm_id"], ctx.server_node, ctx.settings.dhcp_lease_s, ctx.settings.port_cooling_s
        )  # fmt: skip
    return {"node": ctx.server_node, "held_by": "source"}


def _remove_files(place: storage.StorageLayout, vm_id: str) -> None:
    remove_folder(place.vm_dir(vm_id))
    saved_memory(place, vm_id).unlink(missing_ok=True)


def offer(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """At the source: hash the files of a VM that does not run."""
    with lock(run.ctx, spec["vm_id"]):
        run.check()
        return node_files.offer(run, spec) | {"root": str(layout(run.ctx).root)}


def fetch(run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """At the target: bring them. A file there of that name and another content is older: the record has the VM there
    not."""
    place = layout(run.ctx)
    _same_root(place, spec["root"])
    with lock(run.ctx, spec["vm_id"]):
        for file in spec["files"]:
            run.check()
            _drop_older(node_files.local_path(place, file["path"]), file)
        return node_files.fetch(run, spec)


def _drop_older(target: Path, file: dict[str, Any]) -> None:
    if target.exists() and (target.stat().st_size != file["size_bytes"] or disks.sha256(target) != file["sha256"]):
        target.unlink()
