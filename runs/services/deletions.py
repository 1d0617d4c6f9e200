"""Stored folders that nobody needs any more: entered with what made them useless, deleted once that is committed.

A deletion that the storage refuses, or before which its process dies, is done again by housekeeping until it succeeds.
Names of folders are made once, from ids and by chance, and never again (`gpuworker.snapshots.new_directory`,
`services.datasets.register`): what is entered late deletes nobody's files. Payloads are no folders of this kind. Their
names are their content, which may be stored again at any time; see `services.payload_files`.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Final

from django.db import transaction
from django.db.models import QuerySet
from django.db.models.functions import Now

from runs.models import Checkpoint, DatasetVersion, Operation, PendingDeletion, Snapshot
from runs.services import blobs, loads

_REST_S: Final = 60
_MAX_DOUBLINGS: Final = 6
_BATCH: Final = 500


def add(*folders: str) -> None:
    """Delete folders once the current transaction is committed, each whatever becomes of the others.

    One that a row still names, or whose files an operation has still to read, stays: in the latter case until
    `add_loaded` finds the operation over.
    """
    with transaction.atomic(savepoint=False):
        rows = PendingDeletion.objects.bulk_create(
            PendingDeletion(path=one) for one in dict.fromkeys(folders)
        )
        pks = [row.pk for row in rows]

        def delete_at_once() -> None:
            _delete_due(PendingDeletion.objects.filter(pk__in=pks))

        if pks:
            transaction.on_commit(delete_at_once, robust=True)


def add_loaded() -> None:
    """Forget which folders were read by loads that are over, and delete those that no checkpoint has any more."""
    with transaction.atomic():
        over = dict(loads.over().values_list("pk", "loads_from")[:_BATCH])
        Operation.objects.filter(pk__in=over).update(loads_from="")
        add(*over.values())


def delete_due() -> None:
    """Delete what is left of earlier deletions; those that fail rest longer and longer, and come after all others."""
    _delete_due(PendingDeletion.objects.all())


def _delete_due(rows: QuerySet[PendingDeletion]) -> None:
    until = time.monotonic() + blobs.CLEANUP_S
    while time.monotonic() < until and (row := _take(rows)) is not None:
        if _is_needed(row.path) or blobs.delete_folder(row.path):
            PendingDeletion.objects.filter(pk=row.pk).delete()


def _take(rows: QuerySet[PendingDeletion]) -> PendingDeletion | None:
    """Return a row whose time has come, as nobody else's for a while."""
    due = rows.filter(due_at__lte=Now()).order_by("tries", "due_at", "pk")
    with transaction.atomic():
        row = due.select_for_update(skip_locked=True).first()
        if row is not None:
            rest = timedelta(seconds=_REST_S << min(row.tries, _MAX_DOUBLINGS))
            PendingDeletion.objects.filter(pk=row.pk).update(tries=row.tries + 1, due_at=Now() + rest)
    return row


def _is_needed(folder: str) -> bool:
    # Last the loads: whoever asked for one of a row that is gone by now has entered it.
    return _is_named(folder) or loads.to_come(folder).exists()


def _is_named(folder: str) -> bool:
    """Say whether a row names it, as after an answer of the database that was lost on its way to a worker."""
    kind, name = folder.split("/")[:2]
    if kind == "datasets":
        return DatasetVersion.objects.filter(directory=folder).exists()
    states = Checkpoint.objects if kind == "checkpoints" else Snapshot.objects
    return states.filter(run_id=int(name), directory=folder).exists()
