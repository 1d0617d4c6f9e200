"""Which rows a step trains on."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runs.recipes.batches import BatchPlan, Mix, UInt64Array, by_content, by_seed, some_of, split
from runs.schemas.recipes import MAX_STEPS, Validation
from runs.services.data_starts import BEGINNING, DataStart

LENGTHS = np.array([5, 9, 3, 14, 7, 2, 8, 6, 4, 30], dtype=np.int32)


def plan(
    *,
    rows: int = 10,
    seed: int = 1,
    batch_size: int = 4,
    batch_tokens: int | None = None,
    start: DataStart = BEGINNING,
) -> BatchPlan:
    return BatchPlan(
        np.arange(rows, dtype=np.int64),
        LENGTHS,
        seed=seed,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        start=start,
    )


def stream(made: BatchPlan, num_steps: int, *, first: int = 0) -> list[int]:
    return [int(row) for step in range(first, first + num_steps) for row in made.rows_of(step)]


def mixed_by(digests: UInt64Array) -> Mix:
    return partial(by_content, digests=digests)


def random_digests(num_rows: int) -> UInt64Array:
    return np.random.default_rng(7).integers(0, 2**64, num_rows, dtype=np.uint64)


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


def walked(
    lengths: list[int], order: list[int], *, start: int, batch_tokens: int, num_batches: int
) -> list[int]:
    """Return where batches begin, found row by row: `order` is every row of the stream, from its beginning."""
    starts = [start]
    while len(starts) <= num_batches:
        position, num_tokens = starts[-1], 0
        while True:
            num_tokens += lengths[order[position]]
            if num_tokens > batch_tokens and position > starts[-1]:
                break
            position += 1
        starts.append(position)
    return starts


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    batch_tokens=st.integers(1, 150),
    start=st.integers(0, 70),
    steps=st.lists(st.integers(0, 11), min_size=1, max_size=5),
)
def test_batches_by_tokens_are_those_that_a_walk_over_all_rows_finds(
    lengths: list[int], batch_tokens: int, start: int, steps: list[int]
) -> None:
    num_rows = len(lengths)
    whole = BatchPlan(
        np.arange(num_rows), np.array(lengths, dtype=np.int32), seed=3, batch_size=num_rows, batch_tokens=None
    )
    order = stream(whole, (start + 12 * 150) // num_rows + 1)
    starts = walked(lengths, order, start=start, batch_tokens=batch_tokens, num_batches=12)

    made = BatchPlan(
        np.arange(num_rows),
        np.array(lengths, dtype=np.int32),
        seed=3,
        batch_size=1,
        batch_tokens=batch_tokens,
        start=DataStart(step=7, row=start),
    )

    for step in steps:
        assert made.rows_of(7 + step).tolist() == order[starts[step] : starts[step + 1]]
    for number in (1, 5, 12):  # the epochs that end with a batch, and those that end just behind it
        assert made.num_steps((starts[number] - 0.5) / num_rows) == 7 + number
        assert made.num_steps((starts[number] + 0.5) / num_rows) == 8 + number


def test_steps_by_tokens_are_counted_no_further_than_a_run_can_go() -> None:
    epochs: list[int] = []
    made = BatchPlan(
        np.arange(10),
        LENGTHS,
        seed=1,
        batch_size=4,
        batch_tokens=20,
        start=DataStart(step=MAX_STEPS - 20),
        on_epoch=lambda: epochs.append(1),
    )

    assert made.num_steps(1_000) == MAX_STEPS + 1
    assert len(epochs) < 10
    assert made.num_steps(1) < MAX_STEPS


def test_who_looks_for_batches_can_be_stopped() -> None:
    def stop() -> None:
        raise InterruptedError

    made = BatchPlan(np.arange(10), LENGTHS, seed=1, batch_size=4, batch_tokens=20, on_epoch=stop)
    with pytest.raises(InterruptedError):
        made.num_steps(3)


@pytest.mark.parametrize("batch_tokens", [None, 20])
def test_a_plan_that_starts_later_begins_at_its_row(batch_tokens: int | None) -> None:
    whole = plan(batch_tokens=batch_tokens)
    behind = len(stream(whole, 3))
    anew = plan(batch_tokens=batch_tokens, start=DataStart(step=30))
    on = plan(batch_tokens=batch_tokens, start=DataStart(step=30, row=behind))

    assert stream(anew, 6, first=30) == stream(whole, 6)
    assert stream(on, 6, first=30) == stream(whole, 6, first=3)
    assert anew.num_steps(2) == 30 + whole.num_steps(2)
    assert on.num_steps(2) == 30 + whole.num_steps(2) - 3
    assert on.num_steps(0.1) == 30


@pytest.mark.parametrize(
    "mix", [partial(by_seed, seed=4), lambda rows: by_content(rows, digests=random_digests(200))]
)
def test_held_out_rows_are_never_trained_on(mix: Mix) -> None:
    num_trained = np.full(200, 3, dtype=np.int32)
    num_trained[::7] = 0
    rows, held_out = split(num_trained, Validation(share=0.1, max_rows=200), mix)

    assert not set(rows) & set(held_out)
    assert set(rows) | set(held_out) == set(np.flatnonzero(num_trained))
    assert len(held_out) == 18
    assert sorted(rows) == rows.tolist()
    assert sorted(held_out) == held_out.tolist()


def test_runs_of_earlier_versions_keep_what_their_seed_held_out() -> None:
    held_out = split(np.ones(40, dtype=np.int32), Validation(share=0.1), partial(by_seed, seed=42))[1]

    assert held_out.tolist() == [11, 12, 21, 30]


def test_what_is_held_out_is_so_wherever_it_stands() -> None:
    digests = random_digests(1000)
    every = np.ones(1000, dtype=np.int32)
    validation = Validation(share=0.1)
    shuffled = np.random.default_rng(1).permutation(digests)
    held_out = set(digests[split(every, validation, mixed_by(digests))[1]])

    assert set(shuffled[split(every, validation, mixed_by(shuffled))[1]]) == held_out


@pytest.mark.parametrize(("max_rows", "most"), [(200, 15), (50, 0)])
def test_of_a_longer_dataset_hardly_a_row_is_held_out_that_was_trained_on(max_rows: int, most: int) -> None:
    digests = random_digests(1500)
    every = np.ones(1500, dtype=np.int32)
    validation = Validation(share=0.1, max_rows=max_rows)
    trained = set(split(every[:1000], validation, mixed_by(digests[:1000]))[0])
    held_out = split(every, validation, mixed_by(digests))[1]

    assert len(held_out) == min(max_rows, 150)
    assert len(trained & set(held_out)) <= most


def test_equal_rows_are_spread_as_others_are() -> None:
    digests = np.repeat(random_digests(40), 100)
    every = np.ones(4000, dtype=np.int32)
    held_out = split(every, Validation(share=0.1, max_rows=2000), mixed_by(digests))[1]

    assert len(held_out) == 400
    per_row = Counter(digests[held_out].tolist())
    assert len(per_row) == 40
    assert max(per_row.values()) < 20


def test_few_rows_are_all_trained_on() -> None:
    rows, held_out = split(np.full(19, 1, dtype=np.int32), Validation(), mixed_by(random_digests(19)))

    assert (len(rows), len(held_out)) == (19, 0)


def test_some_rows_are_chosen_by_what_is_in_them() -> None:
    num_trained = np.array([1, 0, 1, 1, 1, 0, 1], dtype=np.int32)

    mix = mixed_by(np.array([5, 0, 9, 1, 7, 2, 3], dtype=np.uint64))

    assert some_of(num_trained, mix, max_rows=3).tolist() == [0, 3, 6]
    assert some_of(num_trained, mix, max_rows=9).tolist() == [0, 2, 3, 4, 6]
