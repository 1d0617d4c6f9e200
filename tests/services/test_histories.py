"""The past of a chart: how it is smoothed, and that reading one metric costs nothing of the others."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from django.db import connection
from hypothesis import given
from hypothesis import strategies as st

from runs.services import histories, metrics
from runs.services.histories import Smoothing
from tests.pages import seed

# As long runs leave them: the values of a step beside each other.
_FILL = """
INSERT INTO runs_metric (run_id, seq, name, step, value) SELECT %s, step, name, step, 1
FROM generate_series(1, 4000) step CROSS JOIN unnest(ARRAY['loss', 'grad_norm', 'learning_rate', 'tokens', 'reward']) name
"""
VALUES = st.lists(
    st.tuples(st.integers(0, 400), st.sampled_from([math.nan, math.inf, -math.inf]) | st.floats(-1e6, 1e6))
)


def smoothed_one_by_one(
    steps: list[int], values: list[float], *, weight: float
) -> tuple[list[float], Smoothing]:
    """Return the same as `histories.smoothed`, by its definition."""
    numerator, denominator, last = 0.0, 0.0, steps[0] if steps else 0
    result = []
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            decay = weight ** (step - last)
            numerator, denominator, last = numerator * decay + value, denominator * decay + 1.0, step
        result.append(numerator / denominator if denominator else math.nan)
    return result, Smoothing(numerator=numerator, denominator=denominator, step=last)


@given(listed=VALUES, weight=st.sampled_from([0.0, 0.5, 0.6, 0.99]), gap=st.sampled_from([1, 1000]))
def test_smoothing_is_as_it_is_defined(listed: list[tuple[int, float]], weight: float, gap: int) -> None:
    steps = sorted(step * gap for step, _ in listed)
    values = [value for _, value in listed]
    smooth, state = histories.smoothed(np.array(steps, dtype=np.int64), np.array(values), weight=weight)
    expected, end = smoothed_one_by_one(steps, values, weight=weight)
    assert smooth.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-6, nan_ok=True)
    assert state.step == end.step
    assert state.numerator == pytest.approx(end.numerator, rel=1e-9, abs=1e-6)
    assert state.denominator == pytest.approx(end.denominator, rel=1e-9)


def test_a_long_run_is_smoothed_as_a_short_one_is() -> None:
    steps = np.arange(50_000)
    values = np.cos(steps / 50)
    for weight in (0.0, 0.6, 0.99, 0.9999):
        smooth, state = histories.smoothed(steps, values, weight=weight)
        expected, end = smoothed_one_by_one(steps.tolist(), values.tolist(), weight=weight)
        np.testing.assert_allclose(smooth, expected, rtol=0, atol=1e-12)
        assert state.denominator == pytest.approx(end.denominator, rel=1e-9)


@pytest.mark.django_db
def test_times_are_those_that_are_stored() -> None:
    run = seed.make_run(seed.make_user())
    seed.add_values(run, seed.curve(30), step_s=0.123457)
    past = histories.history(run, "loss", num_buckets=100, weight=0.0, up_to_seq=metrics.last_seq(run))
    stored = [point for point in metrics.points_after(run, -1) if point.name == "loss"]
    assert past.step == [point.step for point in stored]
    assert past.mean == [point.value for point in stored]
    assert past.time_s == [point.recorded_at.timestamp() for point in stored]


@pytest.mark.django_db
def test_reading_one_metric_passes_over_no_value_of_others() -> None:
    alice = seed.make_user()
    runs = [seed.make_run(alice) for _ in range(10)]
    with connection.cursor() as cursor:
        for run in runs:
            cursor.execute(_FILL, [run.pk])
        cursor.execute("ANALYZE runs_metric")
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {histories._READ}", [runs[3].pk, "loss", 10**6])
        [[plan]] = cursor.fetchall()
    text = json.dumps(plan)
    assert "metric_series" in text
    assert "Rows Removed by Filter" not in text
