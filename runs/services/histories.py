"""The past of a long run for its charts: bucketed without hiding an extreme, smoothed before bucketing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from django.db import connection

from runs.models import TrainingRun

MAX_BUCKETS: Final = 2000
# Whole columns as bytes: of 50,000 values, rows of their own would take three times as long to come here.
_READ: Final = """
SELECT string_agg(int8send(step), '' ORDER BY seq), string_agg(float8send(value), '' ORDER BY seq),
  string_agg(timestamptz_send(recorded_at), '' ORDER BY seq)
FROM runs_metric WHERE run_id = %s AND name = %s AND seq <= %s
"""
# PostgreSQL sends microseconds since the beginning of 2000.
_YEAR_2000_US: Final = 946_684_800_000_000
# What has decayed to this no longer moves an average, but would slow its arithmetic down.
_DECAYED: Final = 1e-300
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Column = list[float | None]


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """The state of a de-biased moving average after the last value, so that a page can carry on from it."""

    numerator: float = 0.0
    denominator: float = 0.0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Columns of values that a run left behind, one entry per bucket."""

    step: list[int]
    time_s: list[float]
    mean: Column


@dataclass(frozen=True, kw_only=True)
class History:
    """Columns with one entry per bucket; a value is None where the bucket has no finite one.

    `time_s` is the first value's time in seconds since 1970; `num_values` counts all, finite or not.
    `first_value` and `last_value` are the outermost finite values of the whole past. Values that were
    left behind when the run went back to an earlier step are apart, in `abandoned`.
    """

    name: str
    width: int
    step: list[int]
    last_step: list[int]
    time_s: list[float]
    low: Column
    high: Column
    mean: Column
    smooth: Column
    num_values: list[int]
    num_nonfinite: list[int]
    smoothing: Smoothing
    first_value: float | None
    last_value: float | None
    abandoned: list[Stretch]
    num_abandoned: int


@dataclass(frozen=True, kw_only=True)
class _Values:
    """Values with where they belong, in the order of their steps."""

    step: Ints
    value: Floats
    time_s: Floats
    smooth: Floats


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
    steps, values, times = _read(run, name, up_to_seq)
    is_left = left_behind(steps)
    left = _Values(step=steps[is_left], value=values[is_left], time_s=times[is_left], smooth=values[is_left])
    pieces = _stretches(left, np.flatnonzero(is_left))
    steps, values, times = steps[~is_left], values[~is_left], times[~is_left]
    smooth, smoothing = smoothed(steps, values, weight=weight)
    kept = _Values(step=steps, value=values, time_s=times, smooth=smooth)
    bounds = (-np.inf if from_step is None else from_step, np.inf if to_step is None else to_step)
    return _bucketed(
        name,
        _between(kept, bounds),
        num_buckets=num_buckets,
        smoothing=smoothing,
        finite=values[np.isfinite(values)],
        abandoned=[_stretch(_between(part, bounds), num_buckets) for part in pieces],
        num_abandoned=len(left.step),
    )


def left_behind(steps: Ints) -> npt.NDArray[np.bool_]:
    """Say of each value whether the run later went back to its step or before it; steps are in order of seq."""
    if len(steps) < 2:
        return np.zeros(len(steps), dtype=np.bool_)
    far = np.iinfo(np.int64).max
    returns = np.where(np.diff(steps) < 0, steps[1:], far)
    lowest_after = np.minimum.accumulate(returns[::-1])[::-1]
    is_left: npt.NDArray[np.bool_] = np.r_[lowest_after <= steps[:-1], False]
    return is_left


def smoothed(steps: Ints, values: Floats, *, weight: float) -> tuple[Floats, Smoothing]:
    """Return the de-biased exponential moving average at each value; a non-finite value does not move it."""
    is_finite = np.isfinite(values)
    if not is_finite.any():
        return np.full(len(values), np.nan), Smoothing(step=int(steps[0]) if len(steps) else 0)
    finite_steps = steps[is_finite]
    gaps = np.maximum(np.diff(finite_steps, prepend=finite_steps[:1]), 0)
    with np.errstate(under="ignore", over="ignore"):
        decays = np.power(weight, gaps, dtype=np.float64)
        numerators = _decaying_sums(values[is_finite], decays)
        denominators = _decaying_sums(np.ones(len(gaps)), decays)
    places = np.cumsum(is_finite) - 1
    result = np.where(places >= 0, (numerators / denominators)[places], np.nan)
    smoothing = Smoothing(
        numerator=float(numerators[-1]), denominator=float(denominators[-1]), step=int(finite_steps[-1])
    )
    return result, smoothing


