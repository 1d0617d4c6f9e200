"""The past of a long run for its charts: bucketed without hiding an extreme, smoothed before bucketing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from runs.models import Metric, TrainingRun

MAX_BUCKETS: Final = 2000
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """The state of a de-biased moving average after the last value, so that a page can carry on from it."""

    numerator: float = 0.0
    denominator: float = 0.0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class History:
    """Columns with one entry per bucket; a value is None where the bucket has no finite one.

    `time_s` is the first value's time in seconds since 1970; `num_values` counts all, finite or not.
    """

    name: str
    width: int
    step: list[int]
    last_step: list[int]
    time_s: list[float]
    low: list[float | None]
    high: list[float | None]
    mean: list[float | None]
    smooth: list[float | None]
    num_values: list[int]
    num_nonfinite: list[int]
    smoothing: Smoothing


def history(
    run: TrainingRun,
    name: str,
    *,
    num_buckets: int,
    weight: float,
    up_to_seq: int,
    from_step: int | None = None,
    to_step: int | None = None,
) -> History:
    """Return one metric up to a cursor in at most `num_buckets` buckets.

    Args:
        weight: of the moving average, 0 (none) to below 1; it decays once per step, so that its
            reach does not depend on how often a metric is recorded.
        from_step, to_step: the range to show; the average still sees everything before it.
    """
    rows = Metric.objects.filter(run=run, name=name, seq__lte=up_to_seq).order_by("seq")
    columns = list(zip(*rows.values_list("step", "value", "recorded_at"), strict=True)) or [(), (), ()]
    steps = np.array(columns[0], dtype=np.int64)
    values = np.array(columns[1], dtype=np.float64)
    times = np.array([moment.timestamp() for moment in columns[2]], dtype=np.float64)
    smooth, smoothing = smoothed(steps, values, weight=weight)
    keep = np.ones(len(steps), dtype=bool)
    if from_step is not None:
        keep &= steps >= from_step
    if to_step is not None:
        keep &= steps <= to_step
    return _bucketed(name, steps[keep], values[keep], times[keep], smooth[keep], num_buckets, smoothing)


def smoothed(steps: Ints, values: Floats, *, weight: float) -> tuple[Floats, Smoothing]:
    """Return the de-biased exponential moving average at each value; a non-finite value does not move it."""
    result = np.full(len(values), np.nan)
    numerator = denominator = 0.0
    last = int(steps[0]) if len(steps) else 0
    for index, (step, value, is_finite) in enumerate(
        zip(steps.tolist(), values.tolist(), np.isfinite(values).tolist(), strict=True)
    ):
        if is_finite:
            decay = weight ** max(step - last, 0)
            numerator, denominator, last = numerator * decay + value, denominator * decay + 1.0, step
        if denominator:
            result[index] = numerator / denominator
    return result, Smoothing(numerator=numerator, denominator=denominator, step=last)


def _bucketed(
    name: str,
    steps: Ints,
    values: Floats,
    times: Floats,
    smooth: Floats,
    num_buckets: int,
    smoothing: Smoothing,
) -> History:
    order = np.argsort(steps, kind="stable")
    steps, values, times, smooth = steps[order], values[order], times[order], smooth[order]
    width = _width(steps, num_buckets)
    starts = (
        np.flatnonzero(np.r_[True, np.diff(steps // width) > 0])
        if len(steps)
        else np.array([], dtype=np.int64)
    )
    ends = np.r_[starts[1:], len(steps)]
    is_finite = np.isfinite(values)
    num_values = ends - starts if len(steps) else starts
    num_finite = _reduce(np.add, is_finite.astype(np.int64), starts)
    return History(
        name=name,
        width=width,
        step=steps[starts].tolist(),
        last_step=steps[ends - 1].tolist() if len(steps) else [],
        time_s=times[starts].tolist(),
        low=_column(_reduce(np.minimum, np.where(is_finite, values, np.inf), starts), num_finite),
        high=_column(_reduce(np.maximum, np.where(is_finite, values, -np.inf), starts), num_finite),
        mean=_column(
            _reduce(np.add, np.where(is_finite, values, 0.0), starts) / np.maximum(num_finite, 1), num_finite
        ),
        smooth=_column(
            _reduce(np.add, np.where(is_finite, smooth, 0.0), starts) / np.maximum(num_finite, 1), num_finite
        ),
        num_values=num_values.tolist(),
        num_nonfinite=(num_values - num_finite).tolist(),
        smoothing=smoothing,
    )


def _width(steps: Ints, num_buckets: int) -> int:
    width = 1
    while len(steps) and int(steps[-1]) // width - int(steps[0]) // width + 1 > num_buckets:
        width *= 2
    return width


def _reduce(function: np.ufunc, values: npt.NDArray[np.generic], starts: Ints) -> npt.NDArray[np.generic]:
    return function.reduceat(values, starts) if len(starts) else values[:0]


def _column(values: npt.NDArray[np.generic], num_finite: npt.NDArray[np.generic]) -> list[float | None]:
    pairs = zip(values.tolist(), num_finite.tolist(), strict=True)
    return [value if count else None for value, count in pairs]
