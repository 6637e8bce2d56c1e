"""How long before the time a storm begins."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.vm.storm_rules import FIRST_BOOT_S, LEAD_MAX_S, Pace, lead_s, slow_boot_s


def test_a_slow_boot_is_what_nine_in_ten_do_not_exceed() -> None:
    assert slow_boot_s([]) == FIRST_BOOT_S
    assert slow_boot_s([7.0]) == 7.0
    assert slow_boot_s([float(n) for n in range(1, 11)]) == 9.0


def test_the_lead() -> None:
    assert lead_s(0, Pace()) == 0
    assert lead_s(8, Pace(boots_s=[20.0], at_once=8)) == 20 * 1.25 + 30
    assert lead_s(9, Pace(boots_s=[20.0], at_once=8)) == 40 * 1.25 + 30
    # A measured run goes before the estimate, scaled to the number.
    assert lead_s(60, Pace(boots_s=[20.0], at_once=60, last_count=30, last_s=100.0)) == 200 * 1.25 + 30
    assert lead_s(10**6, Pace()) == LEAD_MAX_S


@given(st.integers(1, 500), st.integers(1, 64), st.lists(st.floats(0.1, 600), max_size=50))
def test_more_desktops_never_begin_later(count: int, at_once: int, boots: list[float]) -> None:
    pace = Pace(boots, at_once)
    assert 0 < lead_s(count, pace) <= lead_s(count + 1, pace) <= LEAD_MAX_S
