"""Checkpoints after they were made: list, publish, expire, delete, read their files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import partial

from django.core.files.base import File
from django.core.files.storage import default_storage
from django.db import transaction
from django.db.models import QuerySet
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


def delete(*chosen: Checkpoint) -> None:
    """Delete all of them or none: the rows, and the files once that is committed.

    Raises:
        RequestInvalid: a fork has not loaded the weights of one yet.
    """
    with transaction.atomic():
        for checkpoint in chosen:
            _refuse_if_needed(checkpoint)
        for checkpoint in chosen:
            discard(checkpoint)


def discard(checkpoint: Checkpoint) -> None:
    """Delete the row, whoever needs it, and the files once that is committed.

    The files of one that a fork has not loaded yet stay until `services.state_folders` finds them unneeded; so do
    those that a crash or a storage that is away leaves behind.
    """
    is_needed = _fork_that_needs(checkpoint) is not None
    Checkpoint.objects.filter(pk=checkpoint.pk).delete()
    if not is_needed:
        transaction.on_commit(partial(blobs.delete_folder, checkpoint.directory), robust=True)


def discard_unneeded(checkpoints: Iterable[Checkpoint]) -> int:
    """Delete those that no fork still needs; returns how many."""
    unneeded = [checkpoint for checkpoint in checkpoints if _fork_that_needs(checkpoint) is None]
    for checkpoint in unneeded:
        discard(checkpoint)
    return len(unneeded)


def delete_expired() -> int:
    """Delete every checkpoint whose time has come, unless a fork still needs it; returns how many."""
    return discard_unneeded(Checkpoint.objects.filter(expires_at__lte=Now()).select_related("run"))


def forks_to_load(run_pk: int) -> QuerySet[TrainingRun]:
    """Return the runs that start from a checkpoint of this one and have no state of their own kept yet."""
    return TrainingRun.objects.filter(parent_id=run_pk, state=TrainingRun.State.OPEN, snapshots=None)


def words_for(fork: TrainingRun, *, owner_id: int) -> tuple[str, str]:
    """Return what to call a fork that is in the way, and what to do; another person's is not named."""
    if fork.owner_id != owner_id:
        return "somebody else's fork", "wait until it has"
    return f"the fork {fork.name or fork.public_id}", "wait until it has, or delete the fork first"


def _fork_that_needs(checkpoint: Checkpoint) -> TrainingRun | None:
    return forks_to_load(checkpoint.run_id).filter(parent_path=sampling.path_of(checkpoint)).first()


def _refuse_if_needed(checkpoint: Checkpoint) -> None:
    fork = _fork_that_needs(checkpoint)
    if fork is not None:
        who, advice = words_for(fork, owner_id=checkpoint.owner_id)
        raise RequestInvalid(f"cannot delete {checkpoint.name} while {who} has not loaded it; {advice}")


def files(checkpoint: Checkpoint, *, with_optimizer: bool = True) -> Iterator[tuple[str, File[bytes]]]:
    """Yield (name, open file) of everything the checkpoint holds."""
    _, names = default_storage.listdir(checkpoint.directory)
    for name in sorted(names):
        if with_optimizer or name in ("adapter_model.safetensors", "adapter_config.json"):
            with default_storage.open(f"{checkpoint.directory}/{name}") as file:
                yield name, file
