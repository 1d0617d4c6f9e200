"""What a run is about, and why it does not go on: never "running" without a live worker, parked without a client."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db.models.functions import Now

from runs.exceptions import SessionFinished
from runs.models import Operation, Recipe, RunEvent, ServerClock, Session, TrainingRun, User, Worker
from runs.services import access, operations, playground, run_rows, sessions, training_runs, waiting, workers
from runs.services.operations import Submission
from runs.services.run_rows import RunRow
from runs.services.training_runs import DisplayState
from tests.services import rows
from tests.services.hand_worker import HandWorker


def shown(user: User, run: TrainingRun) -> DisplayState:
    """Return the run's state, which the list's filter has to know too."""
    listed = training_runs.with_activity(access.runs_of(user))
    state = training_runs.display_state(listed.get(pk=run.pk))
    for other in DisplayState:
        assert (run in training_runs.in_display_state(listed, other)) is (other == state)
    return state


def row_of(user: User, run: TrainingRun) -> RunRow:
    return run_rows.rows_of(run_rows.by_activity(user).filter(pk=run.pk))[0]


def let_time_pass(seconds: float, *, heard: bool = False) -> None:
    """Move the server's clock as its ticks do when it was up for so long; a tick after an outage moves it once."""
    sessions.tick()
    ServerClock.objects.update(seen_at=Now() - timedelta(seconds=seconds))
    sessions.tick()


