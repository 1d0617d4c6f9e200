"""A save answered before its file is written: applied only then, sampled from only where its weights are."""

from __future__ import annotations

from dataclasses import replace

from runs.models import Checkpoint, Operation, SamplingSession, TrainingRun, User
from runs.services import claims, commits, early_answers, operations, sample_claims, workers
from runs.services.commits import NewCheckpoint, Result, RunCommit
from runs.services.operations import Submission
from tests.services import rows
from tests.services.hand_worker import HandWorker, applied, commit_of

MODELS = [rows.BASE_MODEL]


def save_of(run: TrainingRun, worker: HandWorker) -> tuple[RunCommit, NewCheckpoint]:
    """Submit a save for a sampling session, next in the log, and describe it as the worker that holds the run has it."""
    worker.finish(Operation.objects.get(run=run, seq=0).pk)
    kind = Operation.Kind.SAVE_WEIGHTS_FOR_SAMPLER
    pk = operations.submit(run, Submission(kind=kind, seq=1, payload=b"{}"))
    return commit_of(worker.held[run.pk], [applied(pk, 1)], from_seq=0), new_checkpoint(run, "first")


def new_checkpoint(run: TrainingRun, folder: str) -> NewCheckpoint:
    return NewCheckpoint(
        kind=Checkpoint.Kind.SAMPLER,
        name="ephemeral-1",
        directory=f"checkpoints/{run.pk}/{folder}",
        size_bytes=0,
        is_ephemeral=True,
        sampling_session_seq=1,
    )


def test_it_is_answered_and_not_applied(run: TrainingRun, worker: HandWorker) -> None:
    commit, new = save_of(run, worker)
    for _ in range(2):  # as when the confirmation was lost on its way
        assert early_answers.give(commit, new)
    operation = Operation.objects.get(run=run, seq=1)
    assert (operation.state, bytes(operation.result or b"")) == ("done", b"{}")
    run.refresh_from_db()
    assert run.applied_seq == 0
    checkpoint = SamplingSession.objects.get(run=run).checkpoint
    assert checkpoint is not None
    assert (checkpoint.directory, checkpoint.size_bytes) == (new.directory, 0)
    assert early_answers.is_owed(new.directory)
    assert early_answers.settle(new.directory, 77)
    assert not early_answers.is_owed(new.directory)
    assert commits.commit_all([commit]) == [True]
    run.refresh_from_db()
    assert run.applied_seq == 1
    assert Checkpoint.objects.get(run=run).size_bytes == 77


def test_a_promise_that_cannot_be_kept_is_taken_back(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    commit, new = save_of(run, worker)
    early_answers.give(commit, new)
    sampling_session = SamplingSession.objects.get(run=run)
    pk = rows.sample(sampling_session, 0)
    (op,) = commit.operations
    no_room = replace(op, result=Result(error="no room", category="server"))
    assert commits.commit_all([replace(commit, operations=[no_room])]) == [True]
    assert Operation.objects.get(run=run, seq=1).state == "done"
    assert not Checkpoint.objects.exists()
    (taken,) = sample_claims.take_samples(worker.row, MODELS, limit=9)
    assert (taken.pk, taken.is_lost) == (pk, True)


def test_only_the_owner_answers(run: TrainingRun, worker: HandWorker) -> None:
    commit, new = save_of(run, worker)
    worker.release(run)
    HandWorker().hold(run)
    assert not early_answers.give(commit, new)
    assert not early_answers.give(replace(commit, fence=commit.fence + 1, from_seq=5), new)
    assert Operation.objects.get(run=run, seq=1).state == "queued"
    assert not Checkpoint.objects.exists()


def test_samples_go_where_the_weights_are_until_the_file_is_there(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    commit, new = save_of(run, worker)
    early_answers.give(commit, new)
    pk = rows.sample(SamplingSession.objects.get(run=run), 0)
    other = HandWorker()
    assert sample_claims.take_samples(other.row, MODELS, limit=9) == []
    assert sample_claims.take_samples(other.row, MODELS, limit=9, unwritten=["checkpoints/other"]) == []
    (taken,) = sample_claims.take_samples(worker.row, MODELS, limit=9, unwritten=[new.directory])
    assert (taken.pk, taken.checkpoint_directory) == (pk, new.directory)
    early_answers.settle(new.directory, 77)
    workers.stop(worker.row)
    assert [one.pk for one in sample_claims.take_samples(other.row, MODELS, limit=9)] == [pk]


def test_a_successor_applies_it_once_more_and_owes_the_file(run: TrainingRun, worker: HandWorker) -> None:
    commit, new = save_of(run, worker)
    early_answers.give(commit, new)
    assert claims.claim_runs(HandWorker().row, MODELS) == []  # nothing of it waits
    workers.stop(worker.row)
    successor = HandWorker()
    assert claims.claim_runs(successor.row, MODELS) == []
    (held,) = claims.claim_owing(successor.row, MODELS)
    assert (held.pk, held.applied_seq) == (run.pk, 0)
    (taken,) = claims.take_operations(successor.row, {run.pk: 0}, limit=6)
    assert (taken.seq, taken.is_answered, taken.is_rejected) == (1, True, False)

    again = commit_of(held, [applied(taken.pk, 1)])
    anew = new_checkpoint(run, "second")
    assert early_answers.give(again, anew)
    assert Checkpoint.objects.get(run=run).directory == anew.directory
    assert not early_answers.settle(new.directory, 5)  # the former owner wakes up
    assert early_answers.settle(anew.directory, 77)
    assert commits.commit_all([again]) == [True]
    assert commits.commit_all([commit]) == [False]
    workers.stop(successor.row)
    assert claims.claim_owing(HandWorker().row, MODELS) == []


def test_what_nobody_wants_any_more_is_not_written_and_does_not_come_back(
    run: TrainingRun, worker: HandWorker
) -> None:
    commit, new = save_of(run, worker)
    early_answers.give(commit, new)
    early_answers.withdraw(new.directory)
    assert SamplingSession.objects.get(run=run).checkpoint is None
    assert not early_answers.is_owed(new.directory)
    assert not early_answers.settle(new.directory, 5)
    assert early_answers.give(commit, new)
    assert not Checkpoint.objects.exists()
    assert commits.commit_all([commit]) == [True]
