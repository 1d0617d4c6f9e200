"""Cutting jobs into blocks of whole sequences and filling packed batches with blocks of many jobs.

A block depends on its own job and the token budget only: the sum order inside a job, and with it
every bit of its result, is then the same whatever runs beside it. numpy only.
Axes: T rows of the packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpuworker.engine.types import Int64Array

MIN_BATCH_ROWS = 16
ROW_MULTIPLE = 8
"""Batches end on a multiple of 8 rows, so that vectorised elementwise kernels never leave a tail
whose length depends on the neighbours."""


@dataclass(frozen=True)
class PackedRows:
    """The rows of one batch: sequences one after another, then padding as a sequence of its own.

    Shapes:
        tokens_T, positions_T: int64, (T,); `lengths` sums to T.
    """

    tokens_T: Int64Array
    positions_T: Int64Array
    lengths: list[int]
    num_rows: int


def padded_size(num_rows: int) -> int:
    """Return the number of rows that a batch of `num_rows` is padded to."""
    return max(MIN_BATCH_ROWS, -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def pack_rows(sequences: Sequence[tuple[Int64Array, int]], *, row_step: int | None = None) -> PackedRows:
    """Return one batch of the given token sequences; each comes with its first position.

    Args:
        row_step: pad to a multiple of it, for products that were found to need no more.
    """
    lengths = [len(tokens) for tokens, _ in sequences]
    num_rows = sum(lengths)
    size = padded_size(num_rows) if row_step is None else -(-num_rows // row_step) * row_step
    tokens_T = np.zeros(size, dtype=np.int64)
    positions_T = np.zeros(size, dtype=np.int64)
    start = 0
    for tokens, first_position in sequences:
        stop = start + len(tokens)
        tokens_T[start:stop] = tokens
        positions_T[start:stop] = np.arange(first_position, first_position + len(tokens))
        start = stop
    if size > num_rows:
        positions_T[num_rows:] = np.arange(size - num_rows)
        lengths.append(size - num_rows)
    return PackedRows(tokens_T, positions_T, lengths, num_rows)


def cut_into_blocks(lengths: Sequence[int], token_budget: int) -> list[range]:
    """Return which adjacent sequences of one job make up each of its blocks.

    A sequence above the budget is a block of its own.
    """
    blocks: list[range] = []
    first, used = 0, 0
    for index, length in enumerate(lengths):
        if index > first and used + length > token_budget:
            blocks.append(range(first, index))
            first, used = index, 0
        used += length
    blocks.append(range(first, len(lengths)))
    return blocks


def fill_batches(sizes: Sequence[int], budget: int) -> list[range]:
    """Return which adjacent blocks, by size, share a batch; their order is kept."""
    return cut_into_blocks(sizes, budget) if sizes else []
