"""Delete a run with all that hangs on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from django.db import connection, transaction
from django.db.models import Count, Manager, Q, QuerySet
from django.utils import timezone

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
from runs.services import deletions, holdups, payload_files, sessions, workers

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
    """Return why the run cannot be deleted now, as the end of a sentence; empty if it can.

    What waits in the log counts while a client waits for it or a worker has it. Nobody else misses it: a run whose
    recipe has ended, or whose client has left, would otherwise stay for as long as no worker has its base model.
    """
    if recipe is not None and recipe.state not in _ENDED:
        if recipe.state not in _ENDING:
            return f"a run that is {recipe.state}; stop it first"
        if not holdups.reason_of(run) and (_is_held(run) or _is_to_be_ended(run, recipe)):
            return f"a run that is {recipe.state}; wait until it has ended"
    return _unfinished(run, has_client=recipe is None)


def _is_held(run: TrainingRun) -> bool:
    return run.worker_id is not None and workers.live().filter(pk=run.worker_id).exists()


def _is_to_be_ended(run: TrainingRun, recipe: Recipe) -> bool:
    """Say whether weights are still to be kept of a run that no worker has, and one comes for them."""
    return recipe.state != Recipe.State.DISCARDING and _is_to_be_taken(run)


def _is_to_be_taken(run: TrainingRun) -> bool:
    """Say whether a worker comes for what waits in the run's log."""
    is_resting = run.rests_until is not None and run.rests_until > timezone.now()
    return not is_resting and workers.having(run.base_model).filter(drain_asked_at=None).exists()


def _unfinished(run: TrainingRun, *, has_client: bool) -> str:
    """Return what has to be done first, as the end of a sentence; empty if that is nothing."""
    num_of_run = Operation.objects.filter(run=run, state=Operation.State.QUEUED).count()
    is_held = num_of_run > 0 and _is_held(run)
    is_asked = num_of_run > 0 and has_client and not sessions.over().filter(pk=run.session_id).exists()
    num_asked, num_drawn = _waiting_samples(run)
    num_waiting = num_asked + num_drawn + (num_of_run if is_held or is_asked else 0)
    if num_waiting == 0:
        return ""
    what, them = ("operation", "it") if num_waiting == 1 else ("operations", "them")
    advice = f"wait for {them}"
    if is_asked or num_asked:
        if is_held or num_drawn or _is_to_be_taken(run):
            advice = f"stop its client and wait for {them}"
        else:
            advice = (
                f"stop its client, which counts as gone once it is silent for {sessions.SILENT_S // 60} min"
            )
    return f"a run with {num_waiting} unfinished {what}; {advice}"


def _waiting_samples(run: TrainingRun) -> tuple[int, int]:
    """Return the samples of the run that clients wait for, and how many others a worker draws.

    The session of a run without a client is no client's.
    """
    own = [] if run.source == TrainingRun.Source.SDK else [run.session_id]
    is_asked = ~Q(sampling_session__session__in=sessions.over()) & ~Q(sampling_session__session__in=own)
    counted = Operation.objects.filter(
        state=Operation.State.QUEUED, sampling_session__in=_sampling_sessions(run)
    ).aggregate(
        asked=Count("pk", filter=is_asked), drawn=Count("pk", filter=~is_asked & Q(worker__in=workers.live()))
    )
    return counted["asked"], counted["drawn"]


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
