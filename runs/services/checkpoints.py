"""Checkpoints after they were made: list, publish, expire, delete, read their files."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from django.core.files.base import File
from django.core.files.storage import default_storage
from django.db import transaction
from django.db.models import Count, Sum
from django.db.models.functions import Now

from runs import events
from runs.models import Checkpoint, TrainingRun
from runs.services import deletions
from runs.services.tallies import Total


def total_of_run(run: TrainingRun, *, limit: int) -> Total | None:
    """Return how many checkpoints of the run people named, and what they take; None for more than are to be read."""
    named = Checkpoint.objects.filter(run=run, is_ephemeral=False).order_by("size_bytes", "pk")
    found = Total(**named[: limit + 1].aggregate(num=Count("pk"), size_bytes=Sum("size_bytes", default=0)))
    return found if found.num <= limit else None


def set_public(checkpoint: Checkpoint, *, is_public: bool) -> None:
    """Let every user of this server read the checkpoint, or no longer; repeating it is no error."""
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_public=is_public)
    _tell_pages(checkpoint)


def set_ttl(checkpoint: Checkpoint, ttl_seconds: int | None) -> None:
    """Let the checkpoint end after some time from now; None keeps it for ever."""
    expires_at = None if ttl_seconds is None else Now() + timedelta(seconds=ttl_seconds)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(expires_at=expires_at)
    _tell_pages(checkpoint)


def delete(*chosen: Checkpoint) -> None:
    """Delete all of them or none: the rows, and the files once that is committed.

    The files of one that a run has not loaded yet stay until it has (`services.loads`).
    """
    with transaction.atomic(savepoint=False):
        Checkpoint.objects.filter(pk__in=[one.pk for one in chosen]).delete()
        _tell_pages(*chosen)
        deletions.add(*(one.directory for one in chosen))


def delete_expired() -> int:
    """Delete every checkpoint whose time has come; returns how many."""
    expired = Checkpoint.objects.filter(expires_at__lte=Now())
    delete(*expired)
    return len(expired)


def files(checkpoint: Checkpoint, *, with_optimizer: bool = True) -> Iterator[tuple[str, File[bytes]]]:
    """Yield (name, open file) of everything the checkpoint holds."""
    _, names = default_storage.listdir(checkpoint.directory)
    for name in sorted(names):
        if with_optimizer or name in ("adapter_model.safetensors", "adapter_config.json"):
            with default_storage.open(f"{checkpoint.directory}/{name}") as file:
                yield name, file


def _tell_pages(*changed: Checkpoint) -> None:
    runs = TrainingRun.objects.filter(pk__in={one.run_id for one in changed})
    for pk, owner_pk, public_id in runs.values_list("pk", "owner_id", "public_id"):
        events.run_changed(pk, owner_pk, public_id)
