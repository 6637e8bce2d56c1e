"""What is read from ``ss``: which connections carry a move, and for how long nothing was heard on them."""

from __future__ import annotations

import pytest

from hdcs_tasks.hypervisor.streams import Stream, read

QEMU = 'users:(("qemu-system-x86",pid=133,fd=24),("libvirtd",pid=24,fd=36))'


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            f"ESTAB 0 0 10.0.0.1:56998 10.0.0.3:49152 {QEMU} ts sack lastsnd:5 lastrcv:56584 lastack:21000 x:1",
            [Stream("10.0.0.1:56998", "10.0.0.3:49152", (133, 24), 21.0)],
        ),
        (
            f"ESTAB 0 0 [fd00::1]:40000 [fd00::3]:49153 {QEMU} timer:(on,1sec,2) lastsnd:9 lastack:30000 x:1",
            [Stream("[fd00::1]:40000", "[fd00::3]:49153", (133, 24), 0.0)],
        ),
        (f"ESTAB 0 0 10.0.0.1:49152 10.0.0.3:40000 {QEMU} lastrcv:56584 lastack:56584", []),
        (f"ESTAB 0 0 10.0.0.1:49152 10.0.0.3:49160 {QEMU} lastrcv:56584 lastack:56584", []),
        (f"ESTAB 0 0 10.0.0.1:5900 10.0.0.3:40000 {QEMU} lastrcv:56584 lastack:56584", []),
        ("FIN-WAIT-1 0 1 10.0.0.1:56998 10.0.0.3:49152 timer:(on,1sec,2) lastrcv:99 lastack:99", []),
    ],
)
def test_a_connection_to_a_target_and_its_silence(line: str, found: list[Stream]) -> None:
    assert read(line + "\n") == found
