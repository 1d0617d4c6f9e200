"""Checkpoints after they were made: list, publish, expire, delete, read their files."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from django.core.files.base import File
from django.core.files.storage import default_storage
from django.db.models import QuerySet, Sum
from django.db.models.functions import Now

from runs.models import Checkpoint
from runs.services import blobs


def set_public(checkpoint: Checkpoint, *, is_public: bool) -> None:
    """Let every user of this server read the checkpoint, or no longer; repeating it is no error."""
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_public=is_public)


def set_ttl(checkpoint: Checkpoint, ttl_seconds: int | None) -> None:
    """Let the checkpoint end after some time from now; None keeps it for ever."""
    expires_at = None if ttl_seconds is None else Now() + timedelta(seconds=ttl_seconds)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(expires_at=expires_at)


def delete(checkpoint: Checkpoint) -> None:
    """Delete the row and then the files."""
    Checkpoint.objects.filter(pk=checkpoint.pk).delete()
    blobs.delete_folder(checkpoint.directory)


def delete_expired() -> int:
    """Delete every checkpoint whose time has come; returns how many."""
    expired = list(Checkpoint.objects.filter(expires_at__lte=Now()))
    for checkpoint in expired:
        delete(checkpoint)
    return len(expired)


def size_of(checkpoints: QuerySet[Checkpoint]) -> int:
    """Return the bytes the checkpoints take together."""
    return int(checkpoints.aggregate(total=Sum("size_bytes"))["total"] or 0)


def files(checkpoint: Checkpoint, *, with_optimizer: bool = True) -> Iterator[tuple[str, File[bytes]]]:
    """Yield (name, open file) of everything the checkpoint holds."""
    _, names = default_storage.listdir(checkpoint.directory)
    for name in sorted(names):
        if with_optimizer or name in ("adapter_model.safetensors", "adapter_config.json"):
            with default_storage.open(f"{checkpoint.directory}/{name}") as file:
                yield name, file
