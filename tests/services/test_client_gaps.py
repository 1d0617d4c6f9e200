"""How long a run's client let its worker wait before an operation: not what the server itself needed or drew samples for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from runs.models import Operation, TrainingRun, User
from runs.services import claims, playground
from tests.services import rows
from tests.services.hand_worker import HandWorker


def gap_before(worker: HandWorker, run: TrainingRun, seq: int) -> float:
    """Return how long nothing of the run was to be done before an operation, as the worker is told when it takes it."""
    (taken,) = claims.take_operations(worker.row, {run.pk: seq - 1}, limit=1)
    return taken.client_gap_s


def set_times(pk: int, start: float, end: float | None = None) -> None:
    """Let an operation be asked for and answered at such seconds of a minute."""
    minute = datetime(2026, 1, 1, tzinfo=UTC)
    finished_at = None if end is None else minute + timedelta(seconds=end)
    Operation.objects.filter(pk=pk).update(
        created_at=minute + timedelta(seconds=start), finished_at=finished_at
    )


@pytest.mark.parametrize(
    ("asked_at", "gap_s"), [(30, 20), (10.04, 0.04), (10, 0), (4, 0)], ids=["long", "short", "none", "ahead"]
)
def test_a_gap_lasts_from_an_answer_to_the_next_request(
    run: TrainingRun, worker: HandWorker, asked_at: float, gap_s: float
) -> None:
    first, second = rows.optim_step(run, 1), rows.optim_step(run, 2)
    worker.finish(first)
    set_times(first, 1, 10)
    set_times(second, asked_at)
    assert gap_before(worker, run, 2) == pytest.approx(gap_s)


def test_there_is_no_gap_before_an_answer(run: TrainingRun, worker: HandWorker) -> None:
    worker.hold(run)
    set_times(rows.optim_step(run, 1), 1)
    set_times(rows.optim_step(run, 3), 60)
    assert gap_before(worker, run, 1) == 0
    assert gap_before(worker, run, 3) == 0  # 2 may be on its way


def test_samples_of_a_run_are_no_gap(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    """Those of other weights, and of a person who talks to these, are nothing that its client waits for."""
    checkpoint = rows.make_checkpoint(run)
    own = rows.make_sampling_session(alice, checkpoint)
    set_times(Operation.objects.get(run=run, seq=1).pk, 1, 10)
    set_times(rows.optim_step(run, 2), 40)
    for number, (start, end) in enumerate([(8, 12), (15, 20), (18, 23), (19, 20), (38, None), (41, None)]):
        set_times(rows.sample(own, number), start, end)
    set_times(rows.sample(rows.make_sampling_session(alice), 0), 25, 35)
    weights = playground.Weights(base_model=rows.BASE_MODEL, checkpoint=checkpoint)
    page = playground.open_sampling(playground.open_session(alice), weights, seq_id=0)
    set_times(rows.talk(page), 25, 35)
    assert gap_before(worker, run, 2) == pytest.approx(30 - 2 - 8 - 2)


def test_a_clock_that_was_set_back_keeps_nothing_from_being_taken(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    own = rows.make_sampling_session(alice, rows.make_checkpoint(run))
    set_times(Operation.objects.get(run=run, seq=1).pk, 1, 10)
    set_times(rows.optim_step(run, 2), 40)
    set_times(rows.sample(own, 0), 25, 20)
    assert gap_before(worker, run, 2) == pytest.approx(30)


def test_a_run_that_a_recipe_trains_has_no_client(run: TrainingRun, worker: HandWorker) -> None:
    assert worker.hold(run).has_client
    worker.release(run)
    rows.make_recipe(run, state="running")
    assert not worker.hold(run).has_client
