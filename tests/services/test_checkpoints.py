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
from runs.exceptions import NotFound, RequestInvalid
from runs.models import Checkpoint, TrainingRun, User
from runs.services import access, blobs, checkpoints, commits, recipe_steps, state_folders
from runs.services.commits import NewCheckpoint
from tests.services import rows
from tests.services.hand_worker import HandWorker, applied, commit_of


def path_of(checkpoint: Checkpoint) -> ids.CheckpointPath:
    return ids.CheckpointPath(checkpoint.run.public_id, checkpoint.kind, checkpoint.name)


def folder_of(checkpoint: Checkpoint) -> Path:
    return Path(default_storage.path(checkpoint.directory))


def fork_of(checkpoint: Checkpoint, owner: User) -> TrainingRun:
    """Make a run that starts from the checkpoint and has not loaded it."""
    fork = rows.make_run(owner)
    TrainingRun.objects.filter(pk=fork.pk).update(
        parent=checkpoint.run, parent_path=str(path_of(checkpoint)), name="child"
    )
    return fork


def load(fork: TrainingRun, worker: HandWorker) -> None:
    """Keep a first state of the fork's own."""
    fence = worker.hold(fork).fence
    commits.register_snapshot(fork.pk, fence=fence, seq=0, directory="snapshots/x", size_bytes=1)


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


def test_all_are_deleted_or_none(
    run: TrainingRun, alice: User, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    one, two = rows.make_checkpoint(run, "one"), rows.make_checkpoint(run, "two")
    fork = fork_of(two, alice)
    with (
        django_capture_on_commit_callbacks(execute=True),
        pytest.raises(RequestInvalid, match="cannot delete two while the fork child has not loaded it"),
    ):
        checkpoints.delete(one, two)
    assert set(Checkpoint.objects.filter(run=run)) == {one, two}
    assert folder_of(one).exists()
    TrainingRun.objects.filter(pk=fork.pk).update(state="failed")
    with django_capture_on_commit_callbacks(execute=True):
        checkpoints.delete(one, two)
    assert not Checkpoint.objects.filter(run=run).exists()
    assert not folder_of(one).exists()
    assert not folder_of(two).exists()


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


def test_what_a_fork_has_not_loaded_yet_stays(
    run: TrainingRun,
    alice: User,
    worker: HandWorker,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    checkpoint, other = rows.make_checkpoint(run, "one"), rows.make_checkpoint(run, "two")
    fork = fork_of(checkpoint, alice)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(expires_at=Now() - timedelta(seconds=1))
    checkpoints.delete(other)
    assert checkpoints.delete_expired() == 0
    with pytest.raises(RequestInvalid, match="cannot delete one while the fork child has not loaded it"):
        checkpoints.delete(checkpoint)
    assert folder_of(checkpoint).exists()
    load(fork, worker)
    with django_capture_on_commit_callbacks(execute=True):
        checkpoints.delete(checkpoint)
    assert not folder_of(checkpoint).exists()


def test_another_persons_fork_is_not_named(run: TrainingRun, bob: User) -> None:
    checkpoint = rows.make_checkpoint(run, "one", is_public=True)
    fork = fork_of(checkpoint, bob)
    with pytest.raises(RequestInvalid, match="cannot delete one while somebody else's fork") as refused:
        checkpoints.delete(checkpoint)
    assert "child" not in refused.value.message
    assert fork.public_id not in refused.value.message


def test_pruning_leaves_what_a_fork_has_not_loaded_yet(
    run: TrainingRun,
    alice: User,
    worker: HandWorker,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    made = [rows.make_checkpoint(run, f"step-{step:06d}") for step in (1, 2, 3)]
    recipe, fork = rows.make_recipe(run, state="running"), fork_of(made[0], alice)
    with django_capture_on_commit_callbacks(execute=True):
        recipe_steps.prune(recipe, keep=1)
    assert [folder_of(one).exists() for one in made] == [True, False, True]
    assert set(Checkpoint.objects.filter(run=run)) == {made[0], made[2]}
    load(fork, worker)
    with django_capture_on_commit_callbacks(execute=True):
        recipe_steps.prune(recipe, keep=1)
    assert [folder_of(one).exists() for one in made] == [False, False, True]


@pytest.mark.parametrize("how", ["overwritten", "discarded"])
def test_the_files_of_weights_without_a_row_stay_until_their_fork_has_loaded_them(
    run: TrainingRun,
    alice: User,
    worker: HandWorker,
    monkeypatch: pytest.MonkeyPatch,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
    how: str,
) -> None:
    monkeypatch.setattr(state_folders, "NUM_TURNS", 1)
    checkpoint = rows.make_checkpoint(run, "final", folder="5-1-aaaaaaaa")
    fork = fork_of(checkpoint, alice)
    with django_capture_on_commit_callbacks(execute=True):
        if how == "overwritten":
            overwrite(checkpoint, worker)
        else:
            recipe_steps.delete_weights(rows.make_recipe(run, state="discarding"))
    assert not Checkpoint.objects.filter(run=run, directory=checkpoint.directory).exists()
    state_folders.delete_orphans()
    assert len(list(folder_of(checkpoint).iterdir())) == len(rows.FILES)
    load(fork, worker)
    state_folders.delete_orphans()
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
        kind=checkpoint.kind, name=checkpoint.name, directory="checkpoints/new", size_bytes=1, overwrite=True
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
