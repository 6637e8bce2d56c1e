"""Admission: the bound stays between floor and ceiling, falls under load, comes back, and one slow VM moves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.pool.admission_rules import Bound, Measured, next_bound, shortage
from hdcs_tasks.pool.node_admission import pressure, synced_write_ms

CALM = Measured(cpu_pressure=5.0, memory_pressure=0.0, storage_ms=2.0)
BUSY = Measured(cpu_pressure=95.0)


def after(bound: Bound, seen: Measured, looks: int, floor: int = 4, ceiling: int = 64) -> Bound:
    for _ in range(looks):
        bound = next_bound(bound, seen, floor=floor, ceiling=ceiling)
    return bound


def test_it_is_halved_under_load_and_then_left_to_settle() -> None:
    assert after(Bound(64), BUSY, 1).starts == 32
    assert after(Bound(64), BUSY, 4).starts == 32  # pressures are averages over ten seconds
    assert after(Bound(64), BUSY, 5).starts == 16
    assert after(Bound(64), BUSY, 100).starts == 4
    assert after(Bound(4), BUSY, 1).why == "CPU pressure 95 %: at its floor"


def test_it_comes_back_step_by_step() -> None:
    assert after(Bound(4), CALM, 1).starts == 11
    assert after(Bound(4), CALM, 9) == Bound(64, "calm: at its ceiling")


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (Measured(memory_pressure=50.0), "memory pressure 50 %"),
        (Measured(storage_ms=900.0), "a synced write takes 900 ms"),
        (Measured(boots_s=[60.0, 61.0, 70.0]), "boots take 61 s instead of 10 s"),
    ],
)
def test_why(seen: Measured, words: str) -> None:
    assert shortage(seen, usual_boot_s=10.0) == words


def test_one_slow_vm_tells_nothing() -> None:
    assert shortage(Measured(boots_s=[10.0, 11.0, 600.0, 12.0, 11.0]), 10.0) == ""
    assert shortage(Measured(boots_s=[600.0]), 10.0) == ""


def test_the_usual_boot_is_learnt_and_slowly_forgotten() -> None:
    bound = after(Bound(8), Measured(boots_s=[5.0, 5.0, 5.0]), 1)
    assert bound.usual_boot_s == 5.0
    assert 5.0 < after(bound, Measured(boots_s=[14.0] * 3), 5).usual_boot_s < 6.0
    assert after(bound, Measured(boots_s=[14.0] * 3), 500).usual_boot_s == 14.0


measures = st.builds(
    Measured, st.none() | st.floats(0, 100), st.none() | st.floats(0, 100), st.none() | st.floats(0, 5000),
    st.lists(st.floats(0.1, 600), max_size=6),
)  # fmt: skip


@given(st.integers(0, 100), st.integers(0, 50), st.integers(0, 100), st.lists(measures, max_size=30))
def test_it_never_leaves_its_span(start: int, floor: int, ceiling: int, looks: list[Measured]) -> None:
    bound = Bound(start)
    for seen in looks:
        before = bound
        bound = next_bound(bound, seen, floor=floor, ceiling=ceiling)
        assert max(1, min(floor, ceiling)) <= bound.starts <= max(1, ceiling)
        if not shortage(seen, bound.usual_boot_s) and before.starts <= max(1, ceiling):
            assert bound.starts >= min(before.starts, max(1, ceiling))


def test_pressure_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    (tmp_path / "cpu").write_text("some avg10=12.34 avg60=1.00 avg300=0.10 total=99\nfull avg10=0.00\n")
    assert pressure("cpu", tmp_path) == 12.34
    assert pressure("memory", tmp_path) is None
    (tmp_path / "io").write_text("")
    assert pressure("io", tmp_path) is None


def test_a_storage_that_cannot_be_written_tells_nothing(tmp_path: Path) -> None:
    assert synced_write_ms(tmp_path) is None
    (tmp_path / "state").mkdir()
    assert (synced_write_ms(tmp_path) or 0) > 0
    assert list((tmp_path / "state").iterdir()) == []
