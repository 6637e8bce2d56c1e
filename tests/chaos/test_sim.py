"""A slice of the simulated histories; and the proof that the judge sees what is broken."""

from __future__ import annotations

import pytest
from sqlalchemy import event

from hdcs_tasks.operations.node import Run
from hdcs_tasks.store.models import Operation
from tests.chaos.sim.center import Ground
from tests.chaos.sim.history import History
from tests.chaos.sim.run import histories, replay

SEEDS = 1000
ENOUGH = 400
"""A broken guard shows within so many histories."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("sim"))


def first_violation(ground: Ground, *kinds: str) -> str | None:
    for seed in range(1, ENOUGH + 1):
        for found in History(ground, seed).run().kernel.violations:
            if found["what"] in kinds:
                return f"seed {seed}: {found}"
    return None


@pytest.mark.timeout(900)
def test_a_thousand_histories_without_a_violation() -> None:
    result = histories(1, SEEDS, processes=2)
    assert result["histories"] == SEEDS
    assert result["violations"] == []
    assert set(result["faults"]) >= {
        "crash control", "crash node", "message lost", "message doubled", "message late", "Redis wiped",
        "Redis restarted, its last second lost", "server node lost", "stopped past its lease",
        "libvirtd killed in a hand-over",
    }  # fmt: skip


def test_a_seed_tells_the_same_history_each_time() -> None:
    once = replay(18)
    assert len(once) > 20
    assert once == replay(18)


@pytest.mark.timeout(600)
def test_without_the_fence_check_a_side_effect_is_seen(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "check", lambda self: None)
    assert first_violation(ground, "side effect without a claim", "VM runs twice", "guest without a record")


@pytest.mark.timeout(600)
def test_without_one_live_operation_per_vm_the_record_breaks(ground: Ground) -> None:
    def forget(mapper: object, connection: object, operation: Operation) -> None:
        operation.live_vm = None  # what the unique column, and whoever asks for it, goes by

    event.listen(Operation, "before_insert", forget)
    event.listen(Operation, "before_update", forget)
    try:
        found = first_violation(
            ground, "record is not the world", "VM stuck", "VM runs twice", "not settled", "claim leaked", "claim lost",
            "unforeseen error",
        )  # fmt: skip
    finally:
        event.remove(Operation, "before_insert", forget)
        event.remove(Operation, "before_update", forget)
    assert found
