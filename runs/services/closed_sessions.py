"""Runs whose client has closed its session: they are let go, as no operation of theirs is taken any more.

A client that merely fell silent may come back, so its runs stay. Runs that a recipe trains end by their recipe.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from django.db import connection

from runs.exceptions import NotFound, RequestInvalid, SequenceConflict
from runs.models import TrainingRun
from runs.services import operations, workers

# Well after the last operation was taken that its client had sent before.
AFTER_S: Final = 2 * operations.LATE_S
# A worker brings back each run that it does not hold any more, to let it go.
_RUNS_AT_ONCE: Final = 50

# Materialized, or a plan might look at the operations of every run there is.
_DUE: Final = """
WITH over AS MATERIALIZED (
  SELECT run.id FROM runs_trainingrun run JOIN runs_session session ON session.id = run.session_id
  WHERE run.state = 'open' AND run.base_model = ANY(%s)
    AND session.finished_at < statement_timestamp() - make_interval(secs => %s)
    AND NOT EXISTS (SELECT 1 FROM runs_recipe recipe WHERE recipe.run_id = run.id)
)
SELECT id FROM over
WHERE NOT EXISTS (SELECT 1 FROM runs_operation op WHERE op.run_id = over.id AND op.state = 'queued')
  AND (SELECT kind FROM runs_operation op WHERE op.run_id = over.id ORDER BY seq DESC LIMIT 1)
    IS DISTINCT FROM 'unload_model'
LIMIT %s
"""


def let_runs_go() -> None:
    """Ask for the end of runs that have done all that their client, which is gone for good, has asked for.

    A run whose base model no worker has stays as it is: it would wait for one, and is shown as ended.
    """
    with connection.cursor() as cursor:
        cursor.execute(_DUE, [_served(), AFTER_S, _RUNS_AT_ONCE])
        due = [pk for (pk,) in cursor.fetchall()]
    for run in TrainingRun.objects.filter(pk__in=due).select_related("session"):
        with suppress(NotFound, RequestInvalid, SequenceConflict):  # somebody else has ended or deleted it
            operations.unload(run)


def _served() -> list[str]:
    return sorted({name for worker in workers.serving() for name in workers.models_of(worker)})