def _decaying_sums(values: Floats, decays: Floats) -> Floats:
    """Return `sums[i] = values[i] + decays[i] * sums[i - 1]`, in steps that double what each sum reaches back to."""
    sums, reach = values.copy(), decays.copy()
    span = 1
    while span < len(sums) and reach[span:].max() > _DECAYED:
        sums[span:] += reach[span:] * sums[:-span]
        reach[span:] *= reach[:-span]
        span *= 2
    return sums


def _between(values: _Values, bounds: tuple[float, float]) -> _Values:
    chosen = (values.step >= bounds[0]) & (values.step <= bounds[1])
    return _Values(
        step=values.step[chosen],
        value=values.value[chosen],
        time_s=values.time_s[chosen],
        smooth=values.smooth[chosen],
    )


def _stretches(left: _Values, places: Ints) -> list[_Values]:
    """Return what was left behind in pieces that were recorded one after the other."""
    cuts = np.flatnonzero((np.diff(left.step) < 0) | (np.diff(places) > 1)) + 1
    columns = (np.split(column, cuts) for column in (left.step, left.value, left.time_s, left.smooth))
    pieces = zip(*columns, strict=True)
    return [
        _Values(step=step, value=value, time_s=time, smooth=smooth) for step, value, time, smooth in pieces
    ]


def _stretch(values: _Values, num_buckets: int) -> Stretch:
    starts = _starts(values.step, _width(values.step, num_buckets))
    is_finite = np.isfinite(values.value)
    num_finite = _reduce(np.add, is_finite.astype(np.float64), starts)
    totals = _reduce(np.add, np.where(is_finite, values.value, 0.0), starts)
    return Stretch(
        step=values.step[starts].tolist(),
        time_s=values.time_s[starts].tolist(),
        mean=_or_none(totals / np.maximum(num_finite, 1.0), num_finite),
    )


def _read(run: TrainingRun, name: str, up_to_seq: int) -> tuple[Ints, Floats, Floats]:
    with connection.cursor() as cursor:
        cursor.execute(_READ, [run.pk, name, up_to_seq])
        columns = [column or b"" for column in cursor.fetchone()]
    step, value = np.frombuffer(columns[0], ">i8"), np.frombuffer(columns[1], ">f8")
    time_us = np.frombuffer(columns[2], ">i8") + _YEAR_2000_US
    return step.astype(np.int64), value.astype(np.float64), time_us / 1e6


def _bucketed(
    name: str,
    shown: _Values,
    *,
    num_buckets: int,
    smoothing: Smoothing,
    finite: Floats,
    abandoned: list[Stretch],
    num_abandoned: int,
) -> History:
    width = _width(shown.step, num_buckets)
    starts = _starts(shown.step, width)
    is_finite = np.isfinite(shown.value)
    num_values = np.diff(np.r_[starts, len(shown.step)])
    num_finite = _reduce(np.add, is_finite.astype(np.float64), starts)

    def column(function: np.ufunc, values: Floats, neutral: float) -> Floats:
        return _reduce(function, np.where(is_finite, values, neutral), starts)

    divisor = np.maximum(num_finite, 1.0)
    return History(
        name=name,
        width=width,
        step=shown.step[starts].tolist(),
        last_step=shown.step[np.cumsum(num_values) - 1].tolist(),
        time_s=shown.time_s[starts].tolist(),
        low=_or_none(column(np.minimum, shown.value, np.inf), num_finite),
        high=_or_none(column(np.maximum, shown.value, -np.inf), num_finite),
        mean=_or_none(column(np.add, shown.value, 0.0) / divisor, num_finite),
        smooth=_or_none(column(np.add, shown.smooth, 0.0) / divisor, num_finite),
        num_values=num_values.tolist(),
        num_nonfinite=(num_values - num_finite.astype(np.int64)).tolist(),
        smoothing=smoothing,
        first_value=float(finite[0]) if finite.size else None,
        last_value=float(finite[-1]) if finite.size else None,
        abandoned=[stretch for stretch in abandoned if stretch.step],
        num_abandoned=num_abandoned,
    )


def _width(steps: Ints, num_buckets: int) -> int:
    """Return the smallest power of two for which the buckets, which start at its multiples, are few enough."""
    width = 1
    while len(steps) and int(steps[-1]) // width - int(steps[0]) // width + 1 > num_buckets:
        width *= 2
    return width


def _starts(steps: Ints, width: int) -> Ints:
    if not len(steps):
        return np.array([], dtype=np.int64)
    return np.flatnonzero(np.r_[True, np.diff(steps // width) > 0])


def _reduce(function: np.ufunc, values: Floats, starts: Ints) -> Floats:
    reduced: Floats = function.reduceat(values, starts) if len(starts) else values[:0]
    return reduced


def _or_none(values: Floats, num_finite: Floats) -> Column:
    return [
        value if count else None for value, count in zip(values.tolist(), num_finite.tolist(), strict=True)
    ]
