"""Runs that end the worker that brings them back: each has to rest in between, longer each time, so that others go on.

A try is counted before it begins; whoever survives it takes the count back, whatever came of it.
"""

from __future__ import annotations

from typing import Final

from django.db import connection
from django.db.models import Case, F, TextField, Value, When

from runs import events
from runs.models import TrainingRun
from runs.services.claims import HeldRun

# Workers that may be lost in a row over one run before it rests: a worker that is killed has often just begun.
FREE_TRIES: Final = 4
FIRST_REST_S: Final = 15
LONGEST_REST_S: Final = 3600
# Like other counts of tries it need not wait for the disk. The reason is shown for as long as the run rests.
_BEGIN: Final = """
UPDATE runs_trainingrun run SET restore_tries = tried.number, rests_until = tried.until,
  held_up = CASE WHEN tried.until IS NULL THEN run.held_up ELSE %s END,
  held_up_at = CASE WHEN tried.until IS NULL THEN run.held_up_at ELSE tried.until END
FROM (SELECT set_config('synchronous_commit', 'off', true)) AS relaxed,
  (SELECT id, restore_tries + 1 AS number, CASE WHEN restore_tries >= %s THEN
     clock_timestamp() + make_interval(secs => least(%s, %s * 2.0 ^ least(restore_tries - %s, 20))) END AS until
   FROM runs_trainingrun WHERE id = %s AND fence = %s FOR UPDATE) AS tried
WHERE run.id = tried.id RETURNING tried.number
"""
HELD_UP: Final = (
    "workers ended again and again while they brought the run back, so it is tried less often; "
    "the worker's log says why, and nothing is lost"
)


def begin(run: HeldRun) -> None:
    """Count, before it begins, that a worker brings a run back; should it end over that, the run may rest."""
    values: list[str | int] = [
        HELD_UP,
        FREE_TRIES,
        LONGEST_REST_S,
        FIRST_REST_S,
        FREE_TRIES,
        run.pk,
        run.fence,
    ]
    with connection.cursor() as cursor:
        cursor.execute(_BEGIN, values)
        row = cursor.fetchone()
    if row is not None and row[0] > FREE_TRIES:
        events.run_changed(run.pk, run.owner_id, run.public_id)


def end(run: HeldRun) -> None:
    """Note that the worker lives on, whatever came of it."""
    tried = TrainingRun.objects.filter(pk=run.pk, fence=run.fence, restore_tries__gt=0)
    held_up = Case(When(held_up=HELD_UP, then=Value("")), default=F("held_up"), output_field=TextField())
    tried.update(restore_tries=0, rests_until=None, held_up=held_up)
