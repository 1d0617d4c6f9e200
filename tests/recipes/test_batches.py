"""Which rows a step trains on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs.recipes.batches import BatchPlan, some_of, split
from runs.schemas.recipes import Validation

LENGTHS = np.array([5, 9, 3, 14, 7, 2, 8, 6, 4, 30], dtype=np.int32)


def plan(*, rows: int = 10, seed: int = 1, batch_size: int = 4, batch_tokens: int | None = None) -> BatchPlan:
    return BatchPlan(
        np.arange(rows, dtype=np.int64),
        LENGTHS,
        seed=seed,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
    )


def stream(made: BatchPlan, num_steps: int) -> list[int]:
    return [int(row) for step in range(num_steps) for row in made.rows_of(step)]


@pytest.mark.parametrize("batch_tokens", [None, 20])
def test_every_epoch_sees_every_row_once(batch_tokens: int | None) -> None:
    seen = stream(plan(batch_tokens=batch_tokens), 40)

    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]


@pytest.mark.parametrize("batch_tokens", [None, 20])
def test_a_new_plan_agrees_with_one_that_has_run(batch_tokens: int | None) -> None:
    used = plan(batch_tokens=batch_tokens)
    stream(used, 9)

    for step in (7, 2, 30):
        fresh = plan(batch_tokens=batch_tokens)
        assert used.rows_of(step).tolist() == fresh.rows_of(step).tolist()


def test_another_seed_is_another_order() -> None:
    assert stream(plan(seed=1), 3) != stream(plan(seed=2), 3)


def test_a_batch_by_tokens_is_as_full_as_can_be() -> None:
    made = plan(batch_tokens=20)

    for step in range(12):
        rows, following = made.rows_of(step), made.rows_of(step + 1)
        num_tokens = LENGTHS[rows].sum()
        assert num_tokens <= 20 or len(rows) == 1
        assert num_tokens + LENGTHS[following[0]] > 20


@pytest.mark.parametrize(("num_epochs", "expected"), [(1, 3), (2, 5), (0.1, 1), (0.5, 2)])
def test_epochs_come_to_steps(num_epochs: float, expected: int) -> None:
    assert plan().num_steps(num_epochs) == expected


@given(num_epochs=st.floats(0.01, 5), batch_tokens=st.integers(1, 100))
def test_steps_by_tokens_cover_the_epochs_and_no_more(num_epochs: float, batch_tokens: int) -> None:
    made = plan(batch_tokens=batch_tokens)
    num_steps = made.num_steps(num_epochs)
    wanted = max(1, int(np.ceil(num_epochs * 10)))

    assert len(stream(made, num_steps)) >= wanted
    assert len(stream(made, num_steps - 1)) < wanted


def test_held_out_rows_are_never_trained_on() -> None:
    num_trained = np.full(200, 3, dtype=np.int32)
    num_trained[::7] = 0
    rows, held_out = split(num_trained, Validation(share=0.1, max_rows=200), seed=4)

    assert not set(rows) & set(held_out)
    assert set(rows) | set(held_out) == set(np.flatnonzero(num_trained))
    assert len(held_out) == 18
    again = split(num_trained, Validation(share=0.1, max_rows=200), seed=4)
    assert held_out.tolist() == again[1].tolist()


def test_few_rows_are_all_trained_on() -> None:
    rows, held_out = split(np.full(19, 1, dtype=np.int32), Validation(), seed=1)

    assert (len(rows), len(held_out)) == (19, 0)


def test_some_rows_are_chosen_by_the_seed() -> None:
    num_trained = np.array([1, 0, 1, 1, 1, 0, 1], dtype=np.int32)

    assert len(some_of(num_trained, max_rows=3, seed=1)) == 3
    assert Counter(some_of(num_trained, max_rows=9, seed=1).tolist()) == Counter([0, 2, 3, 4, 6])
