"""Runs end some time after their client has closed its session, once all that it asked for is done."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db.models.functions import Now

from runs.exceptions import NotFound, RequestInvalid
from runs.models import Operation, Session, TrainingRun, User, Worker
from runs.services import closed_sessions, operations, run_deletion, sessions, workers
from runs.services.commits import Result
from runs.services.operations import Submission
from runs.tasks import housekeeping
from tests.services import rows
from tests.services.hand_worker import HandWorker

Kind = Operation.Kind


@pytest.fixture
def trained(run: TrainingRun, worker: HandWorker) -> TrainingRun:
    """Return a run that has done all that was asked for."""
    worker.finish(rows.optim_step(run, 1))
    return run


def close(run: TrainingRun, reason: str = "success", *, ago_s: int = closed_sessions.AFTER_S) -> None:
    sessions.finish(run.session, reason)
    finished_at = Now() - timedelta(seconds=ago_s + 1)
    Session.objects.filter(pk=run.session_id).update(finished_at=finished_at)


def unloads_of(run: TrainingRun) -> list[tuple[int, str]]:
    asked = Operation.objects.filter(run=run, kind=Kind.UNLOAD_MODEL).order_by("seq")
    return list(asked.values_list("seq", "state"))


@pytest.mark.parametrize("reason", ["success", "errored"])
def test_a_run_is_let_go_once_after_its_client_closed_the_session(reason: str, trained: TrainingRun) -> None:
    close(trained, reason, ago_s=operations.LATE_S)
    closed_sessions.let_runs_go()
    assert unloads_of(trained) == []  # what was sent before may still be on its way
    close(trained)
    for _ in range(2):
        closed_sessions.let_runs_go()
        assert unloads_of(trained) == [(2, "queued")]


def test_housekeeping_lets_runs_go(trained: TrainingRun, worker: HandWorker) -> None:
    close(trained)
    # One that has just begun is not taken for dead for want of a lock.
    Worker.objects.filter(pk=worker.row.pk).update(started_at=Now() + timedelta(hours=1))
    housekeeping()
    assert unloads_of(trained) == [(2, "queued")]


def test_a_run_whose_client_only_fell_silent_stays(trained: TrainingRun) -> None:
    Session.objects.filter(pk=trained.session_id).update(heard_uptime_s=-(10**6))
    assert sessions.silent().filter(pk=trained.session_id).exists()
    closed_sessions.let_runs_go()
    assert unloads_of(trained) == []


def test_what_was_asked_for_is_done_first(run: TrainingRun, worker: HandWorker) -> None:
    first = rows.optim_step(run, 1)
    close(run)
    closed_sessions.let_runs_go()
    assert unloads_of(run) == []
    worker.finish(first)
    closed_sessions.let_runs_go()
    assert unloads_of(run) == [(2, "queued")]


def test_a_run_that_a_recipe_trains_ends_by_its_recipe(trained: TrainingRun) -> None:
    rows.make_recipe(trained, state="paused")
    close(trained)
    closed_sessions.let_runs_go()
    assert unloads_of(trained) == []


def test_a_run_that_has_ended_is_left_alone(trained: TrainingRun) -> None:
    close(trained)
    TrainingRun.objects.filter(pk=trained.pk).update(state=TrainingRun.State.CLOSED)
    closed_sessions.let_runs_go()
    assert unloads_of(trained) == []


def test_a_run_that_no_worker_could_let_go_waits_for_none(trained: TrainingRun, worker: HandWorker) -> None:
    close(trained)
    workers.stop(worker.row)
    closed_sessions.let_runs_go()
    assert unloads_of(trained) == []
    rows.make_worker()
    closed_sessions.let_runs_go()
    assert unloads_of(trained) == [(2, "queued")]


def test_an_end_that_failed_is_not_asked_for_again(trained: TrainingRun, worker: HandWorker) -> None:
    close(trained)
    closed_sessions.let_runs_go()
    unload = Operation.objects.get(run=trained, kind=Kind.UNLOAD_MODEL)
    worker.finish(unload.pk, Result(error="given up", category="server"))
    closed_sessions.let_runs_go()
    assert unloads_of(trained) == [(2, "failed")]


def test_each_of_many_runs_is_let_go_in_its_turn(
    alice: User, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_sessions, "_RUNS_AT_ONCE", 2)
    runs = [rows.make_run(alice) for _ in range(3)]
    for run in runs:
        worker.finish(Operation.objects.get(run=run).pk)
        close(run)
    for num_asked in (2, 3):
        closed_sessions.let_runs_go()
        assert sum(len(unloads_of(run)) for run in runs) == num_asked


def test_the_end_comes_after_a_number_that_a_refused_request_took_up(trained: TrainingRun) -> None:
    operations.reject(trained, seq=2, kind=Kind.OPTIM_STEP, error=RequestInvalid("bad"))
    close(trained)
    closed_sessions.let_runs_go()
    assert unloads_of(trained) == [(3, "queued")]
    assert operations.unload(trained) == Operation.objects.get(run=trained, seq=3).pk
    assert operations.submit(
        trained, Submission(kind=Kind.UNLOAD_MODEL, seq=3, payload=b"{}")
    )  # a client's own is the same


def test_a_run_that_was_deleted_or_ended_meanwhile_has_no_other_end(trained: TrainingRun) -> None:
    TrainingRun.objects.filter(pk=trained.pk).update(state=TrainingRun.State.CLOSED)
    with pytest.raises(RequestInvalid):
        operations.unload(trained)
    run_deletion.delete(TrainingRun.objects.get(pk=trained.pk))
    with pytest.raises(NotFound):
        operations.unload(trained)
