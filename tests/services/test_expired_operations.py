"""Payloads and results go when nobody can need them: never one that a replay or a client still may."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from django.db.models.functions import Now
from pytest_django.fixtures import DjangoCaptureOnCommitCallbacks, Settings

from runs.models import Evaluation, Operation, PendingDeletion, Recipe, Snapshot, TrainingRun, User
from runs.services import claims, commits, deletions, expired_operations, operations, payload_files
from runs.services.operations import Submission
from tests.services import rows
from tests.services.flaky_bucket import use_flaky_bucket
from tests.services.hand_worker import HandWorker

NUM_OPERATIONS = 8


@pytest.fixture
def applied(run: TrainingRun, worker: HandWorker, settings: Settings) -> TrainingRun:
    """Return a run whose operations 0 to 8 are done, with payloads in files, and with one that waits."""
    settings.INLINE_PAYLOAD_BYTES = 4
    for seq in range(1, NUM_OPERATIONS + 1):
        submit(run, seq)
    worker.finish(Operation.objects.get(run=run, seq=NUM_OPERATIONS).pk)
    submit(run, NUM_OPERATIONS + 1)
    for name in (
        Operation.objects.filter(run=run).exclude(payload_file="").values_list("payload_file", flat=True)
    ):
        os.utime(default_storage.path(name), (0, 0))
    return run


def submit(run: TrainingRun, seq: int) -> int:
    content = f"payload {run.pk} {seq}".encode()
    return operations.submit(run, Submission(kind=Operation.Kind.OPTIM_STEP, seq=seq, payload=content))


def snapshot(run: TrainingRun, worker: HandWorker, seq: int) -> None:
    fence = worker.hold(run).fence
    commits.register_snapshot(run.pk, fence=fence, seq=seq, directory=f"snapshots/{seq}", size_bytes=1)


def with_payload(run: TrainingRun) -> list[int]:
    """Return the seqs whose payload can be read."""
    return [
        row.seq
        for row in Operation.objects.filter(run=run).order_by("seq")
        if row.payload is not None or (row.payload_file and default_storage.exists(row.payload_file))
    ]


def with_result(run: TrainingRun) -> list[int]:
    found = Operation.objects.filter(run=run, result__isnull=False)
    return sorted(found.values_list("seq", flat=True))


def age_results(run: TrainingRun, up_to_seq: int) -> None:
    finished_at = Now() - expired_operations.KEEP_RESULTS - timedelta(minutes=1)
    Operation.objects.filter(run=run, seq__lte=up_to_seq).update(finished_at=finished_at)


def test_what_comes_after_the_older_kept_snapshot_stays(
    applied: TrainingRun,
    worker: HandWorker,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    everything = list(range(NUM_OPERATIONS + 2))
    for seq in (3, 6):
        expired_operations.forget()
        assert with_payload(applied) == everything  # one snapshot may be unreadable
        snapshot(applied, worker, seq)
    files = list(
        Operation.objects.filter(run=applied, seq__in=(1, 2, 3)).values_list("payload_file", flat=True)
    )
    with django_capture_on_commit_callbacks(execute=True):
        expired_operations.forget()
    assert with_payload(applied) == everything[4:]
    assert not any(default_storage.exists(name) for name in files)
    assert claims.has_payloads_after(applied.pk, 3)
    assert not claims.has_payloads_after(applied.pk, 2)
    replayed = list(claims.applied_operations(applied.pk, after_seq=3, up_to_seq=NUM_OPERATIONS))
    assert [taken.payload for taken in replayed] == [
        f"payload {applied.pk} {taken.seq}".encode() for taken in replayed
    ]
    snapshot(applied, worker, 8)
    with django_capture_on_commit_callbacks(execute=True):
        expired_operations.forget()
    assert with_payload(applied) == everything[7:]


def test_a_request_that_comes_again_is_still_known(applied: TrainingRun, worker: HandWorker) -> None:
    for seq in (7, 8):
        snapshot(applied, worker, seq)
    first = Operation.objects.get(run=applied, seq=2).pk
    expired_operations.forget()
    assert submit(applied, 2) == first


def test_results_stay_as_long_as_clients_may_ask(applied: TrainingRun, worker: HandWorker) -> None:
    for seq in (6, 8):
        snapshot(applied, worker, seq)
    expired_operations.forget()
    assert with_result(applied) == list(range(NUM_OPERATIONS + 1))
    age_results(applied, 3)
    expired_operations.forget()
    assert with_result(applied) == list(range(4, NUM_OPERATIONS + 1))
    age_results(applied, 8)
    expired_operations.forget()
    assert with_result(applied) == [7, 8]  # after the older snapshot: a replay compares them


def test_a_refused_operation_does_not_keep_the_young_results_before_it(
    applied: TrainingRun, worker: HandWorker
) -> None:
    for seq in (7, 8):
        snapshot(applied, worker, seq)
    Operation.objects.filter(run=applied, seq=4).update(state="failed", result=None, finished_at=None)
    expired_operations.forget()
    assert with_result(applied) == [0, 1, 2, 3, 5, 6, 7, 8]
    age_results(applied, 8)
    expired_operations.forget()
    assert with_result(applied) == [8]


def test_a_snapshot_whose_files_a_bucket_keeps_is_deleted_later(
    run: TrainingRun,
    worker: HandWorker,
    settings: Settings,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    use_flaky_bucket(settings)
    worker.finish(Operation.objects.get(run=run, seq=0).pk)
    snapshot(run, worker, 0)
    TrainingRun.objects.filter(pk=run.pk).update(state=TrainingRun.State.CLOSED)
    with django_capture_on_commit_callbacks(execute=True):
        expired_operations.forget()
    assert with_payload(run) == []
    assert not Snapshot.objects.filter(run=run).exists()
    assert PendingDeletion.objects.update(due_at=Now()) == 1
    deletions.delete_due()
    assert not PendingDeletion.objects.exists()


def test_results_stay_until_the_loop_has_read_them(applied: TrainingRun, worker: HandWorker) -> None:
    for seq in (7, 8):
        snapshot(applied, worker, seq)
    age_results(applied, 8)
    recipe = rows.make_recipe(applied, state="running")
    Recipe.objects.filter(pk=recipe.pk).update(watched_seq=5)
    evaluation = Evaluation.objects.create(run=applied, step=1, first_seq=3, last_seq=4)
    expired_operations.forget()
    assert with_result(applied) == list(range(3, 9))
    Evaluation.objects.filter(pk=evaluation.pk).update(loss=1.0)
    expired_operations.forget()
    assert with_result(applied) == [6, 7, 8]


def test_of_an_ended_run_nobody_reads_results_any_more(applied: TrainingRun, worker: HandWorker) -> None:
    """A discarded run ends without its loop's last look; it must not stay on the list for ever."""
    worker.finish(Operation.objects.get(run=applied, seq=NUM_OPERATIONS + 1).pk)
    age_results(applied, NUM_OPERATIONS + 1)
    recipe = rows.make_recipe(applied, state="discarded")
    Recipe.objects.filter(pk=recipe.pk).update(watched_seq=5)
    TrainingRun.objects.filter(pk=applied.pk).update(state=TrainingRun.State.CLOSED)
    expired_operations.forget()
    assert with_result(applied) == []


