"""Growing the disk of a running guest: QEMU tells the guest, which grows its file system itself."""

from __future__ import annotations

import libvirt

from hdcs_tasks.errors import Invalid
from hdcs_tasks.hypervisor.checkpoints import DISK_TARGET
from hdcs_tasks.hypervisor.connection import Host
from hdcs_tasks.hypervisor.errors import libvirt_errors


def grow_running(host: Host, vm_id: str, size_bytes: int) -> bool:
    """Make the disk ``size_bytes`` large; False if it was. Raises Invalid (it would shrink), NotFound, WrongState."""
    guest = host.guest(vm_id)
    with libvirt_errors(f"grow the disk of guest {vm_id}"):
        present = int(guest.blockInfo(DISK_TARGET)[0])
        if size_bytes < present:
            raise Invalid(
                f"the disk has {present} bytes; {size_bytes} would cut data off", next="Only growing is possible"
            )
        if size_bytes == present:
            return False
        guest.blockResize(DISK_TARGET, size_bytes, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    return True
