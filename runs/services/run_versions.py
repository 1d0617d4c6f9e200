"""A word for what a run's page shows beside its charts: looked at where no hint came, in one query.

`runs.consumers` tells it to an open page, which knows the word of what it shows and reads its parts anew at another.
"""

from __future__ import annotations

from typing import Final

from django.db import connection

NUM_OPERATIONS: Final = 20
NUM_SESSIONS: Final = 20
# A row's xmin is the transaction that wrote it last, so it is another one after each change of any column. The sum
# sees transactions, too, that end in another order than they began. OFFSET 0 keeps the planner from looking for the
# newest sampling sessions of one run through everybody's.
_WRITTEN: Final = "concat_ws('.', count(*), sum(xmin::text::bigint))"
_READ: Final = f"""
SELECT run.xmin::text,
  (SELECT xmin::text FROM runs_recipe WHERE run_id = run.id),
  (SELECT {_WRITTEN} FROM runs_runevent WHERE run_id = run.id),
  (SELECT {_WRITTEN} FROM runs_checkpoint WHERE run_id = run.id),
  (SELECT concat_ws('.', count(*), sum(id)) FROM runs_trainingrun WHERE parent_id = run.id),
  (SELECT {_WRITTEN} FROM (
     SELECT xmin FROM runs_operation WHERE run_id = run.id ORDER BY seq DESC LIMIT %(operations)s) AS latest),
  (SELECT {_WRITTEN} FROM (
     SELECT answer.xmin FROM (
       SELECT id FROM (SELECT id FROM runs_samplingsession WHERE run_id = run.id OFFSET 0) AS own
       ORDER BY id DESC LIMIT %(sessions)s) AS session
     CROSS JOIN LATERAL (
       SELECT xmin FROM runs_operation WHERE sampling_session_id = session.id
       ORDER BY seq DESC LIMIT %(operations)s) AS answer) AS samples),
  (SELECT concat_ws('.', count(*), sum(fixed.xmin::text::bigint), sum(answer.xmin::text::bigint))
   FROM runs_fixedsample fixed LEFT JOIN runs_operation answer ON answer.id = fixed.operation_id
   WHERE fixed.run_id = run.id)
FROM runs_trainingrun run WHERE run.id = %(run)s
"""  # noqa: S608 - put together of constants


def version_of(run_pk: int) -> str:
    """Return a word that is another one after a change of the run, its recipe or what is listed on its page.

    Of its operations and samples the newest count. A run that is gone has none.
    """
    values = {"run": run_pk, "operations": NUM_OPERATIONS, "sessions": NUM_SESSIONS}
    with connection.cursor() as cursor:
        cursor.execute(_READ, values)
        row = cursor.fetchone()
    return "" if row is None else "-".join(str(part or "") for part in row)
