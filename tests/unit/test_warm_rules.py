"""What a warm pool needs next: it always comes to rest with as many ready desktops as it should have."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hdcs_tasks.states import VmState
from hdcs_tasks.vm.warm_rules import Member, is_ready, plan

members = st.lists(
    st.builds(
        Member, st.just(""), st.booleans(),
        st.sampled_from([VmState.RUNNING, VmState.SAVED, VmState.STOPPED, VmState.FAILED, VmState.SUSPENDED,
                         VmState.CREATING]),
        st.booleans(), st.booleans(),
    ),
    max_size=8,
).map(lambda found: [replace(m, vm=f"v{i}") for i, m in enumerate(found)])  # fmt: skip


def done(pool: list[Member], size: int, saved: bool) -> list[Member]:
    """The pool after its plan was carried out, and what was at work has ended."""
    wanted = plan(pool, size=size, saved=saved)
    after = []
    for m in pool:
        if m.vm in wanted.delete:
            continue
        if m.vm in wanted.start or m.state is VmState.CREATING:
            m = replace(m, state=VmState.RUNNING)
        elif m.vm in wanted.save:
            m = replace(m, state=VmState.SAVED)
        after.append(replace(m, busy=False, answers=True))
    return after + [Member(f"n{len(pool)}-{i}", True, VmState.RUNNING, True, False) for i in range(wanted.clone)]


@given(members, st.integers(0, 6), st.booleans())
def test_it_comes_to_rest_with_as_many_as_it_should(pool: list[Member], size: int, saved: bool) -> None:
    for _ in range(6):
        pool = done(pool, size, saved)
    assert plan(pool, size=size, saved=saved) == (0, (), (), ())
    assert len(pool) == size
    assert all(is_ready(m, saved) for m in pool)


@given(members, st.integers(0, 6), st.booleans())
def test_what_is_at_work_is_left_alone(pool: list[Member], size: int, saved: bool) -> None:
    wanted = plan(pool, size=size, saved=saved)
    touched = {*wanted.start, *wanted.save, *wanted.delete}
    assert not touched & {m.vm for m in pool if m.busy}
    assert len([*wanted.start, *wanted.save, *wanted.delete]) == len(touched)
