"""Payloads, results and snapshots of a run that nobody can need any more.

A run is brought back from the newest of its kept snapshots that can be read, so its operations up to the older
one are never replayed; those of a run that has ended with nothing left to do are not either, so that its
snapshots go, too. The payloads go at once. Their results stay as long as clients may ask for them. The rows stay: a request that comes again is
still known.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Final

from django.db import connection, transaction
from django.db.models import Exists, Min, OuterRef, Q, QuerySet
from django.utils import timezone

from runs.models import Evaluation, Operation, Recipe, Snapshot, TrainingRun
from runs.services import blobs, deletions, payload_files
from runs.services.commits import NUM_SNAPSHOTS_KEPT

KEEP_RESULTS: Final = timedelta(hours=24)
_BATCH: Final = 500
_BATCHES_AT_ONCE: Final = 200
_RUNS_AT_ONCE: Final = 500

_FLOORS: Final = """
WITH kept AS (
  SELECT run_id, seq, row_number() OVER (PARTITION BY run_id ORDER BY seq DESC, fence DESC) AS place
  FROM runs_snapshot
), floors AS (
  SELECT r.id, r.payloads_gone_seq, r.results_gone_seq,
    CASE WHEN r.state <> 'open' AND NOT EXISTS (
      SELECT 1 FROM runs_operation o WHERE o.run_id = r.id AND o.state = 'queued')
    THEN r.applied_seq ELSE COALESCE(kept.seq, -1) END AS floor
  FROM runs_trainingrun r LEFT JOIN kept ON kept.run_id = r.id AND kept.place = %s
)
SELECT id, floor FROM floors WHERE floor > LEAST(payloads_gone_seq, results_gone_seq) ORDER BY random() LIMIT %s
"""
# By chance: many runs whose results are too young to go must not keep others from their turn.


def forget() -> None:
    """Delete what has become useless; what is more than a good batch waits for the next time."""
    with connection.cursor() as cursor:
        cursor.execute(_FLOORS, [NUM_SNAPSHOTS_KEPT, _RUNS_AT_ONCE])
        floors: list[tuple[int, int]] = cursor.fetchall()
    before = timezone.now() - KEEP_RESULTS
    num_left = _BATCHES_AT_ONCE
    until = time.monotonic() + blobs.CLEANUP_S
    for run_pk, floor in floors:
        while num_left and time.monotonic() < until and _forget_payloads(run_pk, floor):
            num_left -= 1
        while num_left and _forget_results(run_pk, floor, before):
            num_left -= 1
    _forget_snapshots()


def _forget_snapshots() -> None:
    """Delete the snapshots of runs that have ended with nothing left to do."""
    waiting = Operation.objects.filter(run=OuterRef("run"), state=Operation.State.QUEUED)
    ended = ~Exists(waiting) & ~Q(run__state=TrainingRun.State.OPEN)
    with transaction.atomic():
        chosen = dict(Snapshot.objects.filter(ended).values_list("pk", "directory")[:_RUNS_AT_ONCE])
        Snapshot.objects.filter(pk__in=chosen).delete()
        deletions.add(*chosen.values())


def _forget_payloads(run_pk: int, floor: int) -> bool:
    """Delete one batch of payloads; false when there was nothing left."""
    with transaction.atomic():
        run = _locked(run_pk)
        if run is None:
            return False
        rows = _applied(run_pk, after_seq=run.payloads_gone_seq, up_to_seq=floor)
        batch = list(rows.values_list("pk", "seq", "payload_file")[:_BATCH])
        last = batch[-1][1] if batch else floor
        if last <= run.payloads_gone_seq:
            return False
        Operation.objects.filter(pk__in=[pk for pk, _, _ in batch]).update(payload=None, payload_file="")
        TrainingRun.objects.filter(pk=run_pk).update(payloads_gone_seq=last)
        names = {name for _, _, name in batch if name}
        payload_files.delete_after_commit(names)
    return True


def _forget_results(run_pk: int, floor: int, before: datetime) -> bool:
    """Delete one batch of results that are old enough; false when there was nothing left."""
    with transaction.atomic():
        run = _locked(run_pk)
        if run is None:
            return False
        up_to_seq = min(floor, _read_by_recipe(run, floor))
        rows = _applied(run_pk, after_seq=run.results_gone_seq, up_to_seq=up_to_seq)
        batch = list(rows.values_list("pk", "seq", "finished_at")[:_BATCH])
        # They were finished in the order of their seq; one that was refused when it came has no such time, and what
        # comes before it may be young.
        old = list(takewhile(lambda row: row[2] is None or row[2] < before, batch))
        if not old:
            return False
        Operation.objects.filter(pk__in=[pk for pk, _, _ in old]).update(result=None)
        TrainingRun.objects.filter(pk=run_pk).update(results_gone_seq=old[-1][1])
    return len(old) == len(batch)


def _locked(run_pk: int) -> TrainingRun | None:
    """Lock the run's row as a commit does, but before the operations, as a deletion does."""
    return TrainingRun.objects.select_for_update(no_key=True).filter(pk=run_pk).first()


def _applied(run_pk: int, *, after_seq: int, up_to_seq: int) -> QuerySet[Operation]:
    is_over = ~Q(state=Operation.State.QUEUED)
    return Operation.objects.filter(is_over, run_id=run_pk, seq__gt=after_seq, seq__lte=up_to_seq).order_by(
        "seq"
    )


def _read_by_recipe(run: TrainingRun, floor: int) -> int:
    """Return up to where the loop that trains an open run has read the results, if there is one."""
    recipe = Recipe.objects.filter(run=run).first() if run.state == TrainingRun.State.OPEN else None
    if recipe is None:
        return floor
    unread = Evaluation.objects.filter(run=run, loss=None).aggregate(first=Min("first_seq"))["first"]
    return recipe.watched_seq if unread is None else min(recipe.watched_seq, unread - 1)
