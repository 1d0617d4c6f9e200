"""Checkpoints after they were made: list, publish, expire, delete, read their files."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from django.core.files.base import File
from django.core.files.storage import default_storage
from django.db.models.functions import Now

from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, TrainingRun
from runs.services import blobs, sampling


def set_public(checkpoint: Checkpoint, *, is_public: bool) -> None:
    """Let every user of this server read the checkpoint, or no longer; repeating it is no error."""
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_public=is_public)


def set_ttl(checkpoint: Checkpoint, ttl_seconds: int | None) -> None:
    """Let the checkpoint end after some time from now; None keeps it for ever."""
    expires_at = None if ttl_seconds is None else Now() + timedelta(seconds=ttl_seconds)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(expires_at=expires_at)


def delete(checkpoint: Checkpoint) -> None:
    """Delete the row and then the files.

    Raises:
        RequestInvalid: a fork has not loaded the weights yet.
    """
    fork = _fork_that_needs(checkpoint)
    if fork is not None:
        raise RequestInvalid(
            f"cannot delete {checkpoint.name} while the fork {fork.name or fork.public_id} has not loaded it; "
            "wait until it has, or delete the fork first"
        )
    discard(checkpoint)


def discard(checkpoint: Checkpoint) -> None:
    """Delete the row and then the files, whoever needs them."""
    Checkpoint.objects.filter(pk=checkpoint.pk).delete()
    blobs.delete_folder(checkpoint.directory)


def delete_expired() -> int:
    """Delete every checkpoint whose time has come, unless a fork still needs it; returns how many."""
    expired = Checkpoint.objects.filter(expires_at__lte=Now()).select_related("run")
    unneeded = [checkpoint for checkpoint in expired if _fork_that_needs(checkpoint) is None]
    for checkpoint in unneeded:
        discard(checkpoint)
    return len(unneeded)


def _fork_that_needs(checkpoint: Checkpoint) -> TrainingRun | None:
    """Return a run that starts from the checkpoint and has no state of its own kept yet."""
    forks = TrainingRun.objects.filter(parent_id=checkpoint.run_id, parent_path=sampling.path_of(checkpoint))
    return forks.filter(state=TrainingRun.State.OPEN, snapshots=None).first()


def files(checkpoint: Checkpoint, *, with_optimizer: bool = True) -> Iterator[tuple[str, File[bytes]]]:
    """Yield (name, open file) of everything the checkpoint holds."""
    _, names = default_storage.listdir(checkpoint.directory)
    for name in sorted(names):
        if with_optimizer or name in ("adapter_model.safetensors", "adapter_config.json"):
            with default_storage.open(f"{checkpoint.directory}/{name}") as file:
                yield name, file
