from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpuworker.engine.batching import cut_into_blocks, fill_batches, pack_rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 100))
def test_blocks_hold_every_datum_once_within_the_budget(lengths: list[int], budget: int) -> None:
    blocks = cut_into_blocks(lengths, budget)
    assert [i for block in blocks for i in block] == list(range(len(lengths)))
    for block in blocks:
        assert len(block) == 1 or sum(lengths[i] for i in block) <= budget
    for block, following in pairwise(blocks):
        assert sum(lengths[i] for i in block) + lengths[following.start] > budget


def test_no_blocks_make_no_batch() -> None:
    assert fill_batches([], 100) == []


@given(st.lists(st.integers(1, 40), min_size=1, max_size=10))
def test_packed_rows_are_the_sequences_and_padding(lengths: list[int]) -> None:
    sequences = [(np.full(n, i + 1), 10 * i) for i, n in enumerate(lengths)]
    rows = pack_rows(sequences)
    assert len(rows.tokens_T) >= 16
    assert len(rows.tokens_T) % 8 == 0
    assert sum(rows.lengths) == len(rows.tokens_T)
    start = 0
    for tokens, first in sequences:
        part = slice(start, start + len(tokens))
        np.testing.assert_array_equal(rows.tokens_T[part], tokens)
        np.testing.assert_array_equal(rows.positions_T[part], first + np.arange(len(tokens)))
        start += len(tokens)
    assert rows.num_rows == start
    assert not rows.tokens_T[start:].any()
