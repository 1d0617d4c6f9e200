"""Delete a run with all that hangs on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from django.db import connection, transaction
from django.db.models import Manager, Q, QuerySet

from runs import events
from runs.exceptions import RequestInvalid
from runs.models import (
    Checkpoint,
    FixedSample,
    Operation,
    Recipe,
    SamplingSession,
    Session,
    Snapshot,
    TrainingRun,
)
from runs.services import deletions, payload_files

_ENDED: Final = (
    Recipe.State.FINISHED,
    Recipe.State.STOPPED,
    Recipe.State.DISCARDED,
    Recipe.State.FAILED,
)
_ENDING: Final = (Recipe.State.FINISHING, Recipe.State.STOPPING, Recipe.State.DISCARDING)
# The operations of a run and of the samples that were drawn for it. Not by way of the rows' own class: that
# would read every payload to find out what hangs on it.
_OF_RUN: Final = "FROM runs_operation WHERE run_id = %s OR sampling_session_id = ANY(%s)"


def delete(run: TrainingRun) -> None:
    """Delete a run with all that it left: checkpoints, metrics, events, samples, operations, and their files.

    Forks keep the path they started from, and the files that they have still to load. A worker that still holds the
    run cannot commit to it any more. The files go once the rows are gone.

    Raises:
        RequestInvalid: the run trains or waits to.
    """
    with transaction.atomic():
        # First the recipe's row, as whoever steers it does; then the run's, which operations and commits need.
        recipe = Recipe.objects.select_for_update().filter(run=run).first()
        row = TrainingRun.objects.select_for_update().filter(pk=run.pk).first()
        if row is None:
            return
        obstacle = obstacle_to_deletion(row, recipe)
        if obstacle:
            raise RequestInvalid(f"cannot delete {obstacle}", place="state")
        states = [*_folders(row.snapshots), *_folders(row.checkpoints)]
        states += row.operations.exclude(loads_from="").values_list("loads_from", flat=True)
        payloads = _delete_operations(row)
        row.delete()
        if row.source != TrainingRun.Source.SDK:
            Session.objects.filter(pk=row.session_id).delete()
        events.run_changed(run.pk, run.owner_id, run.public_id)
        deletions.add(*states, f"snapshots/{run.pk}", f"checkpoints/{run.pk}")
        payload_files.delete_after_commit(payloads)


def obstacle_to_deletion(run: TrainingRun, recipe: Recipe | None) -> str:
    """Return why the run cannot be deleted now, as the end of a sentence; empty if it can."""
    if recipe is not None and recipe.state not in _ENDED:
        advice = "wait until it has ended" if recipe.state in _ENDING else "stop it first"
        return f"a run that is {recipe.state}; {advice}"
    waiting = Operation.objects.filter(state=Operation.State.QUEUED)
    num_waiting = waiting.filter(Q(run=run) | Q(sampling_session__in=_sampling_sessions(run))).count()
    if num_waiting:
        what = "operation" if num_waiting == 1 else "operations"
        return f"a run with {num_waiting} unfinished {what}; stop its client and wait for them"
    return ""


def _sampling_sessions(run: TrainingRun) -> QuerySet[SamplingSession]:
    """Return what its owner samples the run from; a run that has its session for itself has all of that, too."""
    drawn = Q(run=run, owner_id=run.owner_id)
    if run.source != TrainingRun.Source.SDK:
        drawn |= Q(session_id=run.session_id)
    return SamplingSession.objects.filter(drawn)


def _delete_operations(run: TrainingRun) -> list[str]:
    """Delete the operations of the run and of its samples; returns the files of their payloads."""
    FixedSample.objects.filter(run=run).delete()
    sampled = list(_sampling_sessions(run).values_list("pk", flat=True))
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT DISTINCT payload_file {_OF_RUN}", [run.pk, sampled])
        payloads = [name for (name,) in cursor.fetchall() if name]
        cursor.execute(f"DELETE {_OF_RUN}", [run.pk, sampled])
    SamplingSession.objects.filter(pk__in=sampled).delete()
    return payloads


def _folders(states: Manager[Checkpoint] | Manager[Snapshot]) -> Iterable[str]:
    return states.values_list("directory", flat=True)
