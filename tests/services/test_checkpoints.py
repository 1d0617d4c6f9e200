"""Checkpoints after they were made, and the files they stand for."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from django.db import transaction
from django.db.models.functions import Now
from pytest_django import DjangoCaptureOnCommitCallbacks

from runs import ids
from runs.exceptions import NotFound
from runs.models import Checkpoint, Operation, TrainingRun, User
from runs.services import (
    access,
    blobs,
    checkpoints,
    commits,
    deletions,
    expired_operations,
    loads,
    operations,
    recipe_steps,
    run_deletion,
    state_folders,
)
from runs.services.commits import NewCheckpoint
from tests.services import rows
from tests.services.hand_worker import HandWorker, applied, commit_of


def path_of(checkpoint: Checkpoint) -> ids.CheckpointPath:
    return ids.CheckpointPath(checkpoint.run.public_id, checkpoint.kind, checkpoint.name)


def folder_of(checkpoint: Checkpoint) -> Path:
    return Path(default_storage.path(checkpoint.directory))


def test_deleting_removes_row_and_files(
    run: TrainingRun, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    one, two = rows.make_checkpoint(run, "one"), rows.make_checkpoint(run, "two")
    assert len(list(folder_of(one).iterdir())) == len(rows.FILES)
    with django_capture_on_commit_callbacks(execute=True):
        checkpoints.delete(one)
        assert folder_of(one).exists()  # or a crash now would leave a row without files
    assert not folder_of(one).exists()
    assert folder_of(two).exists()
    assert list(Checkpoint.objects.filter(run=run)) == [two]


def test_many_are_deleted_at_once(
    run: TrainingRun, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    one, two, three = (rows.make_checkpoint(run, name) for name in ("one", "two", "three"))
    with django_capture_on_commit_callbacks(execute=True):
        checkpoints.delete(one, three)
    assert list(Checkpoint.objects.filter(run=run)) == [two]
    assert [folder_of(each).exists() for each in (one, two, three)] == [False, True, False]


def test_what_is_deleted_in_vain_keeps_its_files(
    run: TrainingRun, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    checkpoint = rows.make_checkpoint(run)
    with django_capture_on_commit_callbacks(execute=True), transaction.atomic():
        checkpoints.delete(checkpoint)
        transaction.set_rollback(True)
    assert [name for name, _ in checkpoints.files(checkpoint)] == list(rows.FILES)
    assert Checkpoint.objects.filter(pk=checkpoint.pk).exists()


def test_the_expired_are_deleted_with_their_files(
    run: TrainingRun, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    past, future, lasting = (rows.make_checkpoint(run, name) for name in ("past", "future", "lasting"))
    checkpoints.set_ttl(future, 3600)
    checkpoints.set_ttl(past, 3600)
    Checkpoint.objects.filter(pk=past.pk).update(expires_at=Now() - timedelta(seconds=1))
    with django_capture_on_commit_callbacks(execute=True):
        assert checkpoints.delete_expired() == 1
    assert not folder_of(past).exists()
    assert folder_of(future).exists()
    assert set(Checkpoint.objects.filter(run=run)) == {future, lasting}


@pytest.mark.parametrize("how", ["deleted", "expired", "overwritten", "discarded", "pruned", "run deleted"])
def test_files_stay_until_a_fork_has_loaded_them(
    run: TrainingRun,
    alice: User,
    worker: HandWorker,
    monkeypatch: pytest.MonkeyPatch,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
    how: str,
) -> None:
    monkeypatch.setattr(state_folders, "NUM_TURNS", 1)
    checkpoint = rows.make_checkpoint(run, "step-000001", folder="5-1-aaaaaaaa")
    other = rows.make_checkpoint(run, "step-000002", folder="6-1-bbbbbbbb")
    fork = rows.make_fork(checkpoint, alice)
    with django_capture_on_commit_callbacks(execute=True):
        take_away(checkpoint, how, worker)
    state_folders.delete_orphans()
    deletions.add_loaded()
    deletions.delete_due()
    assert not Checkpoint.objects.filter(run=run, directory=checkpoint.directory).exists()
    assert len(list(folder_of(checkpoint).iterdir())) == len(rows.FILES)
    assert folder_of(other).exists() == Checkpoint.objects.filter(pk=other.pk).exists()
    keep_states(fork, worker)
    deletions.add_loaded()
    deletions.delete_due()
    assert not folder_of(checkpoint).exists()
    assert not Operation.objects.exclude(loads_from="").exists()


def take_away(checkpoint: Checkpoint, how: str, worker: HandWorker) -> None:
    """Let a checkpoint end in one of the ways there are."""
    run = checkpoint.run
    if how == "deleted":
        checkpoints.delete(checkpoint)
    elif how == "expired":
        Checkpoint.objects.filter(pk=checkpoint.pk).update(expires_at=Now() - timedelta(seconds=1))
        assert checkpoints.delete_expired() == 1
    elif how == "overwritten":
        overwrite(checkpoint, worker)
    elif how == "discarded":
        recipe_steps.delete_weights(rows.make_recipe(run, state="discarding"))
    elif how == "pruned":
        Checkpoint.objects.filter(pk=checkpoint.pk).update(step=0)
        Checkpoint.objects.filter(run=run).exclude(pk=checkpoint.pk).update(step=1)
        recipe_steps.prune(rows.make_recipe(run, state="running"), keep=1)
    else:
        Operation.objects.filter(run=run).update(state=Operation.State.DONE)
        run_deletion.delete(run)


def keep_states(run: TrainingRun, worker: HandWorker) -> None:
    """Keep states of the run's own, so that its first operation is never done again."""
    fence = worker.hold(run).fence
    Operation.objects.filter(run=run).update(state=Operation.State.DONE)
    for seq in (0, 1):
        commits.register_snapshot(run.pk, fence=fence, seq=seq, directory="snapshots/0/x", size_bytes=1)
    expired_operations.forget()


