"""Runs over which workers are lost when they bring them back: tried less and less often, until one survives it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db.models import F
from django.utils import timezone

from runs.models import TrainingRun, User
from runs.services import claims, holdups, restores, workers
from runs.services.claims import HeldRun
from runs.services.training_runs import DisplayState
from tests.services.hand_worker import HandWorker
from tests.services.test_states import shown


def lose_workers(run: TrainingRun, number: int) -> HeldRun:
    """Have so many workers in a row die over a run that waits."""
    for _ in range(number):
        TrainingRun.objects.filter(pk=run.pk).update(rests_until=None)
        dying = HandWorker()
        held = dying.hold(run)
        restores.begin(held)
        workers.stop(dying.row)
    return held


def rest_of(run: TrainingRun) -> timedelta | None:
    run.refresh_from_db()
    return run.rests_until - timezone.now() if run.rests_until else None


def test_a_worker_that_dies_over_a_run_is_no_reason_to_wait(run: TrainingRun, worker: HandWorker) -> None:
    lose_workers(run, restores.FREE_TRIES)
    assert rest_of(run) is None
    worker.hold(run)


def test_a_run_that_many_workers_died_over_rests_longer_each_time(
    run: TrainingRun, worker: HandWorker
) -> None:
    rests = []
    for number in (restores.FREE_TRIES + 1, 1, 1, 20):
        lose_workers(run, number)
        rest = rest_of(run)
        assert rest is not None
        assert claims.claim_runs(worker.row, [run.base_model]) == []
        rests.append(rest.total_seconds())
    first_s = restores.FIRST_REST_S
    assert rests == pytest.approx([first_s, 2 * first_s, 4 * first_s, restores.LONGEST_REST_S], abs=5)
    TrainingRun.objects.filter(pk=run.pk).update(rests_until=timezone.now())
    worker.hold(run)


def test_people_are_told_for_as_long_as_it_rests(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    lose_workers(run, 30)
    assert shown(alice, run) == DisplayState.HELD_UP
    assert holdups.reason_of(run) == restores.HELD_UP
    TrainingRun.objects.update(held_up_at=F("held_up_at") - timedelta(seconds=restores.LONGEST_REST_S - 60))
    assert shown(alice, run) == DisplayState.HELD_UP


def test_whoever_survives_it_takes_the_count_back(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    held = lose_workers(run, restores.FREE_TRIES + 1)
    TrainingRun.objects.filter(pk=run.pk).update(rests_until=timezone.now())
    restores.begin(worker.hold(run))
    restores.end(held)  # its owner of before changes nothing
    assert rest_of(run) is not None
    restores.end(worker.hold(run))
    run.refresh_from_db()
    assert (run.restore_tries, run.rests_until, run.held_up) == (0, None, "")
    assert shown(alice, run) == DisplayState.RUNNING
