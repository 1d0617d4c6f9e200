"""Checkpoints after they were made, and the files they stand for."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from django.db.models.functions import Now

from runs import ids
from runs.exceptions import NotFound, RequestInvalid
from runs.models import Checkpoint, TrainingRun, User
from runs.services import access, blobs, checkpoints, commits
from tests.services import rows
from tests.services.hand_worker import HandWorker


def path_of(checkpoint: Checkpoint) -> ids.CheckpointPath:
    return ids.CheckpointPath(checkpoint.run.public_id, checkpoint.kind, checkpoint.name)


def folder_of(checkpoint: Checkpoint) -> Path:
    return Path(default_storage.path(checkpoint.directory))


def test_deleting_removes_row_and_files(run: TrainingRun) -> None:
    one, two = rows.make_checkpoint(run, "one"), rows.make_checkpoint(run, "two")
    assert len(list(folder_of(one).iterdir())) == len(rows.FILES)
    checkpoints.delete(one)
    assert not folder_of(one).exists()
    assert folder_of(two).exists()
    assert list(Checkpoint.objects.filter(run=run)) == [two]


def test_the_expired_are_deleted_with_their_files(run: TrainingRun) -> None:
    past, future, lasting = (rows.make_checkpoint(run, name) for name in ("past", "future", "lasting"))
    checkpoints.set_ttl(future, 3600)
    checkpoints.set_ttl(past, 3600)
    Checkpoint.objects.filter(pk=past.pk).update(expires_at=Now() - timedelta(seconds=1))
    assert checkpoints.delete_expired() == 1
    assert not folder_of(past).exists()
    assert folder_of(future).exists()
    assert set(Checkpoint.objects.filter(run=run)) == {future, lasting}


def test_what_a_fork_has_not_loaded_yet_stays(run: TrainingRun, alice: User, worker: HandWorker) -> None:
    checkpoint, other = rows.make_checkpoint(run, "one"), rows.make_checkpoint(run, "two")
    fork = rows.make_run(alice)
    TrainingRun.objects.filter(pk=fork.pk).update(
        parent=run, parent_path=str(path_of(checkpoint)), name="child"
    )
    Checkpoint.objects.filter(pk=checkpoint.pk).update(expires_at=Now() - timedelta(seconds=1))
    checkpoints.delete(other)
    assert checkpoints.delete_expired() == 0
    with pytest.raises(RequestInvalid, match="cannot delete one while the fork child has not loaded it"):
        checkpoints.delete(checkpoint)
    assert folder_of(checkpoint).exists()
    fence = worker.hold(fork).fence
    commits.register_snapshot(fork.pk, fence=fence, seq=0, directory="snapshots/x", size_bytes=1)
    checkpoints.delete(checkpoint)
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
