"""Learning-rate schedules."""

from __future__ import annotations

import pytest

from runs.recipes import schedules
from runs.schemas.recipes import ScheduleName


def rates(schedule: ScheduleName, *, num_steps: int, warmup_share: float = 0.0) -> list[float]:
    return [
        schedules.learning_rate(
            step, peak=1.0, num_steps=num_steps, schedule=schedule, warmup_share=warmup_share
        )
        for step in range(num_steps)
    ]


def test_constant_stays_at_its_peak() -> None:
    assert rates("constant", num_steps=4) == [1.0, 1.0, 1.0, 1.0]


def test_linear_falls_in_equal_parts_and_would_reach_zero_after_the_end() -> None:
    assert rates("linear", num_steps=4) == [1.0, 0.75, 0.5, 0.25]


def test_cosine_falls_slowly_at_both_ends() -> None:
    assert rates("cosine", num_steps=4) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_it_rises_to_the_peak_in_the_warm_up(schedule: ScheduleName) -> None:
    warm = rates(schedule, num_steps=100, warmup_share=0.04)

    assert warm[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert max(warm) == 1.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_runs_train_with_a_positive_rate(schedule: ScheduleName, num_steps: int) -> None:
    assert all(rate > 0 for rate in rates(schedule, num_steps=num_steps, warmup_share=1.0))


def test_a_step_after_the_end_has_the_last_rate() -> None:
    late = schedules.learning_rate(9, peak=1.0, num_steps=4, schedule="linear", warmup_share=0.0)

    assert late == 0.25