def test_runs_whose_results_are_young_do_not_keep_others_from_their_turn(
    applied: TrainingRun, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expired_operations, "_RUNS_AT_ONCE", 1)
    runs = [applied, *(rows.make_run(applied.owner) for _ in range(2))]
    for run in runs:
        TrainingRun.objects.filter(pk=run.pk).update(state=TrainingRun.State.CLOSED)
        for operation in Operation.objects.filter(run=run, state="queued").order_by("seq"):
            worker.finish(operation.pk)
    for _ in range(100):
        expired_operations.forget()
    assert [with_payload(run) for run in runs] == [[], [], []]


def test_an_ended_run_is_never_replayed_once_nothing_waits(applied: TrainingRun, worker: HandWorker) -> None:
    snapshot(applied, worker, 8)
    TrainingRun.objects.filter(pk=applied.pk).update(state=TrainingRun.State.CLOSED)
    expired_operations.forget()
    assert len(with_payload(applied)) == NUM_OPERATIONS + 2
    assert Snapshot.objects.filter(run=applied).exists()
    worker.finish(Operation.objects.get(run=applied, seq=NUM_OPERATIONS + 1).pk)
    expired_operations.forget()
    assert with_payload(applied) == []
    assert not Snapshot.objects.filter(run=applied).exists()


def test_a_long_log_goes_in_batches(
    applied: TrainingRun, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expired_operations, "_BATCH", 2)
    monkeypatch.setattr(expired_operations, "_BATCHES_AT_ONCE", 2)
    for seq in (7, 8):
        snapshot(applied, worker, seq)
    expired_operations.forget()
    assert with_payload(applied)[0] == 4
    expired_operations.forget()
    assert with_payload(applied)[0] == 8


def test_another_run_with_the_same_payload_keeps_the_file(
    applied: TrainingRun,
    worker: HandWorker,
    alice: User,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    other = rows.make_run(alice)
    shared = Submission(kind=Operation.Kind.OPTIM_STEP, seq=1, payload=f"payload {applied.pk} 1".encode())
    operations.submit(other, shared)
    name = Operation.objects.get(run=other, seq=1).payload_file
    os.utime(default_storage.path(name), (0, 0))
    for seq in (7, 8):
        snapshot(applied, worker, seq)
    with django_capture_on_commit_callbacks(execute=True):
        expired_operations.forget()
    assert default_storage.exists(name)


def test_orphans_are_found_in_turn(applied: TrainingRun) -> None:
    held = set(Operation.objects.exclude(payload_file="").values_list("payload_file", flat=True))
    orphan = Path(default_storage.path("payloads/ab/" + "ab" * 32))
    torn = orphan.with_name(".tmp-abc")
    fresh = orphan.with_name("ab" + "cd" * 31)
    orphan.parent.mkdir(parents=True, exist_ok=True)
    for path in (orphan, torn, fresh):
        path.write_bytes(b"nobody's")
    for path in (orphan, torn):
        os.utime(path, (0, 0))
    assert sum(payload_files.delete_orphans(minute=minute) for minute in range(7, 39)) >= 2
    assert not orphan.exists()
    assert not torn.exists()
    assert fresh.exists()
    assert all(default_storage.exists(name) for name in held)