@pytest.mark.parametrize("end", ["failed", "closed", "refused", "deleted"])
def test_files_do_not_wait_for_a_fork_that_will_not_load_them(
    run: TrainingRun,
    alice: User,
    end: str,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    checkpoint = rows.make_checkpoint(run, "one")
    fork = rows.make_fork(checkpoint, alice)
    with django_capture_on_commit_callbacks(execute=True):
        checkpoints.delete(checkpoint)
    assert folder_of(checkpoint).exists()
    if end == "refused":
        Operation.objects.filter(run=fork).update(state=Operation.State.FAILED)
    elif end == "deleted":
        Operation.objects.filter(run=fork).update(state=Operation.State.DONE)
        with django_capture_on_commit_callbacks(execute=True):
            run_deletion.delete(fork)
    else:
        Operation.objects.filter(run=fork).update(state=Operation.State.DONE)
        TrainingRun.objects.filter(pk=fork.pk).update(state=end, applied_seq=0)
    expired_operations.forget()
    deletions.add_loaded()
    deletions.delete_due()
    assert not folder_of(checkpoint).exists()


def test_a_loaded_checkpoint_keeps_its_files(run: TrainingRun, alice: User, worker: HandWorker) -> None:
    checkpoint = rows.make_checkpoint(run, "one")
    keep_states(rows.make_fork(checkpoint, alice), worker)
    deletions.add_loaded()
    deletions.delete_due()
    assert folder_of(checkpoint).exists()


def test_a_load_into_a_run_needs_its_files_until_two_later_states_are_kept(
    run: TrainingRun,
    worker: HandWorker,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    checkpoint = rows.make_checkpoint(run, "one")
    seq = operations.next_seq(run)
    load = loads.submission(
        Operation.Kind.LOAD_WEIGHTS,
        seq=seq,
        path=str(path_of(checkpoint)),
        with_optimizer=True,
        directory=checkpoint.directory,
    )
    operations.submit(run, load)
    fence = worker.hold(run).fence
    Operation.objects.filter(run=run).update(state=Operation.State.DONE)
    with django_capture_on_commit_callbacks(execute=True):
        checkpoints.delete(checkpoint)
    for kept_seq in (seq - 1, seq, seq + 1):  # the newest may turn out to be torn
        expired_operations.forget()
        deletions.add_loaded()
        deletions.delete_due()
        assert folder_of(checkpoint).exists()
        commits.register_snapshot(run.pk, fence=fence, seq=kept_seq, directory="snapshots/0/x", size_bytes=1)
    expired_operations.forget()
    deletions.add_loaded()
    deletions.delete_due()
    assert not folder_of(checkpoint).exists()


def test_overwriting_what_nobody_needs_removes_its_files(
    run: TrainingRun, worker: HandWorker, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    checkpoint = rows.make_checkpoint(run, "final")
    with django_capture_on_commit_callbacks(execute=True):
        overwrite(checkpoint, worker)
        assert folder_of(checkpoint).exists()
    assert not folder_of(checkpoint).exists()


def overwrite(checkpoint: Checkpoint, worker: HandWorker) -> None:
    """Save other weights under the checkpoint's name."""
    run = TrainingRun.objects.get(pk=checkpoint.run_id)
    seq = run.applied_seq + 1
    new = NewCheckpoint(
        kind=checkpoint.kind,
        name=checkpoint.name,
        directory=f"checkpoints/{run.pk}/new",
        size_bytes=1,
        overwrite=True,
    )
    step = applied(rows.optim_step(run, seq), seq, checkpoint=new)
    assert commits.commit_all([commit_of(worker.hold(run), [step], from_seq=run.applied_seq)]) == [True]
    worker.release(run)


def test_what_a_crash_left_of_deleted_weights_is_removed_later(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_folders, "NUM_TURNS", 1)
    checkpoint = rows.make_checkpoint(run, folder="5-1-aaaaaaaa")
    checkpoints.delete(checkpoint)  # nothing is committed here, so this is all that happens before the crash
    assert folder_of(checkpoint).exists()
    state_folders.delete_orphans()
    assert not folder_of(checkpoint).exists()


def test_a_lifetime_can_be_taken_away(run: TrainingRun) -> None:
    checkpoint = rows.make_checkpoint(run)
    checkpoints.set_ttl(checkpoint, 3600)
    checkpoints.set_ttl(checkpoint, None)
    checkpoint.refresh_from_db()
    assert checkpoint.expires_at is None


def test_published_means_readable_by_others_and_no_more(alice: User, bob: User, run: TrainingRun) -> None:
    checkpoint = rows.make_checkpoint(run)
    path = path_of(checkpoint)
    with pytest.raises(NotFound):
        access.get_readable_checkpoint(bob, path)
    for _ in range(2):
        checkpoints.set_public(checkpoint, is_public=True)
    assert access.get_readable_checkpoint(bob, path) == checkpoint
    with pytest.raises(NotFound):
        access.get_checkpoint(bob, path)
    checkpoints.set_public(checkpoint, is_public=False)
    with pytest.raises(NotFound):
        access.get_readable_checkpoint(bob, path)
    assert access.get_checkpoint(alice, path) == checkpoint


def test_ephemeral_weights_are_nobodys_checkpoint(alice: User, run: TrainingRun) -> None:
    checkpoint = rows.make_checkpoint(run, kind=Checkpoint.Kind.SAMPLER)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_ephemeral=True)
    assert not access.checkpoints_of(alice).exists()
    for get in (access.get_checkpoint, access.get_readable_checkpoint):
        with pytest.raises(NotFound):
            get(alice, path_of(checkpoint))


def test_files_come_in_order_with_or_without_the_optimizer(run: TrainingRun) -> None:
    checkpoint = rows.make_checkpoint(run)
    assert [(name, file.read()) for name, file in checkpoints.files(checkpoint)] == [
        (name, name.encode()) for name in rows.FILES
    ]
    adapter = [name for name, _ in checkpoints.files(checkpoint, with_optimizer=False)]
    assert adapter == list(rows.FILES[:2])


def test_a_payload_is_stored_once_under_its_digest(db: None) -> None:
    name = blobs.put("ab" * 32, b"content")
    assert blobs.put("ab" * 32, b"content") == name
    assert name == f"payloads/ab/{'ab' * 32}"
    assert blobs.get(name) == b"content"


def test_deleting_a_folder_that_is_gone_is_no_error(db: None) -> None:
    blobs.delete_folder("checkpoints/none")
