"""What a device is in use for, by the kernel's tables."""

from __future__ import annotations

from hdcs_tasks.hypervisor.devices import mounted

MOUNTINFO = """\
22 27 0:21 / /proc rw,nosuid shared:12 - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
95 27 8:17 /sub /srv/with\\040space rw,relatime shared:48 - ext4 /dev/sdb1 rw
96 27 8:1 /other /mnt/again rw - ext4 /dev/sda1 rw
"""


def test_a_disk_with_a_mounted_partition_is_mounted() -> None:
    assert list(mounted(MOUNTINFO, {"8:16": "sdb", "8:17": "sdb1"})) == ["sdb1 is mounted on /srv/with\\040space"]


def test_a_partition_mounted_twice_is_told_twice_and_a_disk_of_a_like_number_is_not_meant() -> None:
    told = list(mounted(MOUNTINFO, {"8:0": "sda", "8:1": "sda1"}))
    assert told == ["sda1 is mounted on /", "sda1 is mounted on /mnt/again"]
    assert list(mounted(MOUNTINFO, {"8:2": "sda2", "18:1": "x"})) == []
