"""Stored folders that are to go: what is left to do of deletions that are committed."""

from __future__ import annotations

from typing import Final

from django.db import models
from django.db.models.functions import Now

# Inside the storage, and only what is never written again once it is to go: payloads, named by content, are none of it.
_FOLDERS: Final = r"^((checkpoints|snapshots)/[0-9]+(/[^/.][^/]*)?|datasets/[^/.][^/]*)$"


class PendingDeletion(models.Model):
    """A folder that is deleted once the transaction is committed that made it useless; the row goes when that is done.

    The row is entered in that same transaction. `due_at` is moved on before each try, so that it is also a lease:
    whoever dies over a try leaves the row to the next one.
    """

    path = models.CharField(max_length=200)
    tries = models.PositiveIntegerField(db_default=0, default=0)
    due_at = models.DateTimeField(db_default=Now())
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=models.Q(path__regex=_FOLDERS), name="pending_deletion_inside_storage"
            ),
        ]

    def __str__(self) -> str:
        return self.path
