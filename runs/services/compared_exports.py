"""Every stored value of several runs as one CSV file, made piece by piece: a row for each step of each run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from django.db import connection

from runs.models import TrainingRun
from runs.services import metrics
from runs.services.metric_exports import safe_cell

COLUMNS: Final = ("run", "run_id", "step", "tokens_so_far", "seconds")
MAX_PART_VALUES: Final = 20_000
"""About the most values that are held at once."""
_FIRST: Final = ("loss", "validation_loss")
_READ: Final = """
SELECT part.place, m.step, m.name, m.value, EXTRACT(EPOCH FROM m.recorded_at)::float8
FROM unnest(%s::int[], %s::bigint[], %s::bigint[], %s::bigint[]) AS part(place, run_id, after_seq, to_seq)
JOIN runs_metric m ON m.run_id = part.run_id AND m.seq > part.after_seq AND m.seq <= part.to_seq
ORDER BY part.place, m.seq, m.name
"""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A run in the file: its values up to `last_seq`, of which none has another name than those in `names`."""

    run: TrainingRun
    title: str
    began_at: datetime
    last_seq: int
    names: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The values of the run at `place` after one seq up to another."""

    place: int
    after_seq: int
    to_seq: int


def as_csv(runs: Sequence[Exported]) -> Iterator[bytes]:
    """Yield the file: values that belong to one step of a run stand in one row, in the order they were recorded.

    What a run left behind when it went back is in it, too. What is not finite is NaN, Infinity or -Infinity.
    """
    named = sorted({name for one in runs for name in one.names}, key=lambda name: (name not in _FIRST, name))
    yield _lines([[*COLUMNS, *map(safe_cell, named)]])
    rows_of = [_Rows(one, named) for one in runs]
    last: _Rows | None = None
    for parts in _batches(runs):
        ended = []
        for place, step, name, value, time_s in _read(runs, parts):
            rows = rows_of[place]
            if last is not None and last is not rows:
                ended += last.end()
            ended += rows.add(step, time_s, name, value)
            last = rows
        # The last row may go on in the next part of its run.
        yield _lines(ended)
    yield _lines(last.end() if last is not None else [])


class _Rows:
    """Puts the values of one run into rows."""

    def __init__(self, exported: Exported, names: Sequence[str]) -> None:
        self._head = [safe_cell(exported.title), exported.run.public_id]
        self._starts_at = exported.began_at.timestamp()
        self._counts_tokens = "tokens" in exported.names
        self._names = names
        self._tokens = _Tokens()
        self._step = 0
        self._time_s = 0.0
        self._values: dict[str, float] = {}

    def add(self, step: int, time_s: float, name: str, value: float) -> list[list[Any]]:
        """Take a value; return the row that it ends, if it does."""
        is_next = step != self._step or name in self._values
        ended = self.end() if is_next else []
        if not self._values:
            self._step, self._time_s = step, time_s
        self._values[name] = value
        return ended

    def end(self) -> list[list[Any]]:
        """Return the row that is not ended, if there is one."""
        if not self._values:
            return []
        so_far = self._tokens.add(self._step, self._values.get("tokens", 0.0))
        known = [_word(self._values[name]) if name in self._values else "" for name in self._names]
        head = [
            *self._head,
            self._step,
            f"{so_far:.0f}" if self._counts_tokens else "",
            f"{self._time_s - self._starts_at:.3f}",
        ]
        self._values = {}
        return [[*head, *known]]


@dataclass
class _Tokens:
    """How many tokens a run had trained on at each step; one that goes back counts on from there."""

    steps: list[int] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)

    def add(self, step: int, number: float) -> float:
        """Count a step's tokens and return how many there were by then."""
        if self.steps and step < self.steps[-1]:
            while self.steps and self.steps[-1] >= step:
                self.steps.pop()
                self.totals.pop()
        total = (self.totals[-1] if self.totals else 0.0) + (number if math.isfinite(number) else 0.0)
        self.steps.append(step)
        self.totals.append(total)
        return total


def _batches(runs: Sequence[Exported]) -> Iterator[list[_Part]]:
    """Yield what is read at once: short runs together, a long one piece by piece."""
    batch: list[_Part] = []
    room = MAX_PART_VALUES
    for part, num_values in _parts(runs):
        if batch and num_values > room:
            yield batch
            batch, room = [], MAX_PART_VALUES
        batch.append(part)
        room -= num_values
    if batch:
        yield batch


def _parts(runs: Sequence[Exported]) -> Iterator[tuple[_Part, int]]:
    """Yield pieces of runs with the most values that each can hold."""
    for place, one in enumerate(runs):
        width = max(len(one.names), 1)
        span = max(MAX_PART_VALUES // width, 1)
        for after in range(-1, one.last_seq, span):
            to_seq = min(after + span, one.last_seq)
            yield _Part(place=place, after_seq=after, to_seq=to_seq), (to_seq - after) * width


def _read(runs: Sequence[Exported], parts: Sequence[_Part]) -> list[tuple[int, int, str, float, float]]:
    columns = [
        [part.place for part in parts],
        [runs[part.place].run.pk for part in parts],
        [part.after_seq for part in parts],
        [part.to_seq for part in parts],
    ]
    with connection.cursor() as cursor:
        cursor.execute(_READ, columns)
        rows: list[tuple[int, int, str, float, float]] = cursor.fetchall()
    return rows


def _word(value: float) -> str:
    return repr(value) if math.isfinite(value) else metrics.word(value)


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
