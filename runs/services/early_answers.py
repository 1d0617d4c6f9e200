"""Saves that only feed a sampling session are answered before their file is written: nobody waits for the disk.

Until the file is there the run's `applied_seq` stays before the save. So everything that keeps what an operation
needs until it is applied keeps it for this one, and whoever takes the run over applies it once more: the same
weights, and a file. The row of such a checkpoint has no size yet; no other worker samples from it until it has.
"""

from __future__ import annotations

from django.db import transaction
from django.db.models.functions import Now

from runs import events
from runs.models import Checkpoint, Operation, TrainingRun
from runs.services import commits, deletions
from runs.services.commits import NewCheckpoint, RunCommit


def give(run: RunCommit, new: NewCheckpoint) -> bool:
    """Answer the one save of a commit that is still to come and open its sampling session; false if the run is another worker's.

    A save that a former owner has answered keeps its answer; its checkpoint is in the new folder from now on.
    """
    (op,) = run.operations
    assert op.pk is not None, "what never came is not answered early"
    held = TrainingRun.objects.filter(pk=run.run_pk, fence=run.fence, applied_seq=run.from_seq)
    with transaction.atomic():
        if not held.select_for_update(no_key=True).exists():
            return False
        waiting = Operation.objects.filter(pk=op.pk, state=Operation.State.QUEUED)
        is_first = waiting.update(
            state=Operation.State.DONE,
            result=op.result.body,
            result_is_proto=op.result.is_proto,
            fence=run.fence,
            finished_at=Now(),
        )
        if is_first:
            commits.register_checkpoint(run, op, new)
            events.notify_done([op.pk])
        else:
            owed = Checkpoint.objects.filter(run_id=run.run_pk, seq=op.seq, is_ephemeral=True, size_bytes=0)
            former = owed.exclude(directory=new.directory)
            deletions.add(*former.values_list("directory", flat=True))
            owed.update(directory=new.directory)
    return True


def is_owed(directory: str) -> bool:
    """Return whether a file is still to be written: not when its checkpoint was deleted, or another worker wrote it."""
    return Checkpoint.objects.filter(directory=directory, size_bytes=0).exists()


def settle(directory: str, size_bytes: int) -> bool:
    """Enter that the file is there; false when nobody wants it any more, and it goes."""
    with transaction.atomic():
        is_wanted = bool(Checkpoint.objects.filter(directory=directory).update(size_bytes=size_bytes))
        if not is_wanted:
            deletions.add(directory)
    return is_wanted


def withdraw(directory: str) -> None:
    """Give up a checkpoint that storage will not take: its samples fail and say that the weights are gone."""
    with transaction.atomic():
        Checkpoint.objects.filter(directory=directory, size_bytes=0).delete()
        deletions.add(directory)
