"""A run's series for charts: read from a cursor, or bucketed so that no extreme is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from django.db.models import QuerySet

from runs.models import Metric, TrainingRun

MAX_POINTS: Final = 2000
LARGE_RUN_VALUES: Final = 60_000
Word = Literal["NaN", "Infinity", "-Infinity"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One stored value."""

    seq: int
    step: int
    name: str
    value: float
    recorded_at: datetime

    def as_json(self) -> list[int | float | str]:
        """Return `[seq, step, seconds since 1970, name, value]`; what JSON cannot say is a word."""
        value = self.value if math.isfinite(self.value) else word(self.value)
        return [self.seq, self.step, round(self.recorded_at.timestamp(), 3), self.name, value]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The values of a range of steps: nothing inside it is hidden.

    `low`, `high` and `mean` are over the finite values and None when there is none.
    """

    step: int
    last_step: int
    low: float | None
    high: float | None
    mean: float | None
    count: int
    num_nonfinite: int


def points_after(run: TrainingRun, seq: int, *, limit: int = MAX_POINTS) -> list[Point]:
    """Return the run's values after a cursor, in order; whole operations only."""
    rows = _values(Metric.objects.filter(run=run, seq__gt=seq), limit + 1)
    if len(rows) > limit:
        cut = rows[limit][0]
        whole = [row for row in rows if row[0] < cut]
        # One operation alone may have more values than the limit; half of it would lose the other half.
        rows = whole or _values(Metric.objects.filter(run=run, seq=cut))
    return [
        Point(seq=seq, step=step, name=name, value=value, recorded_at=recorded_at)
        for seq, step, name, value, recorded_at in rows
    ]


def is_large(run: TrainingRun) -> bool:
    """Say whether a page should draw the run's past from buckets instead of every value."""
    return Metric.objects.filter(run=run)[: LARGE_RUN_VALUES + 1].count() > LARGE_RUN_VALUES


def last_seq(run: TrainingRun) -> int:
    """Return the cursor after the run's newest value, -1 when it has none."""
    newest = Metric.objects.filter(run=run).order_by("-seq").values_list("seq", flat=True).first()
    return -1 if newest is None else newest


_Row: TypeAlias = tuple[int, int, str, float, datetime]


def _values(metrics: QuerySet[Metric], limit: int | None = None) -> list[_Row]:
    rows = metrics.order_by("seq", "name")
    return list(rows.values_list("seq", "step", "name", "value", "recorded_at")[:limit])


def word(value: float) -> Word:
    """Return the name of a value that is not finite: NaN, Infinity or -Infinity."""
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def names(run: TrainingRun) -> list[str]:
    """Return the names of the run's metrics."""
    return sorted(set(Metric.objects.filter(run=run).values_list("name", flat=True).distinct()))


def series(
    run: TrainingRun, name: str, *, num_buckets: int = 1000, from_step: int = 0, to_step: int | None = None
) -> list[Bucket]:
    """Return a metric over a range of steps in at most `num_buckets` buckets.

    A bucket's width is a power of two and starts at a multiple of it, so that buckets stay where
    they are as points arrive.
    """
    rows = Metric.objects.filter(run=run, name=name, step__gte=from_step).order_by("seq")
    if to_step is not None:
        rows = rows.filter(step__lte=to_step)
    pairs = list(rows.values_list("step", "value"))
    if not pairs:
        return []
    steps = np.array([pair[0] for pair in pairs], dtype=np.int64)
    values = np.array([pair[1] for pair in pairs], dtype=np.float64)
    return bucketed(steps, values, num_buckets=num_buckets)


def bucketed(
    steps: npt.NDArray[np.int64], values: npt.NDArray[np.float64], *, num_buckets: int
) -> list[Bucket]:
    """Return the values in at most `num_buckets` aligned buckets of a power-of-two width."""
    width = 1
    while (int(steps.max()) // width) - (int(steps.min()) // width) + 1 > num_buckets:
        width *= 2
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    starts = np.flatnonzero(np.r_[True, np.diff(steps // width) > 0])
    ends = np.r_[starts[1:], len(steps)]
    return [_bucket(steps[a:b], values[a:b]) for a, b in zip(starts, ends, strict=True)]


def _bucket(steps: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> Bucket:
    finite = values[np.isfinite(values)]
    has_any = finite.size > 0
    return Bucket(
        step=int(steps[0]),
        last_step=int(steps[-1]),
        low=float(finite.min()) if has_any else None,
        high=float(finite.max()) if has_any else None,
        mean=float(finite.mean()) if has_any else None,
        count=int(values.size),
        num_nonfinite=int(values.size - finite.size),
    )
