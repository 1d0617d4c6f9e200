"""Which rows are held out, and which rows a step trains on: pure functions, so that a loop that starts again agrees with itself.

Whether a row is held out depends on what is in it, not on its place or a seed: runs on one dataset, and on a longer or
sorted copy of it, are measured on the same rows, and hardly any of them was trained on by the run that another goes on from.
In runs from earlier versions it depends on the seed and the row's place.
Rows come in one endless stream, epoch after epoch, each epoch in an order of its own.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from runs.schemas.recipes import MAX_STEPS, MIN_ROWS_TO_SPLIT, Validation
from runs.services.data_starts import BEGINNING, DataStart

Int64Array = npt.NDArray[np.int64]

UInt64Array = npt.NDArray[np.uint64]
Mix = Callable[[Int64Array], Int64Array]

_SPLIT_STREAM, _ORDER_STREAM = 1, 2
# 2**64 over the golden ratio: its multiples lie evenly spread around the circle of 64-bit numbers.
_COPY_STEP = np.uint64(0x9E3779B97F4A7C15)


def split(
    num_trained: npt.NDArray[np.int32], validation: Validation, mix: Mix
) -> tuple[Int64Array, Int64Array]:
    """Return the rows to train on and those held out for validation, both sorted.

    Rows without a trained token are in neither. Fewer than 20 rows are all trained on.

    Args:
        mix: `by_content` or `by_seed`; the first of the rows that it returns are held out.
    Shapes:
        num_trained: (rows,), trained tokens of each row.
    """
    mixed = mix(np.flatnonzero(num_trained > 0).astype(np.int64))
    num_out = num_held_out(len(mixed), validation)
    return np.sort(mixed[num_out:]), np.sort(mixed[:num_out])


def num_held_out(num_usable: int, validation: Validation) -> int:
    """Return how many of the rows with a trained token are held out for validation."""
    if num_usable < MIN_ROWS_TO_SPLIT:
        return 0
    return min(validation.max_rows, math.ceil(validation.share * num_usable))


def some_of(num_trained: npt.NDArray[np.int32], mix: Mix, *, max_rows: int) -> Int64Array:
    """Return at most `max_rows` of the rows with a trained token, as `split` holds them out, sorted."""
    return np.sort(mix(np.flatnonzero(num_trained > 0).astype(np.int64))[:max_rows])


def by_content(rows: Int64Array, *, digests: UInt64Array) -> Int64Array:
    """Return the rows in an order that only their digests decide; equal rows are spread like any others.

    Shapes:
        digests: (rows of the dataset,), equal for equal rows.
    """
    digests = digests[rows]
    order = np.argsort(digests, kind="stable")
    _, firsts, counts = np.unique(digests[order], return_index=True, return_counts=True)
    copies = np.arange(len(rows), dtype=np.uint64) - np.repeat(firsts, counts).astype(np.uint64)
    return rows[order[np.argsort(digests[order] + copies * _COPY_STEP, kind="stable")]]


def by_seed(rows: Int64Array, *, seed: int) -> Int64Array:
    """Return the rows in an order that the seed decides, and how many they are."""
    return _generator(seed, _SPLIT_STREAM).permutation(rows)


class BatchPlan:
    """The batches of a run: so many rows each, or as many rows as fit a number of tokens.

    Where batches by tokens begin is found one after the other, a million in seconds, and remembered.

    Args:
        rows: row numbers to train on.
        lengths: tokens of every row of the dataset.
        batch_tokens: fill each batch up to this many tokens instead; one longer row is a batch of its own.
        start: the step whose batch is the first, and where in the stream it begins.
        on_epoch: called before the rows of an epoch are brought into their order.
    """

    def __init__(
        self,
        rows: Int64Array,
        lengths: npt.NDArray[np.int32],
        *,
        seed: int,
        batch_size: int,
        batch_tokens: int | None,
        start: DataStart = BEGINNING,
        on_epoch: Callable[[], None] = lambda: None,
    ) -> None:
        assert len(rows) > 0
        self._rows = rows
        self._lengths = lengths
        self._seed = seed
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._first_step = start.step
        self._starts = array("q", [start.row])
        self._on_epoch = on_epoch
        self._order = lru_cache(maxsize=2)(self._order_of)
        self._ends = lru_cache(maxsize=2)(self._ends_of)

    def rows_of(self, step: int) -> Int64Array:
        """Return the row numbers that a step, counted from 0, trains on."""
        start, end = self.start_of(step), self.start_of(step + 1)
        num_rows = len(self._rows)
        firsts = range(start - start % num_rows, end, num_rows)
        parts = [self._order(first // num_rows)[max(start - first, 0) : end - first] for first in firsts]
        return np.concatenate(parts)

    def num_steps(self, num_epochs: float) -> int:
        """Return after which step the rows were seen `num_epochs` times; a run from the start has at least one.

        Where that is after MAX_STEPS by tokens, the number is one above it.
        """
        end = max(1, math.ceil(num_epochs * len(self._rows)))
        if self._batch_tokens is None:
            return self._first_step + max(math.ceil((end - self._starts[0]) / self._batch_size), 0)
        most = MAX_STEPS - self._first_step
        while self._starts[-1] < end and len(self._starts) <= most + 1:
            self._extend()
        return self._first_step + min(bisect_left(self._starts, end), most + 1)

    def start_of(self, step: int) -> int:
        """Return where in the stream a step's batch begins."""
        number = step - self._first_step
        if self._batch_tokens is None:
            return self._starts[0] + number * self._batch_size
        while len(self._starts) <= number:
            self._extend()
        return self._starts[number]

    def _extend(self) -> None:
        """Find where the next batch by tokens ends."""
        assert self._batch_tokens is not None
        start, num_rows = self._starts[-1], len(self._rows)
        epoch, place = divmod(start, num_rows)
        ends = self._ends(epoch)
        last = self._batch_tokens + (int(ends[place - 1]) if place else 0)
        if last >= ends[-1]:  # the rest of the epoch fits, and whole ones after it
            num_whole, last = divmod(last - int(ends[-1]), int(ends[-1]))
            epoch += 1 + num_whole
            ends = self._ends(epoch)
        end = epoch * num_rows + int(ends.searchsorted(last, side="right"))
        self._starts.append(max(end, start + 1))

    def _order_of(self, epoch: int) -> Int64Array:
        self._on_epoch()
        return _generator(self._seed, _ORDER_STREAM, epoch).permutation(self._rows)

    def _ends_of(self, epoch: int) -> Int64Array:
        """Return how many tokens of the epoch lie before the end of each row, in their order."""
        return np.cumsum(self._lengths[self._order(epoch)], dtype=np.int64)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
