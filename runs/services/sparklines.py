"""Small loss curves for lists of runs: at most 60 buckets each, none of a bucket's extremes lost.

Buckets have a power-of-two width, so they can be merged; those already read are kept in this process
and only values after their cursor are read again. Losing the memory costs one slower page. What a run left behind
when it went back to an earlier step is left out, as in `histories`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from django.db import connection

from runs.models import TrainingRun

MAX_BUCKETS: Final = 60
_MAX_KEPT: Final = 2000
# NaN counts as larger than Infinity in PostgreSQL, so both comparisons together keep finite values only.
_READ = """
WITH found AS (
  SELECT m.run_id, m.step, m.seq, m.value, h.shift, CASE WHEN m.step < lag(m.step) OVER run THEN m.step END AS returned
  FROM unnest(%s::bigint[], %s::int[], %s::bigint[]) AS h(run_id, shift, after_seq)
  JOIN runs_metric m ON m.run_id = h.run_id AND m.name = 'loss' AND m.seq > h.after_seq
  WINDOW run AS (PARTITION BY m.run_id ORDER BY m.seq)
), placed AS (
  SELECT *, min(returned) OVER (PARTITION BY run_id ORDER BY seq ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING)
    AS returns_to
  FROM found
)
SELECT run_id, step >> shift, count(*), sum(value), min(value), max(value), max(seq), min(step), max(step)
FROM placed WHERE value < 'Infinity' AND value > '-Infinity' AND (returns_to IS NULL OR returns_to > step)
GROUP BY 1, 2 ORDER BY 1, 2
"""


@dataclass(frozen=True)
class SparkBucket:
    """The finite losses of a range of steps."""

    count: int
    total: float
    low: float
    high: float

    @property
    def mean(self) -> float:
        """The average."""
        return self.total / self.count

    def __add__(self, other: SparkBucket) -> SparkBucket:
        return SparkBucket(
            self.count + other.count,
            self.total + other.total,
            min(self.low, other.low),
            max(self.high, other.high),
        )


@dataclass(frozen=True)
class Sparkline:
    """Buckets by number; bucket n holds the steps from `n << shift` on. `cursor` is the last seq read.

    `last_step` is the highest step, -1 without any.
    """

    shift: int = 0
    cursor: int = -1
    last_step: int = -1
    buckets: dict[int, SparkBucket] = field(default_factory=dict)

    def widened(self, shift: int) -> Sparkline:
        """Return the same values in wider buckets."""
        if shift <= self.shift:
            return self
        merged: dict[int, SparkBucket] = {}
        for number, bucket in self.buckets.items():
            wide = number >> (shift - self.shift)
            merged[wide] = merged[wide] + bucket if wide in merged else bucket
        return replace(self, shift=shift, buckets=merged)

    def plus(self, number: int, bucket: SparkBucket, *, seq: int, step: int) -> Sparkline:
        """Return it with further values of one bucket, up to a seq and a step."""
        known = self.buckets.get(number)
        buckets = {**self.buckets, number: known + bucket if known else bucket}
        return replace(
            self, cursor=max(self.cursor, seq), last_step=max(self.last_step, step), buckets=buckets
        )


_kept: OrderedDict[int, Sparkline] = OrderedDict()
_lock = threading.Lock()


def of_runs(runs: Iterable[TrainingRun]) -> dict[int, Sparkline]:
    """Return the loss curve of each run by the run's primary key, with one query for all; one more if some went back."""
    with _lock:
        known = {run.pk: _kept.get(run.pk, Sparkline()) for run in runs}
    lines = {run.pk: known[run.pk].widened(_shift(run.step)) for run in runs}
    gone_back = _read_on(lines)
    if gone_back:
        lines |= {pk: Sparkline(shift=lines[pk].shift) for pk in gone_back}
        _read_on(lines)
    _keep(lines)
    return lines


def _read_on(lines: dict[int, Sparkline]) -> set[int]:
    """Add what came after each line's cursor; returns the runs that went back to a step that their line has."""
    if not lines:
        return set()
    known = {pk: line.last_step for pk, line in lines.items()}
    gone_back: set[int] = set()
    with connection.cursor() as cursor:
        values = [
            list(lines),
            [line.shift for line in lines.values()],
            [line.cursor for line in lines.values()],
        ]
        cursor.execute(_READ, values)
        for pk, number, count, total, low, high, seq, first_step, last_step in cursor.fetchall():
            bucket = SparkBucket(count, total, low, high)
            lines[pk] = lines[pk].plus(number, bucket, seq=seq, step=last_step)
            if first_step <= known[pk]:
                gone_back.add(pk)
    return gone_back


def _shift(step: int) -> int:
    """Return how many halvings bring the steps into the buckets."""
    shift = 0
    while (step >> shift) + 1 > MAX_BUCKETS:
        shift += 1
    return shift


def _keep(lines: dict[int, Sparkline]) -> None:
    with _lock:
        for pk, line in lines.items():
            _kept[pk] = line
            _kept.move_to_end(pk)
        while len(_kept) > _MAX_KEPT:
            _kept.popitem(last=False)
