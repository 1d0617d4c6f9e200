"""The small loss curves of lists: read bit by bit they are what one look at the whole run gives."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from runs.models import Metric, TrainingRun
from runs.services import histories, sparklines
from runs.services.sparklines import SparkBucket


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> None:
    sparklines._kept.clear()


def add(run: TrainingRun, losses: list[tuple[int, float]]) -> None:
    """Record the losses of steps, after all that were recorded before."""
    seq = Metric.objects.filter(run=run).count()
    Metric.objects.bulk_create(
        Metric(run=run, seq=seq + number, step=step, name="loss", value=value)
        for number, (step, value) in enumerate(losses)
    )
    run.step = losses[-1][0]


def expected(run: TrainingRun, shift: int) -> dict[int, SparkBucket]:
    """Return the buckets of all that the run did not leave behind."""
    rows = list(Metric.objects.filter(run=run, name="loss").order_by("seq").values_list("step", "value"))
    is_left = histories.left_behind(np.array([step for step, _ in rows], dtype=np.int64))
    buckets: dict[int, SparkBucket] = {}
    for (step, value), left in zip(rows, is_left, strict=True):
        if not left and math.isfinite(value):
            one = SparkBucket(1, value, value, value)
            buckets[step >> shift] = buckets[step >> shift] + one if step >> shift in buckets else one
    return buckets


@pytest.mark.parametrize("seed", range(4))
def test_what_a_run_left_behind_is_not_in_its_curve(run: TrainingRun, seed: int) -> None:
    chance, step = random.Random(seed), 0
    for _ in range(8):
        losses = []
        for _ in range(chance.randrange(1, 60)):
            step = chance.randrange(1, step) if step > 1 and chance.random() < 0.04 else step + 1
            losses.append((step, math.nan if chance.random() < 0.1 else chance.random()))
        add(run, losses)
        line = sparklines.of_runs([run])[run.pk]
        found = expected(run, line.shift)
        assert line.buckets.keys() == found.keys()
        for number, bucket in line.buckets.items():
            assert bucket.total == pytest.approx(found[number].total)
            assert (bucket.count, bucket.low, bucket.high) == (
                found[number].count,
                found[number].low,
                found[number].high,
            )