def be_silent(run: TrainingRun) -> None:
    """Let a client be silent for as long as makes it gone, while the server is up."""
    TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=None)
    for _ in range(1 + sessions.SILENT_S // sessions.TICK_S):
        let_time_pass(sessions.TICK_S)


def test_late_signs_of_life_end_running_before_the_lease_does(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    worker.hold(run)
    assert shown(alice, run) == DisplayState.RUNNING
    Worker.objects.update(lease_until=Now() + timedelta(seconds=workers.LEASE_S - workers.HEARTBEAT_S))
    assert shown(alice, run) == DisplayState.RUNNING  # one late heartbeat is nothing
    Worker.objects.update(lease_until=Now() + timedelta(seconds=workers.LEASE_S - 10))
    assert shown(alice, run) == DisplayState.WAITING_FOR_WORKER
    assert not workers.live().exists()


def test_a_loop_without_a_worker_does_not_run(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    worker.finish(rows.optim_step(run, 1))
    rows.make_recipe(run, state="running")
    assert shown(alice, run) == DisplayState.RUNNING
    workers.stop(worker.row)
    assert shown(alice, run) == DisplayState.WAITING_FOR_WORKER


def test_a_vanished_client_parks_its_run_and_a_sign_of_life_takes_it_back(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    worker.finish(rows.optim_step(run, 1))
    be_silent(run)
    assert shown(alice, run) == DisplayState.PARKED
    seen_at = Session.objects.get(pk=run.session_id).last_heartbeat_at
    assert row_of(alice, run).status == f"parked: its client went away {seen_at:%H:%M} UTC"
    rows.optim_step(run, 2)
    worker.release(run)
    assert shown(alice, run) == DisplayState.QUEUED
    worker.finish(rows.optim_step(run, 3))
    TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=None)
    sessions.heartbeat(run.session)
    assert shown(alice, run) == DisplayState.WAITING_FOR_CLIENT


def test_an_outage_of_the_server_parks_nothing(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    worker.finish(rows.optim_step(run, 1))
    TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=None)
    let_time_pass(3 * 3600)
    assert shown(alice, run) == DisplayState.WAITING_FOR_CLIENT
    assert ServerClock.objects.get().uptime_s <= 2 * sessions.TICK_S + 1


def test_a_client_that_was_heard_is_not_silent(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    worker.finish(rows.optim_step(run, 1))
    be_silent(run)
    sessions.heartbeat(run.session)
    let_time_pass(sessions.TICK_S)
    assert shown(alice, run) == DisplayState.WAITING_FOR_CLIENT


def test_a_run_is_at_work_while_samples_of_its_weights_are_drawn(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    session = rows.make_sampling_session(alice, rows.make_checkpoint(run, kind="sampler_weights"))
    TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=None, tokens_per_s=7.0)
    assert shown(alice, run) == DisplayState.WAITING_FOR_CLIENT
    pks = [rows.sample(session, seq) for seq in range(2)]
    assert shown(alice, run) == DisplayState.RUNNING
    assert row_of(alice, run).tokens_per_s == 7.0
    rows.answer_sample(pks[0])
    workers.stop(worker.row)
    assert shown(alice, run) == DisplayState.WAITING_FOR_WORKER
    run.refresh_from_db()
    assert waiting.reason_of_run(run) == waiting.NO_WORKER
    rows.answer_sample(pks[1])
    assert (
        shown(alice, run) == DisplayState.RUNNING
    )  # its client, which has the answers now, goes on in a moment
    Operation.objects.filter(pk__in=pks).update(finished_at=Now() - timedelta(seconds=10))
    assert shown(alice, run) == DisplayState.WAITING_FOR_CLIENT


def test_samples_that_its_client_does_not_wait_for_leave_a_run_as_it_is(
    alice: User, bob: User, run: TrainingRun, worker: HandWorker
) -> None:
    checkpoint = rows.make_checkpoint(run, is_public=True)
    TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=None)
    weights = playground.Weights(base_model=rows.BASE_MODEL, checkpoint=checkpoint)
    rows.sample(rows.make_sampling_session(alice), 0)
    rows.sample(rows.make_sampling_session(bob, checkpoint), 0)
    rows.talk(playground.open_sampling(playground.open_session(alice), weights, seq_id=0))
    assert shown(alice, run) == DisplayState.WAITING_FOR_CLIENT
    sessions.finish(run.session, "success")
    rows.sample(rows.make_sampling_session(alice, checkpoint), 0)
    assert shown(alice, run) == DisplayState.CLOSED


def test_a_loop_that_was_told_to_stop_is_stopping_unless_something_keeps_it(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    worker.hold(run)
    rows.make_recipe(run, state="stopping")
    assert shown(alice, run) == DisplayState.STOPPING
    assert row_of(alice, run).tone == "warn"
    workers.stop(worker.row)
    assert shown(alice, run) == DisplayState.WAITING_FOR_WORKER
    Recipe.objects.filter(run=run).update(state="discarding")
    rows.report_base_model(HandWorker().row)
    worker.finish(Operation.objects.get(run=run, seq=0).pk)
    assert shown(alice, run) == DisplayState.STOPPING


@pytest.mark.parametrize(
    ("reason", "state"), [("success", DisplayState.CLOSED), ("interrupted", DisplayState.STOPPED)]
)
def test_a_finished_session_ends_its_runs_and_refuses_more(
    reason: str, state: DisplayState, alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    first = rows.optim_step(run, 1)
    sessions.finish(run.session, reason)
    assert shown(alice, run) == DisplayState.QUEUED  # what was asked for before is still done
    worker.finish(first)
    assert shown(alice, run) == state
    run.session.refresh_from_db()
    assert rows.optim_step(run, 1) == first
    assert rows.optim_step(run, 2)  # sent before, and held up on its way
    assert run.session.finished_at is not None
    run.session.finished_at -= timedelta(seconds=operations.LATE_S)
    assert rows.optim_step(run, 2)
    with pytest.raises(SessionFinished):
        rows.optim_step(run, 3)
    unload = Submission(kind=Operation.Kind.UNLOAD_MODEL, seq=3, payload=b"{}")
    assert operations.submit(run, unload)


@pytest.mark.parametrize(
    ("reason", "state"), [("success", DisplayState.CLOSED), ("errored", DisplayState.STOPPED)]
)
def test_a_run_that_was_let_go_is_shown_as_its_client_left_it(
    reason: str, state: DisplayState, alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    worker.finish(rows.optim_step(run, 1))
    sessions.finish(run.session, reason)
    TrainingRun.objects.filter(pk=run.pk).update(state=TrainingRun.State.CLOSED, last_applied_at=Now())
    assert shown(alice, run) == state
    before = Now() - timedelta(minutes=1)  # it was let go by its client, which went on with others
    TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=before)
    assert shown(alice, run) == DisplayState.CLOSED


def test_a_divergence_is_on_the_badge(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    worker.hold(run)
    assert (row_of(alice, run).has_diverged, row_of(alice, run).tone) == (False, "good")
    RunEvent.objects.create(run=run, seq=1, kind="diverged")
    assert (row_of(alice, run).has_diverged, row_of(alice, run).tone) == (True, "bad")


def test_a_run_behind_others_says_behind_how_many(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    worker.hold(run)
    assert waiting.reason_of_run(run) == ""
    later = rows.make_run(alice)
    assert waiting.reason_of_run(later) == "queued behind 1 run"
    worker.hold(later)
    later.refresh_from_db()
    assert waiting.reason_of_run(later) == ""


def test_a_run_that_only_drained_workers_could_take_waits_and_says_so(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    workers.describe(
        worker.row, device="cpu", dtype="float32", fingerprints={rows.BASE_MODEL: {"torch": "2"}}
    )
    worker.hold(run)
    operation = Operation.objects.get(run=run)
    workers.drain(worker.row)
    assert shown(alice, run) == DisplayState.RUNNING  # until its worker has let it go
    assert waiting.reason_of(operation) == ""
    assert workers.outlook() == workers.Outlook(has_worker=True, stranded=[rows.BASE_MODEL], num_waiting=0)
    worker.release(run)
    assert shown(alice, run) == DisplayState.WAITING_FOR_WORKER
    run.refresh_from_db()
    operation.refresh_from_db()
    assert waiting.reason_of(operation) == waiting.reason_of_run(run) == waiting.ALL_DRAINED
    assert workers.outlook().num_waiting == 1
    workers.resume(worker.row)
    assert shown(alice, run) == DisplayState.QUEUED
    assert waiting.reason_of(operation) == ""
    assert workers.outlook() == workers.Outlook(has_worker=True, stranded=[], num_waiting=0)
